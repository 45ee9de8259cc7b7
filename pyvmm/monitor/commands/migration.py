"""Migration and live update: parameters, capabilities, start, cancel, progress."""

from __future__ import annotations

from pyvmm.errors import CommandError
from pyvmm.migration.params import Capabilities, parameters
from pyvmm.migration.status import STATUSES, STEPS
from pyvmm.monitor.registry import Argument, Command, Context

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from pyvmm.monitor.registry import Shape


def migrate(
    context: Context,
    uri: str | None = None,
    channels: list[Any] | None = None,
    detach: bool = True,
    resume: bool = False,
) -> None:
    """Start a migration or live update; returns as soon as it is under way."""
    if resume:
        raise CommandError("There is no paused postcopy migration to resume")
    context.migration.start(_uri(uri, channels), True, _ignore)


def _uri(uri: str | None, channels: list[Any] | None) -> str:
    """Return the URI, given as such or as a list of one MigrationChannel to a file."""
    if (uri is None) == (channels is None):
        raise CommandError("need either 'uri' or 'channels' argument")
    if uri is not None:
        return uri
    if channels is None or len(channels) != 1:
        raise CommandError("Channel list must have one entry")
    what = "Parameter 'channels' takes {channel-type: main, addr: {transport: file, filename}}"
    channel = channels[0]
    addr = channel.get("addr") if isinstance(channel, dict) else None
    if not isinstance(addr, dict) or channel.get("channel-type") != "main":
        raise CommandError(what)
    name, offset = addr.get("filename"), addr.get("offset", 0)
    if addr.get("transport") != "file" or not isinstance(name, str) or type(offset) is not int:
        raise CommandError(what)
    return f"file:{name},offset={offset}" if offset else f"file:{name}"


def _ignore(error: str | None) -> None:
    # query-migrate tells; the client has its answer already.
    del error


def update(context: Context, command: list[str] | None = None) -> None:
    """Update pyvmm in place, with its own command line or another; returns as soon as it is
    under way."""
    if command is not None and not all(isinstance(word, str) for word in command):
        raise CommandError("Invalid parameter type for 'command', expected: array of strings")
    context.migration.update(command, _ignore)


def migrate_incoming(
    context: Context,
    uri: str | None = None,
    channels: list[Any] | None = None,
    exit_on_error: bool = True,
) -> None:
    """Load the state that -incoming defer waits for."""
    context.migration.incoming(_uri(uri, channels))


def migrate_cancel(context: Context) -> None:
    """Cancel the migration under way, if any."""
    context.migration.cancel()


def query_migrate(context: Context) -> dict[str, Any]:
    """Return how the present or last migration stands."""
    found: dict[str, Any] = context.migration.info()
    return found


def query_migrate_parameters(context: Context) -> dict[str, Any]:
    """Return all migration parameters."""
    settings = context.migration.parameters
    return {name: settings.get(name) for name in settings.names()}


def migrate_set_parameters(context: Context, **values: Any) -> None:
    """Set migration parameters."""
    context.migration.parameters.update(
        {name.replace("_", "-"): value for name, value in values.items()}
    )


def query_migrate_capabilities(context: Context) -> list[dict[str, Any]]:
    """Return all migration capabilities."""
    capabilities = context.migration.capabilities
    return [{"state": capabilities.get(name), "capability": name} for name in capabilities.names()]


def migrate_set_capabilities(context: Context, capabilities: list[Any]) -> None:
    """Switch migration capabilities on or off."""
    wanted = {}
    for entry in capabilities:
        if not isinstance(entry, dict) or entry.keys() != {"capability", "state"}:
            raise CommandError("Parameter 'capabilities' takes {capability, state} objects")
        Argument("capability", "string", "").check(entry["capability"])
        Argument("state", "boolean", "").check(entry["state"])
        wanted[entry["capability"]] = entry["state"]
    context.migration.capabilities.update(wanted)


def migrate_continue(context: Context, state: str) -> None:
    """Go on with a migration that waits before the switchover; an update never does."""
    found = context.migration.status
    raise CommandError(f"Migration not in expected state: {found or 'none'}")


def migrate_pause(context: Context) -> None:
    """Pause a postcopy migration, which an update never is."""
    raise CommandError(
        "migrate-pause is currently only supported during postcopy-active or postcopy-recover state"
    )


def _shape(value: object) -> Shape:
    if isinstance(value, bool):
        return "bool"
    if isinstance(value, int):
        return "int"
    return ["str"] if isinstance(value, list) else "str"


_CAPABILITY: Shape = {"capability": tuple(Capabilities(set()).names()), "state": "bool"}
_DEFAULTS = parameters()
_PARAMETERS: dict[str, Shape] = {
    name: _DEFAULTS.words(name)
    if isinstance(_DEFAULTS.get(name), str) and _DEFAULTS.words(name)
    else _shape(_DEFAULTS.get(name))
    for name in _DEFAULTS.names()
}
_INFO: Shape = {
    "*status": STATUSES,
    "*total-time": "int",
    "*setup-time": "int",
    "*downtime": "int",
    "*phases": {f"*{step}": "number" for step in STEPS},
    "*running": "bool",
    "*fallback": "str",
    "*cpu-pauses": [{"cpu": "int", "move-us": "number", "takeover-us": "number"}],
    "*device-stall": "number",
    "*refault": {"pages": "int", "huge": "int", "ms": "number"},
    "*timeline": [{"name": "str", "*cpu": "int", "begin-us": "number", "end-us": "number"}],
    "*error-desc": "str",
    "*error-where": "str",
    "*note": "str",
    "*blocked-reasons": ["str"],
}

COMMANDS = (
    Command(
        "migrate",
        migrate,
        Argument("uri", "string", "where the state goes, e.g. file:vm.state", optional=True),
        Argument("channels", "array", "the same as one MigrationChannel", optional=True),
        Argument("detach", "boolean", "has no meaning any more", optional=True),
        Argument("resume", "boolean", "resume a paused postcopy migration", optional=True),
    ),
    Command(
        "update",
        update,
        Argument(
            "command",
            "array",
            "another pyvmm run command, word by word",
            optional=True,
            shape=["str"],
        ),
    ),
    Command(
        "migrate-incoming",
        migrate_incoming,
        Argument("uri", "string", "where it comes from", optional=True),
        Argument("channels", "array", "the same as one MigrationChannel", optional=True),
        Argument("exit-on-error", "boolean", "has no meaning: one may try again", optional=True),
    ),
    Command("migrate_cancel", migrate_cancel, oob=True),
    Command(
        "migrate-continue",
        migrate_continue,
        Argument("state", "string", "the state to leave", shape=STATUSES),
    ),
    Command("migrate-pause", migrate_pause, oob=True),
    Command("query-migrate", query_migrate, returns=_INFO, oob=True),
    Command("query-migrate-parameters", query_migrate_parameters, returns=_PARAMETERS),
    Command(
        "migrate-set-parameters",
        migrate_set_parameters,
        *(
            Argument(name, "value", "see info migrate_parameters", optional=True, shape=shape)
            for name, shape in _PARAMETERS.items()
        ),
    ),
    Command("query-migrate-capabilities", query_migrate_capabilities, returns=[_CAPABILITY]),
    Command(
        "migrate-set-capabilities",
        migrate_set_capabilities,
        Argument("capabilities", "array", "objects {capability, state}", shape=[_CAPABILITY]),
    ),
)
