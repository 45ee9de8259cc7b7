"""QEMU's migration stream, version 3: what surrounds the sections.

The order in a file is: magic and version, configuration, the ``ram`` section (the blocks'
names and sizes; the pages themselves stay in memory), one full section per device, the end
mark, and a JSON description for tools, which the loader does not read. A stream is read as a
whole before anything of it is used, and refused with the path of what is wrong.
"""

from __future__ import annotations

import struct

from pyvmm.errors import VmStateError
from pyvmm.vmstate.cursor import Cursor
from pyvmm.vmstate.fields import Description, Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from pyvmm.vmstate.section import Key, Section

MAGIC = 0x5145564D  # "QEVM"
VERSION = 3
MAX_SIZE = 64 << 20  # no machine's device state comes near; decides what is read at most

EOF = 0x00
SECTION_START = 0x01
SECTION_END = 0x03
SECTION_FULL = 0x04
VMDESCRIPTION = 0x06
CONFIGURATION = 0x07
COMMAND = 0x08
FOOTER = 0x7E

COMMAND_SWITCHOVER_START = 0x0B
RAM_NAME = "ram"
RAM_VERSION = 4
RAM_SECTION_ID = 1
RAM_FLAG_MEM_SIZE = 0x04
RAM_FLAG_EOS = 0x10
PAGE_SIZE = 4096
MAX_BLOCKS = 256

#: name and size in bytes of each RAM block
Blocks = list[tuple[str, int]]


class Loaded:
    """A stream that was read, and of which nothing is applied yet.

    :ivar machine: the machine type it was written by
    :ivar blocks: the RAM blocks that the guest has
    :ivar records: decoded state by section
    :ivar spelled: how the stream calls a section that has a former name there
    :ivar is_described: whether something follows the end mark, which is not looked at
    """

    __slots__ = ("blocks", "is_described", "machine", "records", "spelled")

    def __init__(self, machine: str) -> None:
        self.machine = machine
        self.blocks: Blocks = []
        self.records: dict[Key, Record] = {}
        self.spelled: dict[Key, Key] = {}
        self.is_described = False


class Writer:
    """Builds a stream in memory; :meth:`finish` gives it.

    :param machine: machine type, for the configuration section
    :param blocks: the guest's RAM blocks
    :param former: call sections as images before do, one of which will read it
    """

    def __init__(self, machine: str, blocks: Blocks, *, former: bool = False) -> None:
        self._former = former
        self._out = bytearray(struct.pack(">II", MAGIC, VERSION))
        self._next_id = RAM_SECTION_ID + 1
        name = machine.encode()
        self._out += struct.pack(">BI", CONFIGURATION, len(name)) + name
        self._write_ram(blocks)

    def add(self, section: Section) -> None:
        """Save a device and append its section, unless that says that it is not needed.

        :raises VmStateError: if its state does not fit its description
        """
        if section.needed is not None and not section.needed():
            return
        key = section.former if self._former else section.key
        name = key[0].encode()
        description = section.description
        self._out += struct.pack(">BIB", SECTION_FULL, self._next_id, len(name)) + name
        self._out += struct.pack(">II", key[1], description.version)
        description.save(self._out, section.save())
        self._footer(self._next_id)
        self._next_id += 1

    def finish(self) -> bytes:
        """Return the stream, all that a loader needs; :func:`describe` gives what tools want."""
        self._out.append(EOF)
        return bytes(self._out)

    def _write_ram(self, blocks: Blocks) -> None:
        total = sum(size for _, size in blocks)
        name = RAM_NAME.encode()
        self._out += struct.pack(">BIB", SECTION_START, RAM_SECTION_ID, len(name)) + name
        self._out += struct.pack(">IIQ", 0, RAM_VERSION, total | RAM_FLAG_MEM_SIZE)
        for block, size in blocks:
            raw = block.encode()
            self._out += struct.pack(">B", len(raw)) + raw + struct.pack(">Q", size)
        self._out += struct.pack(">Q", RAM_FLAG_EOS)
        self._footer(RAM_SECTION_ID)
        self._out += struct.pack(">BHH", COMMAND, COMMAND_SWITCHOVER_START, 0)
        self._out += struct.pack(">BIQ", SECTION_END, RAM_SECTION_ID, RAM_FLAG_EOS)
        self._footer(RAM_SECTION_ID)

    def _footer(self, section_id: int) -> None:
        self._out += struct.pack(">BI", FOOTER, section_id)


def describe(loaded: Loaded, descriptions: Mapping[Key, Description]) -> bytes:
    """Return what may follow the end mark: JSON that explains the sections' bytes, for tools.

    Whoever has loaded a stream has the time to write this, whoever saves one has not.

    :param descriptions: by section name and instance, of all sections in the stream
    """
    import json

    configuration = [
        {"name": "len", "type": "uint32", "size": 4},
        {"name": "name", "type": "buffer", "size": len(loaded.machine)},
    ]
    devices = []
    for key, record in loaded.records.items():
        name, instance = loaded.spelled.get(key, key)
        devices.append({"name": name, "instance_id": instance} | descriptions[key].describe(record))
    whole = {
        "configuration": {"vmsd_name": "configuration", "version": 1, "fields": configuration},
        "page_size": PAGE_SIZE,
        "devices": devices,
    }
    text = json.dumps(whole).encode()
    # Tools look for the text's opening brace from behind, so its length must not contain one.
    while ord("{") in struct.pack(">I", len(text)):
        text += b" "
    return struct.pack(">BI", VMDESCRIPTION, len(text)) + text


def read(
    data: bytes,
    descriptions: Mapping[Key, Description],
    machine: str | None = None,
    former: Mapping[Key, Key] | None = None,
) -> Loaded:
    """Read a stream as a whole and return what it holds.

    :param descriptions: of the sections that there may be
    :param machine: the machine type that it must come from; None for any
    :param former: from what images before call a section to what it is called
    :raises VmStateError: with the path of what is wrong; nothing was changed
    """
    source = Cursor(data)
    loaded = read_header(source, machine)
    ram_id, ram_done = -1, False
    while (kind := source.u8()) != EOF:
        if kind == SECTION_START:
            section_id = ram_id = source.u32()
            _expect_ram(source, source.string())
            read_blocks(source, loaded)
        elif kind == SECTION_END:
            section_id = source.u32()
            if section_id != ram_id or ram_done:
                raise source.error(f"section {section_id} ends, but is not open")
            if source.u64() != RAM_FLAG_EOS:
                raise source.error("RAM pages in the stream are not supported")
            ram_done = True
        elif kind == SECTION_FULL:
            section_id = source.u32()
            _read_section(source, loaded, descriptions, former or {})
        elif kind == COMMAND:
            command, size = source.u16(), source.u16()
            if (command, size) != (COMMAND_SWITCHOVER_START, 0):
                raise source.error(f"command {command:#x} is not supported")
            continue
        else:
            raise source.error(f"no section begins with {kind:#x}")
        if source.u8() != FOOTER or source.u32() != section_id:
            raise source.error(f"section {section_id} does not end where it should")
    if not ram_done:
        raise VmStateError("", "the stream has no RAM section")
    loaded.is_described = source.at < len(data)
    return loaded


def apply(loaded: Loaded, sections: Iterable[Section]) -> None:
    """Give each device its record, in the order of ``sections``.

    :raises VmStateError: before anything is changed, if a device has no record
    """
    order = [one for one in sections if one.needed is None or one.key in loaded.records]
    for section in order:
        if section.key not in loaded.records:
            raise VmStateError("", f"the stream has no section {section.name}[{section.instance}]")
    for section in order:
        section.load(loaded.records[section.key])


def read_header(source: Cursor, machine: str | None) -> Loaded:
    """Read up to the first section; return the machine's type as a :class:`Loaded` to be filled."""
    if source.u32() != MAGIC:
        raise source.error("not a migration stream (bad magic)")
    version = source.u32()
    if version != VERSION:
        raise source.error(f"unsupported migration stream version {version}")
    if source.u8() != CONFIGURATION:
        raise source.error("the configuration section is missing")
    size = source.u32()
    if size > 255:
        raise source.error(f"a machine name of {size} bytes")
    raw = source.take(size)
    if not raw.isascii():
        raise source.error(f"machine name is not ASCII: {raw!r}")
    name = raw.decode("ascii")
    if machine is not None and name != machine:
        raise source.error(f"Machine type received is '{name}' and local is '{machine}'")
    return Loaded(name)


def _expect_ram(source: Cursor, name: str) -> None:
    instance, version = source.u32(), source.u32()
    if (name, instance, version) != (RAM_NAME, 0, RAM_VERSION):
        raise source.error(f"section {name}[{instance}] version {version} is not supported")


def read_blocks(source: Cursor, loaded: Loaded) -> None:
    """Read the payload of the RAM section into ``loaded.blocks``."""
    source.path.append(RAM_NAME)
    if loaded.blocks:
        raise source.error("the RAM section is there twice")
    total = source.u64()
    if total % PAGE_SIZE != RAM_FLAG_MEM_SIZE:
        raise source.error("the list of RAM blocks is missing")
    total -= RAM_FLAG_MEM_SIZE
    while total > 0:
        name, size = source.string(), source.u64()
        if not 0 < size <= total or size % PAGE_SIZE or len(loaded.blocks) >= MAX_BLOCKS:
            raise source.error(f"block {name} of {size} bytes does not fit the total")
        loaded.blocks.append((name, size))
        total -= size
    if source.u64() != RAM_FLAG_EOS:
        raise source.error("RAM pages in the stream are not supported")
    source.path.pop()


def _read_section(
    source: Cursor,
    loaded: Loaded,
    descriptions: Mapping[Key, Description],
    former: Mapping[Key, Key],
) -> None:
    name = source.string()
    spelled, version = (name, source.u32()), source.u32()
    source.path.append(f"{name}[{spelled[1]}]")
    key = former.get(spelled, spelled)
    if key in loaded.records:
        raise source.error("the section is there twice")
    description = descriptions.get(key)
    if description is None:
        raise source.error("this machine has no such device")
    if key != spelled:
        loaded.spelled[key] = spelled
    loaded.records[key] = description.load(source, version)
    source.path.pop()
