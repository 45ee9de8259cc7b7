"""Writes the firmware tables, ACPI and MP, into guest memory, where kernels look for them.

On the main thread while no vCPU runs: at a fresh boot and at each reset. A live update finds
them in memory.
"""

from __future__ import annotations

from pyvmm.errors import ConfigError
from pyvmm.x86 import acpi, layout, mptable

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pyvmm.memory.guest import GuestMemory
    from pyvmm.x86.hardware import Hardware

# BIOS data area: segment of the EBDA, and KiB of conventional memory.
_BDA_EBDA = 0x40E
_BDA_MEMORY_SIZE = 0x413


def write(memory: GuestMemory, hardware: Hardware, *, with_acpi: bool = True) -> int:
    """Write all tables; return the RSDP's address, or 0 without ACPI.

    :raises ConfigError: they do not fit
    """
    memory.fill(layout.TABLES_START, layout.VGA_START - layout.TABLES_START)
    # The pointers lie in the EBDA's first KiB, which is where kernels search that were not
    # told (ACPI 5.2.5.1, MP 4). It begins with its size in KiB.
    memory.write_u16(_BDA_EBDA, layout.EBDA_START >> 4)
    memory.write_u16(_BDA_MEMORY_SIZE, layout.TABLES_START >> 10)
    memory.write_u8(layout.EBDA_START, layout.VGA_START - layout.EBDA_START >> 10)
    pointer, table = mptable.build(hardware, layout.TABLES_START)
    at = layout.TABLES_START + len(table) + 15 & -16
    rsdp, blob = acpi.build(hardware, at) if with_acpi else (b"", b"")
    if at + len(blob) > layout.EBDA_START:
        raise ConfigError("-device: the firmware tables have no room for so many; give fewer")
    memory.write(layout.TABLES_START, table)
    memory.write(layout.MP_POINTER, pointer)
    if not with_acpi:
        return 0
    memory.write(at, blob)
    memory.write(layout.FACS, acpi.facs())
    memory.write(layout.RSDP, rsdp)
    return layout.RSDP
