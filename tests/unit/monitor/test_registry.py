"""Commands by their machine names: what is taken, refused, and returned."""

import pytest

from pyvmm.core.runstate import INMIGRATE, RunState
from pyvmm.errors import CommandError, StateError
from pyvmm.monitor.registry import CommandNotFound


def test_every_command_says_what_it_does(context):
    for command in context.registry.commands.values():
        assert command.doc.endswith(".") or ";" in command.doc or ":" in command.doc


def test_results_are_plain_data(context):
    assert context.execute("query-status") == {"status": "running", "running": True}
    assert context.execute("query-name") == {}
    assert context.execute("query-kvm") == {"enabled": True, "present": True}
    assert context.execute("stop") is None
    assert {"name": "query-commands"} in context.execute("query-commands")
    assert context.execute("query-cpus-fast")[1]["cpu-index"] == 1
    assert context.execute("query-memdev")[0]["share"] is True


@pytest.mark.parametrize(
    ("name", "arguments", "problem"),
    [
        ("query-status", {"x": 1}, "Parameter 'x' is unexpected"),
        ("migrate", {"uri": 1}, "Invalid parameter type for 'uri', expected: string"),
        ("migrate", {"detach": 1}, "Invalid parameter type for 'detach', expected: boolean"),
        (
            "x-read-port",
            {"port": True, "size": 1},
            "Invalid parameter type for 'port', expected: integer",
        ),
        ("x-read-port", {"port": 1}, "Parameter 'size' is missing"),
        ("migrate", {}, "need either 'uri' or 'channels' argument"),
        ("x-query-registers", {"cpu-index": -1}, "CPU#-1 not available"),
    ],
)
def test_arguments_are_checked(context, name, arguments, problem):
    with pytest.raises(CommandError) as caught:
        context.execute(name, arguments)
    assert str(caught.value) == problem


def test_unknown_commands(context):
    with pytest.raises(CommandNotFound, match=r"^The command nope has not been found$"):
        context.execute("nope")


def test_some_commands_wait_for_the_incoming_migration(context, machine):
    machine.runstate = RunState(INMIGRATE)
    with pytest.raises(StateError):
        context.execute("x-read-port", {"port": 0, "size": 1})
    assert context.execute("query-status") == {"status": "inmigrate", "running": False}


def test_several_capabilities_or_none(context):
    def switch(*entries):
        context.execute("migrate-set-capabilities", {"capabilities": list(entries)})

    switch({"capability": "events", "state": True}, {"capability": "xbzrle", "state": False})
    assert {"state": True, "capability": "events"} in context.execute("query-migrate-capabilities")
    for bad in (
        1,
        {},
        {"capability": 1, "state": True},
        {"capability": "events", "state": 1},
        {"capability": "bogus", "state": True},
    ):
        with pytest.raises(CommandError):
            switch({"capability": "events", "state": False}, bad)
    assert context.migration.capabilities.get("events") is True


def test_several_parameters_or_none(context):
    command = ["pyvmm", "run", "-incoming", "file:a"]
    wanted = {"mode": "cpr-exec", "cpr-exec-command": command, "downtime-limit": 20}
    context.execute("migrate-set-parameters", wanted)
    found = context.execute("query-migrate-parameters")
    assert {name: found[name] for name in wanted} == wanted
    assert found["max-bandwidth"] == 134217728
    for bad in ({"bogus": 1}, {"mode": "x"}, {"mode": 1}, {"cpr-exec-command": [1]}):
        with pytest.raises(CommandError):
            context.execute("migrate-set-parameters", {"downtime-limit": 30, **bad})
    assert context.migration.parameters.get("downtime-limit") == 20
