"""Character devices: which there are, made and removed while the machine runs."""

from __future__ import annotations

from pyvmm.chardev.config import ChardevConfig, parse_chardev
from pyvmm.errors import CommandError
from pyvmm.monitor.registry import Argument, Command, Context

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

# QAPI's ChardevBackend: the members of ``data`` of each type, with their JSON types and the
# keys of -chardev. A + is a member that must be there.
_BACKENDS: dict[str, dict[str, tuple[str, str]]] = {
    "file": {"+out": ("string", "path"), "append": ("boolean", "append")},
    "socket": {
        "+addr": ("object", ""),
        "server": ("boolean", "server"),
        "wait": ("boolean", "wait"),
        "nodelay": ("boolean", "nodelay"),
        "reconnect": ("integer", "reconnect"),
    },
    "pty": {"path": ("string", "path")},
    "null": {},
    "ringbuf": {"size": ("integer", "size")},
    "stdio": {"signal": ("boolean", "signal")},
}
_ADDRESSES = {
    "unix": {"+path": ("string", "path")},
    "inet": {"+host": ("string", "host"), "+port": ("string", "port")},
}


def query_chardev(context: Context) -> list[dict[str, Any]]:
    """Return the character devices; ``dropped`` is how many bytes of output were lost."""
    return [
        {
            "label": label,
            "filename": chardev.filename,
            "frontend-open": chardev.frontend_open,
            **({"dropped": chardev.dropped} if chardev.dropped else {}),
        }
        for label, chardev in context.machine.chardevs.items()
    ]


def chardev_add(context: Context, id: str, backend: dict[str, Any]) -> dict[str, Any]:
    """Make a character device, which live updates keep; return the path of a pty."""
    kind, data = _union(backend, "backend", _BACKENDS)
    options = _members(data, "backend.data", _BACKENDS[kind])
    if kind == "socket":
        family, inner = _union(data["addr"], "backend.data.addr", _ADDRESSES)
        options |= _members(inner, "backend.data.addr.data", _ADDRESSES[family])
        options.setdefault("server", "on")
        if options["server"] == "on":
            # The machine runs: it waits for nobody unless that is asked for.
            options.setdefault("wait", "off")
    if context.machine.chardevs.get(id) is not None:
        raise CommandError(f"Chardev with id '{id}' already exists")
    if options.get("wait") == "on":
        raise CommandError("Parameter 'wait' is not possible while the machine runs")
    config = parse_chardev(ChardevConfig(kind, id, options, "chardev-add").line(), "chardev-add")
    chardev = context.machine.chardevs.add(config)
    if kind != "pty":
        return {}
    return {"pty": chardev.filename.removeprefix("pty:")}


def chardev_remove(context: Context, id: str) -> None:
    """Close a character device that nobody uses."""
    context.machine.chardevs.remove(id)


def _union(value: dict[str, Any], where: str, kinds: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Return type and data of a QAPI union."""
    found = _members(value, where, {"+type": ("string", "type"), "data": ("object", "")})
    kind = found["type"]
    if kind not in kinds:
        raise CommandError(f"Parameter '{where}.type' does not accept value '{kind}'")
    return kind, value.get("data", {})


def _members(
    value: dict[str, Any], where: str, wanted: dict[str, tuple[str, str]]
) -> dict[str, str]:
    """Return an object's members as keys and values of -chardev, which checks them further."""
    found = {}
    known = {name.lstrip("+"): how for name, how in wanted.items()}
    for name in value:
        if name not in known:
            raise CommandError(f"Parameter '{where}.{name}' is unexpected")
    for name, (type, key) in known.items():
        if name not in value:
            if f"+{name}" in wanted:
                raise CommandError(f"Parameter '{where}.{name}' is missing")
            continue
        member = value[name]
        Argument(f"{where}.{name}", type, "").check(member)
        if key:
            found[key] = {True: "on", False: "off"}[member] if type == "boolean" else str(member)
    return found


COMMANDS = (
    Command(
        "query-chardev",
        query_chardev,
        returns=[{"label": "str", "filename": "str", "frontend-open": "bool", "*dropped": "int"}],
    ),
    Command(
        "chardev-add",
        chardev_add,
        Argument("id", "string", "its name"),
        Argument(
            "backend",
            "object",
            "QAPI's ChardevBackend",
            shape={"type": tuple(_BACKENDS), "*data": "any"},
        ),
        returns={"*pty": "str"},
    ),
    Command("chardev-remove", chardev_remove, Argument("id", "string", "its name")),
)
