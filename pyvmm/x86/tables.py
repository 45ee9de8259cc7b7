"""Writes the firmware tables, ACPI and MP, into guest memory, where kernels look for them.

On the main thread while no vCPU runs: at a fresh boot and at each reset. A live update finds
them in memory.
"""

from __future__ import annotations

from pyvmm.errors import ConfigError
from pyvmm.x86 import acpi, layout, mptable

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from pyvmm.memory.guest import GuestMemory

# BIOS data area: segment of the EBDA, and KiB of conventional memory.
_BDA_EBDA = 0x40E
_BDA_MEMORY_SIZE = 0x413


class Hardware:
    """What the tables tell of.

    :param cpus: number of processors, whose APIC ids are 0 to *cpus* - 1
    :param pm1_base: first port of the PM1 event block; the control block is 4 ports higher
    :param sci: GSI of the power management interrupt
    :param s5: SLP_TYP of soft off
    :param serials: ``(first port, number of ports, interrupt)`` of each serial port
    :param virtio_mmio: ``(address, size, GSI)`` of each virtio-mmio device, edge-triggered
    :param pvpanic: its port, if there is one
    """

    __slots__ = ("cpus", "pm1_base", "pvpanic", "s5", "sci", "serials", "virtio_mmio")

    def __init__(
        self,
        cpus: int,
        *,
        pm1_base: int,
        sci: int,
        s5: int = 0,
        serials: Sequence[tuple[int, int, int]] = (),
        virtio_mmio: Sequence[tuple[int, int, int]] = (),
        pvpanic: int | None = None,
    ) -> None:
        self.cpus = cpus
        self.pm1_base = pm1_base
        self.sci = sci
        self.s5 = s5
        self.serials = serials
        self.virtio_mmio = virtio_mmio
        self.pvpanic = pvpanic


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
