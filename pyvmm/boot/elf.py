"""Reads ELF executables for x86: headers, loadable segments and notes (System V gABI, chapter 5).

Both classes, little-endian, ET_EXEC only; sections, symbols and relocation are left out. The file
is hostile: every table is capped before it is read and every loop is bounded by a cap.
"""

from __future__ import annotations

import struct

from pyvmm.boot.image import Image

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
_EM_386 = 3
_EM_X86_64 = 62
_PT_LOAD = 1
_PT_NOTE = 4
_PHNUM_MAX = 256  # Linux has 5; PN_XNUM (65535) would move the number to a section
_NOTES_MAX = 64 << 10


class Segment:
    """One PT_LOAD or PT_NOTE entry; addresses and sizes in bytes."""

    __slots__ = ("align", "file_size", "mem_size", "offset", "paddr", "vaddr")

    def __init__(
        self, offset: int, vaddr: int, paddr: int, file_size: int, mem_size: int, align: int
    ) -> None:
        self.offset = offset
        self.vaddr = vaddr
        self.paddr = paddr
        self.file_size = file_size
        self.mem_size = mem_size
        self.align = align


class Elf:
    """The parts of an executable that a boot loader needs.

    ``is_64`` tells the class; ``entry`` is e_entry as it stands in the header; ``loads`` has the
    PT_LOAD segments with memory, by rising physical address, each within the file and none over
    another.

    :raises ConfigError: the file is not such an executable
    """

    __slots__ = ("_image", "_notes", "entry", "is_64", "loads")

    def __init__(self, image: Image) -> None:
        self._image = image
        ident = image.read(0, _IDENT_SIZE)
        if ident[:4] != MAGIC:
            raise image.error("not an ELF file")
        if ident[4] not in (1, 2) or ident[5] != 1:
            raise image.error("not a little-endian ELF file of 32 or 64 bits; give an x86 kernel")
        self.is_64 = wide = ident[4] == 2
        ehdr, phdr = (_EHDR64, _PHDR64) if wide else (_EHDR32, _PHDR32)
        fields = ehdr.unpack(image.read(_IDENT_SIZE, ehdr.size))
        kind, machine, _, self.entry, phoff, _, _, _, phentsize, phnum = fields[:10]
        if machine != _EM_X86_64 and (wide or machine != _EM_386):
            raise image.error(f"ELF for machine {machine}, not x86; give an x86 kernel")
        if kind != _ET_EXEC:
            raise image.error(f"ELF of type {kind}, not an executable; give a linked, fixed kernel")
        if phentsize != phdr.size or not 0 < phnum <= _PHNUM_MAX or not phoff:
            raise image.error("ELF without a usable program header table; give a linked kernel")
        self.loads: list[Segment] = []
        self._notes: list[Segment] = []
        for entry in phdr.iter_unpack(image.read(phoff, phnum * phdr.size)):
            if wide:
                type_, _, offset, vaddr, paddr, file_size, mem_size, align = entry
            else:
                type_, offset, vaddr, paddr, file_size, mem_size, _, align = entry
            segment = Segment(offset, vaddr, paddr, file_size, mem_size, align)
            if type_ == _PT_NOTE:
                self._notes.append(segment)
            elif type_ == _PT_LOAD and mem_size:
                self._check(segment)
                self.loads.append(segment)
        self.loads.sort(key=lambda segment: segment.paddr)
        if not self.loads:
            raise image.error("ELF without anything to load; give a linked kernel")
        for before, after in zip(self.loads, self.loads[1:], strict=False):
            if before.paddr + before.mem_size > after.paddr:
                raise image.error(f"ELF segments overlap at {after.paddr:#x}; link the kernel anew")

    def physical(self, address: int) -> int:
        """Return the physical address of *address*, which may be virtual (as e_entry often is)."""
        for each in self.loads:
            if each.vaddr <= address < each.vaddr + each.mem_size:
                return address - each.vaddr + each.paddr
        return address

    def notes(self) -> Iterator[tuple[bytes, int, bytes]]:
        """Yield ``(name, type, description)`` of each note; stops quietly at a malformed one."""
        for segment in self._notes:
            if segment.file_size > _NOTES_MAX:
                continue
            data = self._image.read(segment.offset, segment.file_size)
            # 8 occurs with GNU properties; anything else means 4, as toolchains write it.
            pad = 8 if segment.align == 8 else 4
            at = 0
            while at + _NHDR.size <= len(data):
                name_size, desc_size, type_ = _NHDR.unpack_from(data, at)
                name = at + _NHDR.size
                desc = name + name_size + -name_size % pad
                if desc + desc_size > len(data):
                    break
                yield data[name : name + name_size], type_, data[desc : desc + desc_size]
                at = desc + desc_size + -desc_size % pad

    def _check(self, segment: Segment) -> None:
        at = f"ELF segment at {segment.paddr:#x}"
        if segment.file_size > segment.mem_size:
            raise self._image.error(f"{at} is larger in the file than in memory; link it anew")
        if segment.offset + segment.file_size > self._image.size:
            raise self._image.error(f"{at} runs beyond the end of the file; it is truncated")
