"""What QMP clients see of a live update, through one connection that lives on."""

import os
import time

import pytest
from harness import wait_until
from harness.qmp import Qmp, QmpError

OLD_SIDE = ["MIGRATION setup", "STOP", "MIGRATION active", "MIGRATION_PASS 2", "MIGRATION device"]
DONE = "MIGRATION completed True"  # the guest ran
OLD_SIDE += [DONE]
STOOD = (
    "MIGRATION completed False -incoming defer: the new image waits for a command, and the guest"
    " for the devices"
)
NEW_SIDE = ["MIGRATION setup", "MIGRATION active", "RESUME"]
DIES_LATER = """\
import os, sys
if "PYVMM_CPR_PROBE" not in os.environ:
    import pyvmm.migration.savevm as savevm
    def apply(machine, loaded, **ways):
        raise RuntimeError("injected")
    savevm.apply = apply
from pyvmm.cli import main
sys.exit(main())
"""


@pytest.fixture
def machine(vm):
    machine = vm("-qmp", "unix:qmp,server=on,wait=off", append="ticker period=20 timer=pit")
    machine.expect("tick")
    return machine


@pytest.fixture
def qmp(machine):
    with Qmp(machine.folder / "qmp") as client:
        yield client


def enable_events(qmp):
    capabilities = [{"capability": "events", "state": True}]
    qmp.execute("migrate-set-capabilities", capabilities=capabilities)


def set_command(machine, qmp, command=None, uri="file:state"):
    command = command or machine.argv
    qmp.execute(
        "migrate-set-parameters", mode="cpr-exec", cpr_exec_command=[*command, "-incoming", uri]
    )


def failing(machine, tmp_path):
    """A command that passes the preflight and fails while it loads the state."""
    script = tmp_path / "dies.py"
    script.write_text(DIES_LATER)
    python = machine.cmdline[0]
    return [python, str(script), *machine.argv[1:]]


def test_events_of_both_sides_in_order(machine, qmp):
    enable_events(qmp)
    for _ in range(3):
        # Both: the connection lives on, and what was switched on for it.
        set_command(machine, qmp)
        before_us = time.time_ns() // 1000
        qmp.execute("migrate", uri="file:state")
        assert qmp.wait("MIGRATION", status="completed") == OLD_SIDE
        assert qmp.wait("MIGRATION", status="completed") == [*NEW_SIDE, DONE]
        info = qmp.execute("query-migrate")
        assert info["status"] == "completed"
        assert 0 <= info["downtime"] <= info["total-time"]
        assert info["running"]
        assert info["downtime"] <= (time.time_ns() // 1000 - before_us) / 1000
        assert {"stop", "save", "exec", "start", "load"} <= set(info["phases"])
        (cpu,) = info["cpu-pauses"]
        assert cpu["cpu"] == 0
        assert cpu["move-us"] > 0
        assert cpu["takeover-us"] > 0
        assert info["device-stall"] > (cpu["move-us"] + cpu["takeover-us"]) / 1000
        named = {(span["name"], span.get("cpu")) for span in info["timeline"]}
        assert {("exec", None), ("move", 0), ("carried", 0), ("takeover", 0)} <= named
        wait_until(lambda: "refault" in qmp.execute("query-migrate"), "the end of the faults")
        assert qmp.execute("query-status")["status"] == "running"
    assert machine.stderr() == ""


def test_without_the_capability_only_stop_and_resume_are_told(machine, qmp):
    qmp.execute("update")
    assert qmp.wait("RESUME") == ["STOP", "RESUME"]
    assert qmp.execute("query-status")["status"] == "running"


def test_a_paused_guest_stays_so_and_nothing_else_is_told(machine, qmp):
    enable_events(qmp)
    qmp.execute("stop")
    qmp.wait("STOP")
    qmp.execute("update")
    seen = qmp.wait("MIGRATION", status="completed") + qmp.wait("MIGRATION", status="completed")
    assert seen == [name for name in OLD_SIDE + NEW_SIDE if name not in ("STOP", "RESUME")] + [DONE]
    assert qmp.execute("query-status")["status"] == "paused"


def test_a_client_that_comes_later_is_told_nothing(machine, qmp):
    qmp.execute("update")
    qmp.wait("RESUME")
    qmp.close()
    with Qmp(machine.folder / "qmp") as late:
        late.execute("query-status")
        assert late.events == []


def test_a_refused_update(machine, qmp):
    enable_events(qmp)
    set_command(machine, qmp, [*machine.argv, "-m", "32M"])
    qmp.execute("migrate", uri="file:state")
    assert qmp.wait("MIGRATION", status="failed") == ["MIGRATION setup", "MIGRATION failed"]
    info = qmp.execute("query-migrate")
    assert info["status"] == "failed"
    assert "-m" in info["error-desc"]


def test_a_rollback(machine, qmp, tmp_path):
    enable_events(qmp)
    set_command(machine, qmp, failing(machine, tmp_path))
    qmp.execute("migrate", uri="file:state")
    assert qmp.wait("MIGRATION", status="completed") == OLD_SIDE
    failure = {"status": "failed", "error-where": "__main__.apply"}
    assert qmp.wait("MIGRATION", **failure) == [*NEW_SIDE, "MIGRATION failed"]
    assert "Failed in: \t\t__main__.apply" in machine.hmp("info migrate")
    info = qmp.execute("query-migrate")
    assert info["status"] == "failed"
    assert "injected" in info["error-desc"]
    assert info["error-where"] == "__main__.apply"
    machine.expect("tick")
    set_command(machine, qmp)
    qmp.execute("migrate", uri="file:state")
    qmp.wait("RESUME")
    assert qmp.execute("query-migrate")["status"] == "completed"


def test_who_waited_for_an_update_that_was_rolled_back_is_told_and_nobody_else(
    machine, qmp, tmp_path
):
    set_command(machine, qmp, failing(machine, tmp_path))
    reply = machine.hmp("migrate file:state")
    assert reply.startswith("Error: RuntimeError: injected")
    assert reply.count("injected") == 1
    assert machine.stderr() == ""
    set_command(machine, qmp, failing(machine, tmp_path))
    assert machine.hmp("migrate -d file:state") == ""
    qmp.wait("RESUME")
    qmp.wait("RESUME")
    wait_until(lambda: "update failed" in machine.stderr(), "the failure on standard error")
    assert machine.stderr().count("injected") == 1


def test_a_request_cut_in_two_by_an_update(machine, qmp):
    with qmp as client:
        client.send(b'{"execute": "query-na')
        machine.hmp("update")
        client.send(b'me", "id": "cut"}')
        assert client.reply() == {"return": {}, "id": "cut"}


def test_cancel_out_of_band(machine):
    with Qmp(machine.folder / "qmp", enable=["oob"]) as client:
        enable_events(client)
        set_command(machine, client, ["/bin/sleep", "1000"])
        client.send({"execute": "migrate", "arguments": {"uri": "file:state"}})
        client.send({"exec-oob": "migrate_cancel", "id": 1})
        assert [client.reply(), client.reply()] == [{"return": {}}, {"return": {}, "id": 1}]
        client.wait("MIGRATION", status="cancelled")
        assert client.execute("query-migrate")["status"] == "cancelled"
        assert machine.status == "running"


def test_what_clients_added_is_there_after_an_update(machine, qmp, tmp_path):
    path = tmp_path / "out"
    unix = {"type": "unix", "data": {"path": str(tmp_path / "added")}}
    qmp.execute("chardev-add", id="s", backend={"type": "socket", "data": {"addr": unix}})
    qmp.execute("chardev-add", id="f", backend={"type": "file", "data": {"out": str(path)}})
    read_fd, write_fd = os.pipe()
    number = qmp.execute("add-fd", [write_fd], opaque="pipe")["fd"]
    qmp.execute("getfd", [write_fd], fdname="mine")
    os.close(write_fd)
    before = qmp.execute("query-chardev")
    for _ in range(3):
        qmp.execute("update")
        qmp.wait("RESUME")
    assert qmp.execute("query-chardev") == before
    entry = {"fd": number, "opaque": "pipe"}
    assert qmp.execute("query-fdsets") == [{"fdset-id": 0, "fds": [entry]}]
    qmp.execute("remove-fd", fdset_id=0)
    os.set_blocking(read_fd, False)
    with pytest.raises(BlockingIOError):
        os.read(read_fd, 1)  # the other one keeps it open
    qmp.execute("closefd", fdname="mine")
    assert os.read(read_fd, 1) == b""
    os.close(read_fd)
    for id in "sf":
        qmp.execute("chardev-remove", id=id)
    with pytest.raises(QmpError, match="not found"):
        qmp.execute("chardev-remove", id="s")
    assert machine.stderr() == ""


def test_defer(machine, qmp):
    enable_events(qmp)
    set_command(machine, qmp, uri="defer")
    qmp.execute("migrate", uri="file:state")
    assert qmp.wait("MIGRATION", status="completed") == [*OLD_SIDE[:-1], STOOD]
    assert qmp.execute("query-status")["status"] == "inmigrate"
    with pytest.raises(QmpError, match="wrong"):
        qmp.execute("migrate-incoming", uri="file:wrong")
    addr = {"transport": "file", "filename": "state", "offset": 0}
    qmp.events.clear()
    qmp.execute("migrate-incoming", channels=[{"channel-type": "main", "addr": addr}])
    assert qmp.wait("MIGRATION", status="completed") == [*NEW_SIDE, STOOD]
    machine.expect("tick")
