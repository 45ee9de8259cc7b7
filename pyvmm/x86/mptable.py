"""The MP table (Intel MultiProcessor Specification 1.4, chapter 4): processors, IOAPIC and
interrupts for kernels that have no ACPI, or are told not to use it.
"""

from __future__ import annotations

import struct

from pyvmm.x86 import layout
from pyvmm.x86.acpi import checksum

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pyvmm.x86.hardware import Hardware

_ISA, _PCI = 0, 1  # ids of the buses
_ENABLED = 1
_BOOTSTRAP = 2
_LAPIC_VERSION = 0x14
_IOAPIC_VERSION = 0x11
_CPU_SIGNATURE = 0x600  # family 6; CPUID says what it really is
_CPU_FEATURES = 1 << 9 | 1 << 0  # APIC, FPU
_INT, _NMI, _EXT_INT = 0, 1, 3  # interrupt types; their flags are 0: as usual on the bus
_ALL = 0xFF
_CASCADE = 2


def build(hardware: Hardware, base: int) -> tuple[bytes, bytes]:
    """Return the floating pointer and the configuration table, to be stored at *base*."""
    # After the processors' ids, from which it must differ.
    ioapic = hardware.cpus
    entries = [
        struct.pack(
            "<BBBBII8x",
            0, index, _LAPIC_VERSION, _ENABLED | (0 if index else _BOOTSTRAP),
            _CPU_SIGNATURE, _CPU_FEATURES,
        )
        for index in range(hardware.cpus)
    ]  # fmt: skip
    routes = hardware.pci.routes if hardware.pci is not None else ()
    entries.append(struct.pack("<BB6s", 1, _ISA, b"ISA   "))
    if routes:
        entries.append(struct.pack("<BB6s", 1, _PCI, b"PCI   "))
    entries.append(struct.pack("<BBBBI", 2, ioapic, _IOAPIC_VERSION, _ENABLED, layout.IOAPIC_BASE))
    # Also the pins that no ISA bus has: a kernel without ACPI is told of virtio devices, and
    # of their interrupts by number, on its command line.
    entries += [
        struct.pack("<BBHBBBB", 3, _INT, 0, _ISA, pin, ioapic, pin)
        for pin in range(layout.IOAPIC_PINS)
        if pin != _CASCADE and pin not in [gsi for _, gsi in routes]
    ]
    # INTA of a slot; level-triggered, active low, as PCI has it.
    entries += [
        struct.pack("<BBHBBBB", 3, _INT, 0xF, _PCI, slot << 2, ioapic, gsi) for slot, gsi in routes
    ]
    entries.append(struct.pack("<BBHBBBB", 4, _EXT_INT, 0, 0, 0, 0, 0))
    entries.append(struct.pack("<BBHBBBB", 4, _NMI, 0, 0, 0, _ALL, 1))
    body = b"".join(entries)
    table = bytearray(
        struct.pack(
            "<4sHBB8s12sIHHIHBx",
            b"PCMP", 44 + len(body), 4, 0, b"PYVMM   ", b"PYVMM       ",
            0, 0, len(entries), layout.LAPIC_BASE, 0, 0,
        )
        + body
    )  # fmt: skip
    table[7] = checksum(table)
    pointer = bytearray(struct.pack("<4sIBBB5x", b"_MP_", base, 1, 4, 0))
    pointer[10] = checksum(pointer)
    return bytes(pointer), bytes(table)
