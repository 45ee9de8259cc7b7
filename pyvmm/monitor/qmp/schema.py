"""``query-qmp-schema``: the registry's metadata in QEMU's introspection form (SchemaInfo).

As there, commands and events go by their names, and the types that they refer to, but for the
built-in ones, by numbers and ``[ELEMENT]``, which mean nothing to a client.
"""

from __future__ import annotations

from pyvmm.migration.status import STATUSES

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import Any

    from pyvmm.monitor.registry import Command, Shape

_BUILTINS = {
    "str": "string",
    "int": "int",
    "number": "number",
    "bool": "boolean",
    "null": "null",
    "any": "value",
}
_BY_TYPE: dict[str, Shape] = {
    "string": "str",
    "integer": "int",
    "boolean": "bool",
    "object": {},
    "array": ["any"],
    "value": "any",
}

_ENDED: Shape = {
    "guest": "bool",
    "reason": (
        *("none", "host-error", "host-qmp-quit", "host-qmp-system-reset", "host-signal"),
        *("host-ui", "guest-shutdown", "guest-reset", "guest-panic"),
    ),
}
#: The events and their data.
EVENTS: dict[str, Shape] = {
    "STOP": {},
    "RESUME": {},
    "POWERDOWN": {},
    "RESET": _ENDED,
    "SHUTDOWN": _ENDED,
    "GUEST_PANICKED": {"action": ("pause", "poweroff", "run")},
    "BLOCK_IO_ERROR": {
        "qom-path": "str",
        "device": "str",
        "*node-name": "str",
        "operation": ("read", "write"),
        "action": ("report",),
        "*nospace": "bool",
        "reason": "str",
    },
    "MIGRATION": {"status": STATUSES, "*error-desc": "str", "*error-where": "str"},
    "MIGRATION_PASS": {"pass": "int"},
}


def describe(commands: Iterable[Command]) -> list[dict[str, Any]]:
    """Return the SchemaInfo of all commands and events, and of every type they refer to."""
    types = _Types()
    entries = []
    for command in commands:
        arguments: Shape = {
            "*" * argument.optional + argument.name: argument.shape
            for argument in command.arguments
        }
        entry: dict[str, Any] = {
            "name": command.name,
            "meta-type": "command",
            "arg-type": types.name(arguments),
            "ret-type": types.name(command.returns),
        }
        if command.oob:
            entry["allow-oob"] = True
        entries.append(entry)
    for name, data in EVENTS.items():
        entries.append({"name": name, "meta-type": "event", "arg-type": types.name(data)})
    return [*entries, *types.entries]


class _Types:
    """The types so far, each once."""

    def __init__(self) -> None:
        self.entries: list[dict[str, Any]] = [
            {"name": name, "meta-type": "builtin", "json-type": json}
            for name, json in _BUILTINS.items()
        ]
        self._known = {name: name for name in _BUILTINS}
        self._number = 0

    def name(self, shape: Shape) -> str:
        """Return the name of a type, which is described first if need be."""
        if isinstance(shape, str):
            shape = _BY_TYPE.get(shape, shape)
        key = shape if isinstance(shape, str) else repr(shape)
        if key not in self._known:
            self._known[key] = self._add(shape)
        return self._known[key]

    def _add(self, shape: Shape) -> str:
        assert not isinstance(shape, str), f"{shape} is no type"
        if isinstance(shape, list):
            element = self.name(shape[0])
            return self._put(f"[{element}]", "array", {"element-type": element})
        self._number += 1
        name = str(self._number - 1)
        if isinstance(shape, tuple):
            members = [{"name": word} for word in shape]
            return self._put(name, "enum", {"members": members, "values": list(shape)})
        described = []
        for member, inner in shape.items():
            entry: dict[str, Any] = {"name": member.lstrip("*"), "type": self.name(inner)}
            if member.startswith("*"):
                entry["default"] = None
            described.append(entry)
        return self._put(name, "object", {"members": described})

    def _put(self, name: str, kind: str, rest: dict[str, Any]) -> str:
        self.entries.append({"name": name, "meta-type": kind, **rest})
        return name
