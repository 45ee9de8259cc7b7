"""``pyvmm state show``: a state as a tree for people, or as JSON for programs."""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import Any

from pyvmm._util.sizes import format_size
from pyvmm.cpr import state as cpr_state
from pyvmm.errors import ConfigError
from pyvmm.state import registers
from pyvmm.state.outline import Outline, Tree, Value
from pyvmm.x86.vcpu_state import VCPU

FOLDED_BYTES = 16
FOLDED_ITEMS = 8


class Document:
    """Something to show.

    :ivar head: what it is, in a line
    :ivar facts: what a program wants to know of the whole
    :ivar trees: title and tree of each part; values as in ``outline.Value``, or text
    :ivar problem: why there is not more, or empty
    """

    def __init__(
        self, head: str, facts: dict[str, Any], trees: list[tuple[str, Tree]], problem: str = ""
    ) -> None:
        self.head = head
        self.facts = facts
        self.trees = trees
        self.problem = problem

    def lines(self, *, fold: bool) -> list[str]:
        """Return the lines of the text; ``fold`` shortens buffers and long arrays."""
        lines = [printable(self.head)]
        for title, tree in self.trees:
            lines.append(printable(title))
            _add_lines(lines, tree, 1, fold)
        return lines

    def as_json(self) -> dict[str, Any]:
        """Return JSON values; bytes are hexadecimal text."""
        return self.facts | ({"problem": self.problem} if self.problem else {})


def document(data: bytes, patterns: list[str]) -> Document:
    """Return what is in a file: a state, or the CPR state that an update hands over.

    :param patterns: the sections to show, all if there are none
    :raises VmStateError: if it is neither
    """
    if data[:4] == cpr_state.MAGIC.to_bytes(4, "big"):
        return _show_cpr(data)
    outline = Outline(data)
    parts = [
        part
        for part in outline.parts
        if not patterns or any(_fits(part.name, part.key, pattern) for pattern in patterns)
    ]
    if patterns and not parts:
        raise ConfigError(f"there is no section {' or '.join(patterns)} in it")
    described = "its own description" if outline.is_described else "what this build knows"
    head = f"state of a {outline.machine} machine, {len(data)} bytes, by {described}"
    facts = {
        "machine": outline.machine,
        "described": outline.is_described,
        "ram": [{"name": name, "size": size} for name, size in outline.blocks],
        "sections": [
            {
                "name": part.name,
                "instance": part.instance,
                "version": part.version,
                "fields": _plain(part.tree),
            }
            for part in parts
        ],
    }
    trees: list[tuple[str, Tree]] = []
    if not patterns:
        trees.append(("ram", {name: format_size(size) for name, size in outline.blocks}))
    trees += [
        (f"{part.key} version {part.version}", explain(part.name, part.tree)) for part in parts
    ]
    return Document(head, facts, trees, outline.problem)


def explain(name: str, tree: Tree) -> Tree:
    """Return a section's tree with what a person wants to see instead of the kernel's buffers."""
    if name != VCPU.name:
        return tree
    tree = keyed(name, tree)
    for key, decode in (("xsave", registers.xsave), ("lapic", registers.lapic)):
        found = decode(tree[key]) if isinstance(tree.get(key), bytes) else {}
        if found:
            # Most registers are as they were at power-on, most bits clear.
            tree[key] = {"raw": tree[key]} | {at: value for at, value in found.items() if value}
    return tree


def keyed(name: str, tree: Tree) -> Tree:
    """Return a section's tree with a vCPU's MSRs by name instead of by place."""
    msrs = tree.get("msrs")
    if name != VCPU.name or not isinstance(msrs, list):
        return tree
    try:
        return tree | {"msrs": {registers.msr_name(msr["index"]): msr["data"] for msr in msrs}}
    except (KeyError, TypeError, ValueError):
        return tree


def text(value: Value, *, fold: bool = True) -> str:
    """Return the text of one value that is no struct."""
    if isinstance(value, (str, bool)):
        return str(value)
    if isinstance(value, int):
        return f"{value:#x}" if value > 9 else str(value)
    if isinstance(value, bytes):
        return _bytes_text(value, fold)
    shown = value[:FOLDED_ITEMS] if fold else value
    items = " ".join(text(item, fold=fold) for item in shown)
    more = f" ... ({len(value)} in all)" if len(shown) < len(value) else ""
    return f"[{items}{more}]"


def printable(name: str) -> str:
    """Return text with control characters escaped: it may be a file's, and terminals obey them."""
    return "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in name)


def _bytes_text(value: bytes, fold: bool) -> str:
    name = value.rstrip(b"\0")
    if len(name) > 1 and name.isascii() and name.decode("ascii").isprintable():
        return f'"{name.decode("ascii")}"'
    if not fold or len(value) <= FOLDED_BYTES:
        return value.hex() or "empty"
    if not any(value):
        return f"{len(value)} bytes, all 0"
    return f"{len(value)} bytes, {value[:FOLDED_BYTES].hex()}..."


def _add_lines(lines: list[str], tree: Tree, depth: int, fold: bool) -> None:
    for name, value in tree.items():
        _add_value(lines, printable(name), value, depth, fold)


def _add_value(lines: list[str], name: str, value: Value, depth: int, fold: bool) -> None:
    indent = "  " * depth
    if isinstance(value, dict):
        if _is_flat(value):
            inner = " ".join(f"{printable(k)}={text(v, fold=fold)}" for k, v in value.items())
            if len(indent) + len(name) + len(inner) < 98:
                lines.append(f"{indent}{name}: {inner}")
                return
        lines.append(f"{indent}{name}")
        _add_lines(lines, value, depth + 1, fold)
    elif isinstance(value, list) and any(isinstance(item, (dict, list)) for item in value):
        shown = value[:FOLDED_ITEMS] if fold else value
        for number, item in enumerate(shown):
            _add_value(lines, f"{name}[{number}]", item, depth, fold)
        if len(shown) < len(value):
            lines.append(f"{indent}{name}: {len(value) - len(shown)} more (--all shows them)")
    else:
        lines.append(f"{indent}{name}: {printable(text(value, fold=fold))}")


def _is_flat(tree: Tree) -> bool:
    return not any(isinstance(value, (dict, list, bytes)) for value in tree.values())


def _fits(name: str, key: str, pattern: str) -> bool:
    # Brackets are part of a name here, so they are no pattern.
    pattern = pattern.replace("[", "[[]")
    return fnmatchcase(key, pattern) or fnmatchcase(name, pattern)


def _plain(value: Value) -> Any:
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return value.hex() if isinstance(value, bytes) else value


def _show_cpr(data: bytes) -> Document:
    state = cpr_state.decode(data)
    fds: Tree = {f"{name}[{index}]": fd for (name, index), fd in state.fds.items()}
    facts = {"descriptors": fds, "values": _plain(state.values)}
    trees = [("descriptors", fds), ("values", dict(state.values))]
    return Document(f"CPR state, {len(data)} bytes", facts, trees)
