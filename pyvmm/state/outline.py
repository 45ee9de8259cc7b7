"""A state stream as sections and values, read with what it says of itself.

Unlike the loader (``vmstate.stream``) this goes on wherever it can: a section is decoded by
the stream's JSON description, failing that by this build's own, failing that it is bytes up
to its footer. Both descriptions and streams may come from anybody.
"""

from __future__ import annotations

import json
from typing import Any

from pyvmm.errors import VmStateError
from pyvmm.machine import shape
from pyvmm.machine.config import MachineConfig
from pyvmm.migration import savevm
from pyvmm.vmstate import stream
from pyvmm.vmstate.cursor import Cursor
from pyvmm.vmstate.fields import SUBSECTION, Description

#: int, bool or bytes; a list of values; or a dict of them by field name
Value = Any
Tree = dict[str, Value]

MAX_JSON = 10 << 20
MAX_VALUES = 1 << 20
MAX_PARTS = 1 << 12
MAX_DEPTH = 32

# What may come behind a section's footer.
_AFTER_FOOTER = {
    stream.EOF,
    stream.SECTION_START,
    stream.SECTION_END,
    stream.SECTION_FULL,
    stream.COMMAND,
}


class Part:
    """One device's section.

    :ivar start: where its payload begins
    :ivar end: and ends, in the stream
    :ivar tree: the values; a lone ``data`` of bytes if nothing describes them
    """

    __slots__ = ("end", "instance", "name", "start", "tree", "version")

    def __init__(self, name: str, instance: int, version: int, start: int) -> None:
        self.name = name
        self.instance = instance
        self.version = version
        self.start = self.end = start
        self.tree: Tree = {}

    @property
    def device(self) -> str:
        """The name of the device, without its place."""
        return self.name.rpartition("/")[2]

    @property
    def key(self) -> str:
        """How it is called: ``serial[0]``."""
        return f"{self.name}[{self.instance}]"


class Outline:
    """A stream.

    :ivar machine: machine type
    :ivar is_described: whether it has a JSON description
    :ivar blocks: name and size in bytes of each RAM block
    :ivar parts: the devices' sections, in the order of the stream
    :ivar problem: what ended the walk before the stream's end, or empty
    """

    def __init__(self, data: bytes) -> None:
        """Walk the stream.

        :raises VmStateError: if it is none
        """
        described = find_description(data)
        self.is_described = described is not None
        self._described = described or {}
        devices = self._described.get("devices")
        self._devices = {
            (str(device.get("name")), str(device.get("instance_id"))): device
            for device in (devices if isinstance(devices, list) else ())
            if isinstance(device, dict)
        }
        self._known = known()
        self._budget = [MAX_VALUES]
        source = Cursor(data)
        self._loaded = stream.read_header(source, None)
        self.machine = self._loaded.machine
        self.parts: list[Part] = []
        self.problem = ""
        try:
            self._walk(source)
        except VmStateError as error:
            self.problem = str(error)

    @property
    def blocks(self) -> stream.Blocks:
        """Name and size in bytes of each RAM block."""
        return self._loaded.blocks

    def _walk(self, source: Cursor) -> None:
        configuration = self._described.get("configuration")
        if isinstance(configuration, dict):
            Decoder(source, self._budget).subsections(configuration, 0)
        while (kind := source.u8()) != stream.EOF:
            if kind == stream.COMMAND:
                source.u16()
                source.take(source.u16())
                continue
            if kind not in _AFTER_FOOTER:
                raise source.error(f"no section begins with {kind:#x}")
            section_id = source.u32()
            if kind == stream.SECTION_END:
                source.u64()
            else:
                part = Part(source.string(), source.u32(), source.u32(), source.at)
                if kind == stream.SECTION_FULL:
                    if len(self.parts) == MAX_PARTS:
                        raise source.error(f"more than {MAX_PARTS} sections")
                    self.parts.append(part)
                    self._read_part(source, part, section_id)
                elif part.name == stream.RAM_NAME:
                    stream.read_blocks(source, self._loaded)
                else:
                    raise source.error(f"section {part.key} is not known")
            if source.u8() != stream.FOOTER or source.u32() != section_id:
                raise source.error(f"section {section_id} does not end where it should")

    def _read_part(self, source: Cursor, part: Part, section_id: int) -> None:
        own = self._describe(source.data, part)
        for described in (self._devices.get((part.name, str(part.instance))), own):
            if described is None:
                continue
            attempt = Cursor(source.data, part.start)
            try:
                tree = Decoder(attempt, self._budget).struct(described)
                if source.data[attempt.at : attempt.at + 5] != _footer(section_id):
                    continue
            except VmStateError:
                continue
            part.tree, source.at = tree, attempt.at
            part.end = attempt.at
            return
        end = part.start
        while (end := source.data.find(_footer(section_id), end)) >= 0:
            if source.data[end + 5 : end + 6] in map(_byte, _AFTER_FOOTER):
                break
            end += 1
        if end < 0:
            raise VmStateError(part.key, "no end of the section found")
        part.tree = {"data": source.data[part.start : end]}
        source.at = part.end = end

    def _describe(self, data: bytes, part: Part) -> dict[str, Any] | None:
        description = self._known.get(part.device)
        try:
            if description is not None:
                record = description.load(Cursor(data, part.start), part.version)
                return description.describe(record)
        except VmStateError:
            pass
        return None


class Decoder:
    """Decodes values as a JSON description tells, which need not make sense.

    :param source: where the values are; stands behind them afterwards
    :param budget: how many values may still be made, in a list of one
    """

    def __init__(self, source: Cursor, budget: list[int]) -> None:
        self._source = source
        self._budget = budget

    def struct(self, described: dict[str, Any], depth: int = 0) -> Tree:
        """Return fields and subsections by name.

        :raises VmStateError: if the description makes no sense, or not for these bytes
        """
        fields = described.get("fields")
        if not isinstance(fields, list) or depth > MAX_DEPTH:
            raise self._source.error("the description has no fields")
        tree: Tree = {}
        for field in fields:
            if not isinstance(field, dict) or not isinstance(field.get("name"), str):
                raise self._source.error("the description has a field without a name")
            name = field["name"]
            if "array_len" in field or "index" in field:
                items = tree.setdefault(name, [])
                if not isinstance(items, list):
                    raise self._source.error(f"the description has {name} once and as an array")
                count = _size(self._source, field, "array_len") if "array_len" in field else 1
                items.extend(self._value(field, depth) for _ in range(count))
            else:
                tree[f"{name}#{len(tree)}" if name in tree else name] = self._value(field, depth)
        return tree | self.subsections(described, depth)

    def subsections(self, described: dict[str, Any], depth: int) -> Tree:
        """Return the subsections by name; all those that are described must be there."""
        tree: Tree = {}
        parts = described.get("subsections", [])
        for part in parts if isinstance(parts, list) else ():
            name = part.get("vmsd_name") if isinstance(part, dict) else None
            if self._source.u8() != SUBSECTION or self._source.string() != name:
                raise self._source.error(f"subsection {name} is missing")
            self._source.u32()
            tree[name] = self.struct(part, depth + 1)
        return tree

    def _value(self, field: dict[str, Any], depth: int) -> Value:
        self._budget[0] -= 1
        if self._budget[0] < 0:
            raise self._source.error("the description asks for too many values")
        kind = field.get("type")
        if kind == "struct":
            inner = field.get("struct")
            return self.struct(inner if isinstance(inner, dict) else {}, depth + 1)
        raw = self._source.take(_size(self._source, field, "size"))
        if kind == "bool" and len(raw) == 1:
            return raw != b"\0"
        if str(kind).startswith(("int", "uint", "timer")) and len(raw) in (1, 2, 4, 8):
            return int.from_bytes(raw, "big", signed=not str(kind).startswith("uint"))
        return raw


def find_description(data: bytes) -> dict[str, Any] | None:
    """Return the JSON description at the end of a stream, None if there is none that can be read.

    It is found as other tools find it: behind the last NUL, from the first brace on.
    """
    at = data.find(b"{", data.rfind(b"\0", max(len(data) - MAX_JSON, 0)) + 1)
    if at < 5 or data[at - 5] != stream.VMDESCRIPTION:
        return None
    size = int.from_bytes(data[at - 4 : at], "big")
    try:
        found = json.loads(data[at : at + size])
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def known() -> dict[str, Description]:
    """Return this build's own descriptions, by section name."""
    config = MachineConfig()
    config.serials = [None]
    sections = shape.descriptions(config) | shape.optional_descriptions()
    own = {name: found for (name, _), found in sections.items()}
    return own | {savevm.GLOBALSTATE.name: savevm.GLOBALSTATE}


def _size(source: Cursor, field: dict[str, Any], key: str) -> int:
    size = field.get(key)
    # No value is larger than the stream, and an array of empty values is none.
    if type(size) is not int or not 0 <= size <= len(source.data):
        raise source.error(f"the description has a field of {key} {size!r}")
    return size


def _footer(section_id: int) -> bytes:
    return bytes((stream.FOOTER,)) + section_id.to_bytes(4, "big")


def _byte(value: int) -> bytes:
    return bytes((value,))
