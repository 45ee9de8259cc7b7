"""Migration and live update: parameters, capabilities, start, cancel, progress."""

from __future__ import annotations

from pyvmm.errors import CommandError
from pyvmm.migration.params import parameters
from pyvmm.monitor.registry import Argument, Command, Context

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


def migrate(
    context: Context,
    uri: str | None = None,
    detach: bool = True,
    resume: bool = False,
) -> None:
    """Start a migration or live update; returns as soon as it is under way."""
    if resume:
        raise CommandError("There is no paused postcopy migration to resume")
    if uri is None:
        raise CommandError("need either 'uri' or 'channels' argument")
    context.migration.start(uri, True, _ignore)


def _ignore(error: str | None) -> None:
    # query-migrate tells; the client has its answer already.
    del error


def update(context: Context, command: list[str] | None = None) -> None:
    """Update pyvmm in place, with its own command line or another; returns as soon as it is
    under way."""
    if command is not None and not all(isinstance(word, str) for word in command):
        raise CommandError("Invalid parameter type for 'command', expected: array of strings")
    context.migration.update(command, _ignore)


def migrate_incoming(context: Context, uri: str) -> None:
    """Load the state that -incoming defer waits for."""
    context.migration.incoming(uri)


def migrate_cancel(context: Context) -> None:
    """Cancel the migration under way, if any."""
    context.migration.cancel()


def query_migrate(context: Context) -> dict[str, Any]:
    """How the present or last migration stands."""
    found: dict[str, Any] = context.migration.info()
    return found


def query_migrate_parameters(context: Context) -> dict[str, Any]:
    """All migration parameters."""
    settings = context.migration.parameters
    return {name: settings.get(name) for name in settings.names()}


def migrate_set_parameters(context: Context, **values: Any) -> None:
    """Set migration parameters."""
    context.migration.parameters.update(
        {name.replace("_", "-"): value for name, value in values.items()}
    )


def query_migrate_capabilities(context: Context) -> list[dict[str, Any]]:
    """All migration capabilities."""
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


COMMANDS = (
    Command(
        "migrate",
        migrate,
        Argument("uri", "string", "where the state goes, e.g. file:vm.state", optional=True),
        Argument("detach", "boolean", "has no meaning any more", optional=True),
        Argument("resume", "boolean", "resume a paused postcopy migration", optional=True),
    ),
    Command(
        "update",
        update,
        Argument("command", "array", "another pyvmm run command, word by word", optional=True),
    ),
    Command("migrate-incoming", migrate_incoming, Argument("uri", "string", "where it comes from")),
    Command("migrate_cancel", migrate_cancel),
    Command("query-migrate", query_migrate),
    Command("query-migrate-parameters", query_migrate_parameters),
    Command(
        "migrate-set-parameters",
        migrate_set_parameters,
        *(
            Argument(name, "value", "see info migrate_parameters", optional=True)
            for name in parameters().names()
        ),
    ),
    Command("query-migrate-capabilities", query_migrate_capabilities),
    Command(
        "migrate-set-capabilities",
        migrate_set_capabilities,
        Argument("capabilities", "array", "objects {capability, state}"),
    ),
)
