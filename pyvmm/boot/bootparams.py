"""What a Linux kernel that is entered in long mode finds: ``struct boot_params`` and page tables.

The boot parameters ("zero page") are those of Documentation/arch/x86/{boot,zero-page}.rst, 64-bit
protocol. A vmlinux has no setup header; it is given one that says the same. Left out: what only
the real-mode code reads (heap, video mode), setup_data other than the random seed, EFI, and a
reading of ``vga=`` and ``mem=`` in the command line.
"""

from __future__ import annotations

import os
import struct

from pyvmm.boot.memmap import memory_map
from pyvmm.x86 import layout

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pyvmm.memory.guest import GuestMemory

HEADER = 0x1F1
"""Where the setup header lies, in the kernel's file as in the boot parameters."""
HEADER_END = 0x290
"""Boot parameters have no room for a longer one."""
HEADER_MAGIC = b"HdrS"
BOOT_FLAG = 0xAA55

_ACPI_RSDP_ADDR = 0x70
_E820_ENTRIES = 0x1E8
_E820_TABLE = 0x2D0
_E820_ENTRY = struct.Struct("<QQI")
_E820_MAX = 128

_BOOT_FLAG = 0x1FE
_HEADER_MAGIC = 0x202
_VERSION = 0x206
_TYPE_OF_LOADER = 0x210
_LOADFLAGS = 0x211
_CODE32_START = 0x214
_RAMDISK_IMAGE = 0x218
_CMD_LINE_PTR = 0x228
_KERNEL_ALIGNMENT = 0x230
_SETUP_DATA = 0x250

_SETUP_DATA_HEADER = struct.Struct("<QII")
_SETUP_RNG_SEED = 9
_SEED_SIZE = 32

_VERSION_2_12 = 0x20C
_LOADED_HIGH = 1 << 0
_UNDEFINED_LOADER = 0xFF

_PRESENT_WRITABLE = 0x3
_LARGE = 0x83  # of 2 MiB


def write(
    memory: GuestMemory,
    header: bytes,
    start: int,
    cmdline: int,
    initrd: tuple[int, int] | None,
    rsdp: int = 0,
) -> int:
    """Write the boot parameters; return their address, for ``rsi``.

    :param header: the setup header as the kernel's file has it, from 0x1f1; empty if it has none
    :param start: where the kernel was loaded
    :param cmdline: address of the command line
    :param initrd: address and size of the initial RAM disk
    :param rsdp: address of the ACPI tables' root pointer, 0 if there are none
    """
    page = bytearray(layout.PAGE)
    page[HEADER : HEADER + len(header)] = header
    if not header:
        struct.pack_into("<H", page, _BOOT_FLAG, BOOT_FLAG)
        struct.pack_into("<4sH", page, _HEADER_MAGIC, HEADER_MAGIC, _VERSION_2_12)
        struct.pack_into("<I", page, _KERNEL_ALIGNMENT, 2 << 20)
        page[_LOADFLAGS] = _LOADED_HIGH
    page[_TYPE_OF_LOADER] = _UNDEFINED_LOADER
    struct.pack_into("<I", page, _CODE32_START, start)
    struct.pack_into("<II", page, _RAMDISK_IMAGE, *(initrd or (0, 0)))
    struct.pack_into("<I", page, _CMD_LINE_PTR, cmdline)
    struct.pack_into("<Q", page, _SETUP_DATA, _write_seed(memory))
    struct.pack_into("<Q", page, _ACPI_RSDP_ADDR, rsdp)
    memmap = memory_map(memory)[:_E820_MAX]
    page[_E820_ENTRIES] = len(memmap)
    for number, entry in enumerate(memmap):
        _E820_ENTRY.pack_into(page, _E820_TABLE + number * _E820_ENTRY.size, *entry)
    memory.write(layout.ZERO_PAGE, page)
    return layout.ZERO_PAGE


def _write_seed(memory: GuestMemory) -> int:
    # A kernel that reads this (6.0 and newer) has good random numbers from its first moment on,
    # without asking the processor for them, and wipes it.
    seed = _SETUP_DATA_HEADER.pack(0, _SETUP_RNG_SEED, _SEED_SIZE) + os.urandom(_SEED_SIZE)
    memory.write(layout.SETUP_DATA, seed)
    return layout.SETUP_DATA


def write_page_tables(memory: GuestMemory) -> int:
    """Write page tables that map the first 4 GiB to themselves; return their address, for CR3.

    Linux wants its image, the boot parameters and the command line mapped; the ROM, whose code
    goes on after paging is on, and the initial RAM disk lie within these 4 GiB as well.
    """
    pdpt = layout.PAGE_TABLES + layout.PAGE
    first = pdpt + layout.PAGE
    directories = range(first, first + 4 * layout.PAGE, layout.PAGE)
    tables = (
        struct.pack("<Q", pdpt | _PRESENT_WRITABLE).ljust(layout.PAGE, b"\0")
        + struct.pack("<4Q", *(at | _PRESENT_WRITABLE for at in directories)).ljust(
            layout.PAGE, b"\0"
        )
        + struct.pack("<2048Q", *range(_LARGE, 4 << 30, 2 << 20))
    )
    memory.write(layout.PAGE_TABLES, tables)
    return layout.PAGE_TABLES
