"""``pyvmm state diff``: two states, value by value."""

from __future__ import annotations

from collections.abc import Iterator
from fnmatch import fnmatchcase

from pyvmm.errors import VmStateError
from pyvmm.state.outline import Outline, Value
from pyvmm.state.show import keyed, text


def compare(a: bytes, b: bytes, ignore: list[str]) -> Iterator[str]:
    """Return a line for each value that is not the same in both.

    :param ignore: shell patterns of paths that are left out
    :raises VmStateError: if one of them is no whole state
    """
    left, right = flatten(a), flatten(b)
    for path in [*left, *(path for path in right if path not in left)]:
        if any(fnmatchcase(path, pattern.replace("[", "[[]")) for pattern in ignore):
            continue
        if path not in right:
            yield f"{path}: {text(left[path])} -> nothing"
        elif path not in left:
            yield f"{path}: nothing -> {text(right[path])}"
        elif left[path] != right[path]:
            yield f"{path}: {_change(left[path], right[path])}"


def flatten(data: bytes) -> dict[str, Value]:
    """Return every value of a state by its path, ``section[instance]/field/...``.

    :raises VmStateError: if it is no whole state
    """
    outline = Outline(data)
    if outline.problem:
        raise VmStateError("", outline.problem)
    found: dict[str, Value] = {"machine": outline.machine}
    found |= {f"ram/{name}": size for name, size in outline.blocks}
    for part in outline.parts:
        found[f"{part.key}/version"] = part.version
        _flatten(found, part.key, keyed(part.name, part.tree))
    return found


def _flatten(found: dict[str, Value], path: str, value: Value) -> None:
    if isinstance(value, dict):
        for name, item in value.items():
            _flatten(found, f"{path}/{name}", item)
    elif isinstance(value, list):
        for number, item in enumerate(value):
            _flatten(found, f"{path}[{number}]", item)
    else:
        found[path] = value


def _change(a: Value, b: Value) -> str:
    if not isinstance(a, bytes) or not isinstance(b, bytes):
        return f"{text(a)} -> {text(b)}"
    if len(a) != len(b):
        return f"{len(a)} bytes -> {len(b)} bytes"
    places = [at for at in range(len(a)) if a[at] != b[at]]
    start, end = places[0], min(places[-1] + 1, places[0] + 16)
    more = "" if end > places[-1] else "..."
    return (
        f"{len(places)} of {len(a)} bytes differ, from {start:#x} on: "
        f"{a[start:end].hex()}{more} -> {b[start:end].hex()}{more}"
    )
