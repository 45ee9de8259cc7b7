"""Multiboot 1 (specification 0.6.96): finds the header, loads by it, writes the information.

Modules are always page-aligned and the memory map always given, whatever the header asks. Left
out: video modes, symbol tables, drives and APM.
"""

from __future__ import annotations

import struct

from pyvmm.boot.memmap import RAM, memory_map
from pyvmm.x86 import layout

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pyvmm.boot.blob import Blob
    from pyvmm.memory.guest import GuestMemory

BOOT_MAGIC = 0x2BADB002
"""What ``eax`` holds at entry; ``ebx`` has the address of the information."""
INFO = struct.Struct("<22I")
"""The information up to the VBE fields."""
MODULE = struct.Struct("<IIII")
MMAP_ENTRY = struct.Struct("<IQQI")

_MAGIC = 0x1BADB002
_SEARCH = 8192
_HEADER = struct.Struct("<III")
_MAGIC_2 = 0xE852_50D6
_SEARCH_2 = 32768
_HEADER_2 = struct.Struct("<IIII")
_ADDRESSES = struct.Struct("<IIIII")
_PAGE_ALIGN, _MEMORY_INFO, _ADDRESS_FIELDS = 1 << 0, 1 << 1, 1 << 16
_INFO_MEMORY, _INFO_CMDLINE, _INFO_MODULES, _INFO_MMAP, _INFO_LOADER = (
    1 << bit for bit in (0, 2, 3, 6, 9)
)


class Header:
    """A multiboot header; ``raw`` is where to load a file that is not ELF, else None.

    ``raw`` is ``(file offset, load address, bytes in the file, bytes in memory, entry)``.
    """

    __slots__ = ("raw",)

    def __init__(self, raw: tuple[int, int, int, int, int] | None) -> None:
        self.raw = raw


def find_header(blob: Blob) -> Header | None:
    """Return the header in the first 8 KiB, or None if the file has none (3.1).

    :raises ConfigError: it demands what is not there, or its addresses contradict each other
    """
    head = blob.head(_SEARCH)
    magic = _MAGIC.to_bytes(4, "little")
    at = head.find(magic)
    while at >= 0:
        if at % 4 == 0 and at + _HEADER.size <= len(head):
            _, flags, checksum = _HEADER.unpack_from(head, at)
            if (_MAGIC + flags + checksum) & 0xFFFF_FFFF == 0:
                break
        at = head.find(magic, at + 1)
    else:
        return None
    # Bits 0 to 15 are demands: a loader that does not know one must give up (3.1.2).
    demands = flags & 0xFFFF & ~(_PAGE_ALIGN | _MEMORY_INFO)
    if demands:
        what = "a video mode" if demands == 4 else f"unknown features (flags {demands:#x})"
        raise blob.error(f"the multiboot header demands {what}; build the kernel without")
    if not flags & _ADDRESS_FIELDS:
        return Header(None)
    if at + _HEADER.size + _ADDRESSES.size > len(head):
        raise blob.error("the multiboot header is truncated")
    header_addr, load, load_end, bss_end, entry = _ADDRESSES.unpack_from(head, at + _HEADER.size)
    offset = at - (header_addr - load)
    size = (load_end - load) if load_end else blob.size - offset
    mem_size = max(bss_end - load, size) if bss_end else size
    if header_addr < load or offset < 0 or size <= 0 or offset + size > blob.size:
        raise blob.error("the addresses in the multiboot header lie outside the file; fix them")
    if (bss_end and bss_end < load + size) or not load <= entry < load + mem_size:
        raise blob.error("the addresses in the multiboot header contradict; fix them")
    return Header((offset, load, size, mem_size, entry))


def is_version_2(blob: Blob) -> bool:
    """Return whether the first 32 KiB have a header of multiboot 2, which is not loaded here
    (specification 2.0, 3.1.1)."""
    head = blob.head(_SEARCH_2)
    magic = _MAGIC_2.to_bytes(4, "little")
    at = head.find(magic)
    while at >= 0:
        fields = head[at : at + _HEADER_2.size]
        whole = at % 8 == 0 and len(fields) == _HEADER_2.size
        if whole and sum(_HEADER_2.unpack(fields)) & 0xFFFF_FFFF == 0:
            return True
        at = head.find(magic, at + 1)
    return False


def write_info(
    memory: GuestMemory, cmdline: int, initrd: tuple[int, int] | None, loader: bytes = b"pyvmm"
) -> int:
    """Write the information and what it points to; return its address, for ``ebx`` (3.3).

    :param cmdline: address of the command line
    :param initrd: address and size of the only module
    """
    memmap = memory_map(memory)
    module_at = layout.MULTIBOOT_INFO + INFO.size
    mmap_at = module_at + MODULE.size
    # Each entry's size field does not count itself.
    table = b"".join(MMAP_ENTRY.pack(MMAP_ENTRY.size - 4, *entry) for entry in memmap)
    name_at = mmap_at + len(table)
    extended = sum(
        size for at, size, kind in memmap
        if kind == RAM and at == layout.HIGH_START
    )  # fmt: skip
    fields = [0] * 22
    fields[0] = _INFO_MEMORY | _INFO_CMDLINE | _INFO_MMAP | _INFO_LOADER
    fields[1] = layout.TABLES_START >> 10  # mem_lower, KiB
    fields[2] = extended >> 10  # mem_upper, KiB from 1 MiB up to the first hole
    fields[4] = cmdline
    module = MODULE.pack(0, 0, 0, 0)
    if initrd:
        start, size = initrd
        fields[0] |= _INFO_MODULES
        fields[5], fields[6] = 1, module_at
        module = MODULE.pack(start, start + size, 0, 0)
    fields[11], fields[12] = len(table), mmap_at
    fields[16] = name_at
    memory.write(layout.MULTIBOOT_INFO, INFO.pack(*fields) + module + table + loader + b"\0")
    return layout.MULTIBOOT_INFO
