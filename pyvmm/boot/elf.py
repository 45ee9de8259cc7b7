"""Reads ELF executables for x86: headers, loadable segments and notes (System V gABI, chapter 5).

Both classes, little-endian, ET_EXEC only; sections, symbols and relocation are left out. The file
is hostile: every table is capped before it is read and every loop is bounded by a cap.
"""

from __future__ import annotations

import struct

from pyvmm.boot.blob import Blob

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

MAGIC = b"\x7fELF"

_EHDR32 = struct.Struct("<HHIIIIIHHHHHH")
_EHDR64 = struct.Struct("<HHIQQQIHHHHHH")
_PHDR32 = struct.Struct("<IIIIIIII")
_PHDR64 = struct.Struct("<IIQQQQQQ")
_NHDR = struct.Struct("<III")
_IDENT_SIZE = 16
_ET_EXEC = 2
_TYPES = {
    1: "an object file (ELF) that is not linked",
    3: "a shared object or a position-independent program (ELF)",
    4: "a core dump (ELF)",
}
_EM_386 = 3
_EM_X86_64 = 62
_MACHINES = {
    8: "MIPS", 20: "PowerPC", 21: "64-bit PowerPC", 22: "s390", 40: "32-bit Arm", 50: "Itanium",
    183: "64-bit Arm", 243: "RISC-V", 247: "BPF", 258: "LoongArch",
}  # fmt: skip
_PT_LOAD = 1
_PT_INTERP = 3
_PT_NOTE = 4
_PHNUM_MAX = 256  # Linux has 5; PN_XNUM (65535) would move the number to a section
_NOTES_MAX = 64 << 10
_HEADERS_MAX = 1 << 20


class Segment:
    """One PT_LOAD or PT_NOTE entry; addresses and sizes in bytes."""

    __slots__ = ("file_size", "mem_size", "offset", "paddr", "vaddr")

    def __init__(self, offset: int, vaddr: int, paddr: int, file_size: int, mem_size: int) -> None:
        self.offset = offset
        self.vaddr = vaddr
        self.paddr = paddr
        self.file_size = file_size
        self.mem_size = mem_size

    @property
    def end(self) -> int:
        """Where it ends in the file."""
        return self.offset + self.file_size

    def cut(self, size: int) -> None:
        """Take *size* bytes from the front."""
        self.offset += size
        self.vaddr += size
        self.paddr += size
        self.file_size = max(self.file_size - size, 0)
        self.mem_size -= size


class Elf:
    """The parts of an executable that a boot loader needs.

    ``is_64`` tells the class; ``entry`` is e_entry as it stands in the header; ``loads`` has the
    PT_LOAD segments with memory, by rising physical address, each within the file and none over
    another; ``has_interpreter`` whether it is a program that asks for a dynamic linker.

    :raises ConfigError: the file is not such an executable
    """

    __slots__ = ("_blob", "_headers_end", "_notes", "entry", "has_interpreter", "is_64", "loads")

    def __init__(self, blob: Blob) -> None:
        self._blob = blob
        ident = blob.read(0, _IDENT_SIZE)
        if ident[:4] != MAGIC:
            raise blob.error("not an ELF file")
        if ident[4] not in (1, 2) or ident[5] not in (1, 2):
            raise blob.error("an ELF file of neither 32 nor 64 bits; it is damaged")
        if ident[5] == 2:
            machine = int.from_bytes(blob.read(_IDENT_SIZE + 2, 2), "big")
            raise blob.error(f"{_machine(machine)}, big-endian; give an x86 kernel")
        self.is_64 = wide = ident[4] == 2
        ehdr, phdr = (_EHDR64, _PHDR64) if wide else (_EHDR32, _PHDR32)
        fields = ehdr.unpack(blob.read(_IDENT_SIZE, ehdr.size))
        kind, machine, _, self.entry, phoff, _, _, _, phentsize, phnum = fields[:10]
        if machine != _EM_X86_64 and (wide or machine != _EM_386):
            raise blob.error(f"{_machine(machine)}, not x86; give an x86 kernel")
        if kind != _ET_EXEC:
            what = _TYPES.get(kind, f"ELF of type {kind}")
            raise blob.error(f"{what}, not an executable; give a linked, fixed kernel")
        if phentsize != phdr.size or not 0 < phnum <= _PHNUM_MAX or not phoff:
            raise blob.error("ELF without a usable program header table; give a linked kernel")
        self.loads: list[Segment] = []
        self.has_interpreter = False
        self._headers_end: int = phoff + phnum * phdr.size
        self._notes: list[Segment] = []
        for entry in phdr.iter_unpack(blob.read(phoff, phnum * phdr.size)):
            if wide:
                type_, _, offset, vaddr, paddr, file_size, mem_size, _ = entry
            else:
                type_, offset, vaddr, paddr, file_size, mem_size, _, _ = entry
            segment = Segment(offset, vaddr, paddr, file_size, mem_size)
            if type_ == _PT_INTERP:
                self.has_interpreter = True
            elif type_ == _PT_NOTE:
                self._notes.append(segment)
            elif type_ == _PT_LOAD and mem_size:
                self._check(segment)
                self.loads.append(segment)
        self.loads.sort(key=lambda segment: segment.paddr)
        if not self.loads:
            raise blob.error("ELF without anything to load; give a linked kernel")
        for before, after in zip(self.loads, self.loads[1:], strict=False):
            if before.paddr + before.mem_size > after.paddr:
                raise blob.error(f"ELF segments overlap at {after.paddr:#x}; link the kernel anew")

    def physical(self, address: int) -> int:
        """Return the physical address of *address*, which may be virtual (as e_entry often is)."""
        for each in self.loads:
            if each.vaddr <= address < each.vaddr + each.mem_size:
                return address - each.vaddr + each.paddr
        return address

    @property
    def file_end(self) -> int:
        """How many bytes of the file a loader has a use for, from its start."""
        return max(self._headers_end, *(each.end for each in (*self.loads, *self._notes)))

    def find_note(self, name: bytes, type_: int | None = None) -> bytes | None:
        """Return the description of the first note of that *name*, with its NUL, and type; any
        type if that is None. Return None if there is no such note.

        Names are looked for at each multiple of 4 and the chain of sizes is not followed: where
        the next note begins depends on padding to 4 or to 8, and linkers join notes of both into
        one segment, whose p_align then holds for some of them only. (Behind a name of 4 bytes the
        description begins at the same place either way; behind others 4 is taken for granted.)
        """
        for data in self._note_data():
            at = data.find(name, _NHDR.size)
            while at >= 0:
                name_size, size, found = _NHDR.unpack_from(data, at - _NHDR.size)
                desc = at + len(name) + -len(name) % 4
                if (
                    at % 4 == 0
                    and name_size == len(name)
                    and type_ in (None, found)
                    and desc + size <= len(data)
                ):
                    return data[desc : desc + size]
                at = data.find(name, at + 1)
        return None

    def headers_within(self, segment: Segment, size: int) -> bool:
        """Return whether the first *size* bytes of *segment* hold no more than the file's own
        headers, notes and zeros: what linkers put in front of a program for the loaders of
        operating systems."""
        if segment.offset or size > min(segment.file_size, _HEADERS_MAX):
            return False
        data = bytearray(self._blob.read(0, size))
        for start, end in ((0, self._headers_end), *((n.offset, n.end) for n in self._notes)):
            if start < size:
                data[start : min(end, size)] = bytes(min(end, size) - start)
        return not any(data)

    def _note_data(self) -> Iterator[bytes]:
        for segment in self._notes:
            if segment.file_size <= _NOTES_MAX:
                yield self._blob.read(segment.offset, segment.file_size)

    def _check(self, segment: Segment) -> None:
        at = f"ELF segment at {segment.paddr:#x}"
        if segment.file_size > segment.mem_size:
            raise self._blob.error(f"{at} is larger in the file than in memory; link it anew")
        if segment.offset + segment.file_size > self._blob.size:
            raise self._blob.error(f"{at} runs beyond the end of the file; it is truncated")


def _machine(number: int) -> str:
    return f"ELF for {_MACHINES.get(number, f'machine {number}')}"
