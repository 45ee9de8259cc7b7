"""PVH: enters a 32-bit protected-mode kernel at the address in its Xen note.

What the guest is given is Xen's public start_info, version 1 (include/public/arch-x86/hvm/
start_info.h). Left out: more than one module.
"""

from __future__ import annotations

import struct

from pyvmm.boot import elf
from pyvmm.boot.memmap import memory_map
from pyvmm.x86 import layout

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pyvmm.memory.guest import GuestMemory

MAGIC = 0x336EC578
"""Of start_info: ``xEn3`` with the top bit of the E set."""
START_INFO = struct.Struct("<IIIIQQQQII")
MODULE = struct.Struct("<QQQQ")
MEMMAP_ENTRY = struct.Struct("<QQII")

_VERSION = 1
_NOTE_PHYS32_ENTRY = 18


def find_entry(kernel: elf.Elf) -> int | None:
    """Return the physical address where a PVH kernel starts, or None if it is none."""
    desc = kernel.find_note(b"Xen\0", _NOTE_PHYS32_ENTRY)
    # Of 4 or 8 bytes, whatever the file's class.
    return None if desc is None or len(desc) not in (4, 8) else int.from_bytes(desc, "little")


def write_start_info(
    memory: GuestMemory, cmdline: int, initrd: tuple[int, int] | None, rsdp: int = 0
) -> int:
    """Write start_info and what it points to; return its address, which goes into ``ebx``.

    :param cmdline: address of the command line
    :param initrd: address and size of the only module
    :param rsdp: address of the ACPI tables' root pointer, 0 if there are none
    """
    memmap = memory_map(memory)
    module_at = layout.START_INFO + START_INFO.size
    memmap_at = module_at + MODULE.size
    info = START_INFO.pack(
        MAGIC, _VERSION, 0,
        1 if initrd else 0, module_at if initrd else 0,
        cmdline, rsdp,
        memmap_at, len(memmap), 0,
    )  # fmt: skip
    module = MODULE.pack(*(initrd or (0, 0)), 0, 0)
    table = b"".join(MEMMAP_ENTRY.pack(*entry, 0) for entry in memmap)
    memory.write(layout.START_INFO, info + module + table)
    return layout.START_INFO
