"""The machine as a whole: what state it is in, running, stopping, resetting, ending it."""

from __future__ import annotations

from pyvmm import __version__
from pyvmm._util import log
from pyvmm.core import runstate
from pyvmm.monitor.qmp import schema
from pyvmm.monitor.registry import Command, Context

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from pyvmm.monitor.registry import Shape


def query_status(context: Context) -> dict[str, Any]:
    """Return whether the guest runs, and the run state."""
    state = context.machine.runstate.state
    return {"status": state, "running": state == "running"}


def query_version(context: Context) -> dict[str, Any]:
    """Return the version of pyvmm, under the member names that QMP clients look for."""
    major, minor, micro = (int(part) for part in __version__.split(".")[:3])
    return {
        "qemu": {"micro": micro, "minor": minor, "major": major},
        "package": f"pyvmm {__version__}",
    }


def query_name(context: Context) -> dict[str, Any]:
    """Return the name given to the machine with -name, if any."""
    name = context.machine.config.name
    return {"name": name} if name else {}


def query_kvm(context: Context) -> dict[str, Any]:
    """Return whether KVM runs the guest: always."""
    return {"enabled": True, "present": True}


def query_messages(context: Context) -> dict[str, Any]:
    """Return how many of pyvmm's messages its standard error did not take."""
    return {"dropped": log.err.dropped}


def query_commands(context: Context) -> list[dict[str, Any]]:
    """Return the names of all commands."""
    return [{"name": name} for name in context.registry.commands]


def query_qmp_schema(context: Context) -> list[dict[str, Any]]:
    """Return all commands and events with their types, in QEMU's introspection form."""
    return schema.describe(context.registry.commands.values())


def stop(context: Context) -> None:
    """Pause the guest."""
    context.machine.stop()


def cont(context: Context) -> None:
    """Let a paused guest run."""
    context.machine.cont()


def system_reset(context: Context) -> None:
    """Reset the machine, as its reset button does."""
    context.machine.reset(reason="host-qmp-system-reset")


def system_powerdown(context: Context) -> None:
    """Ask the guest to power down, as the power button does."""
    context.machine.powerdown()


def quit(context: Context) -> None:
    """End pyvmm and the guest with it."""
    context.machine.quit(0, reason="host-qmp-quit")


_VERSION: Shape = {
    "qemu": {"major": "int", "minor": "int", "micro": "int"},
    "package": "str",
}

COMMANDS = (
    Command(
        "query-status",
        query_status,
        returns={"status": tuple(runstate.TRANSITIONS), "running": "bool"},
        oob=True,
    ),
    Command("query-version", query_version, returns=_VERSION),
    Command("query-name", query_name, returns={"*name": "str"}),
    Command("query-kvm", query_kvm, returns={"enabled": "bool", "present": "bool"}),
    Command("x-query-messages", query_messages, returns={"dropped": "int"}),
    Command("query-commands", query_commands, returns=[{"name": "str"}]),
    Command("query-qmp-schema", query_qmp_schema, returns=["any"]),
    Command("stop", stop),
    Command("cont", cont),
    Command("system_reset", system_reset),
    Command("system_powerdown", system_powerdown),
    Command("quit", quit, oob=True),
)
