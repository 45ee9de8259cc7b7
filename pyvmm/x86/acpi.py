"""The ACPI tables (ACPI 6.5, chapters 5 and 6): what a kernel cannot probe on this machine.

RSDP, XSDT, FADT, FACS, MADT, with PCI an MCFG, and a DSDT without methods. The fixed hardware is
the PM1 block and the PM timer, so ACPI mode is always on (no SMI_CMD); a reset goes through the
keyboard controller's reset line. Left out: general-purpose events, which this machine lacks, and
processor objects, since the MADT says all there is.
"""

from __future__ import annotations

import struct

from pyvmm.x86 import aml, layout

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pyvmm.x86.hardware import Hardware, PciHardware

_OEM = b"PYVMM "
_HEADER = struct.Struct("<4sIBB6s8sI4sI")
_FADT = struct.Struct("<IIBBHI4x6I8x4B4xHHHHBBBBBHxI12sB3xQQ12s12s12s12s12s12s12s12s12s12sQ")

# FADT, IAPC_BOOT_ARCH (5.2.9.3). The controller at port 0x60 has no keyboard, so a kernel that
# looked for one would only lose time: 8042 (bit 1) is not set.
_BOOT_LEGACY_DEVICES = 1 << 0
_BOOT_NO_VGA = 1 << 2
# FADT, fixed feature flags (table 5.10). The power button is PM1's: PWR_BUTTON is not set.
_WBINVD = 1 << 0
_PROC_C1 = 1 << 2
_SLP_BUTTON = 1 << 5  # there is none
_FIX_RTC = 1 << 6  # the RTC wakes nobody up
_RESET_REG_SUP = 1 << 10
_RESET_VALUE = 0xFE  # to the keyboard controller: pulse the reset line

# Sizes of an access to a generic address.
_BYTE, _WORD, _DWORD = 1, 2, 3

# _STA (6.3.7): present, enabled and functioning, but nothing to show to people.
_PRESENT = 0xB

_MADT_PCAT_COMPAT = 1  # there are 8259s too, to be masked
_ENABLED = 1
# MPS INTI flags (table 5.23).
_LEVEL_HIGH = 0xD


def build(hardware: Hardware, base: int, facs: int = layout.FACS) -> tuple[bytes, bytes]:
    """Return the RSDP and the tables, which are to be stored at *base*, and the FACS at *facs*."""
    blob = bytearray()

    def place(data: bytes) -> int:
        blob.extend(bytes(-len(blob) % 16))
        at = base + len(blob)
        blob.extend(data)
        return at

    dsdt = place(_table(b"DSDT", 2, _dsdt(hardware)))
    fadt = place(_table(b"FACP", 6, _fadt(hardware, dsdt, facs)))
    tables = [fadt, place(_table(b"APIC", 5, _madt(hardware)))]
    if hardware.pci is not None:
        tables.append(place(_table(b"MCFG", 1, _mcfg(hardware.pci))))
    xsdt = place(_table(b"XSDT", 1, struct.pack(f"<{len(tables)}Q", *tables)))
    return _rsdp(xsdt), bytes(blob)


def facs() -> bytes:
    """Return the FACS (5.2.10), which holds the global lock; it must not move while the OS runs."""
    return struct.pack("<4sIIIIIQB31x", b"FACS", 64, 0, 0, 0, 0, 0, 2)


def checksum(data: bytes | bytearray) -> int:
    """Return the byte that makes the sum of *data* and itself 0 (modulo 256)."""
    return -sum(data) & 0xFF


def _table(signature: bytes, revision: int, body: bytes) -> bytes:
    size = _HEADER.size + len(body)
    header = _HEADER.pack(signature, size, revision, 0, _OEM, _OEM + b"  ", 1, b"PYVM", 1)
    data = bytearray(header + body)
    data[9] = checksum(data)
    return bytes(data)


def _rsdp(xsdt: int) -> bytes:
    # The first checksum covers the 20 bytes of ACPI 1.0, the second all.
    data = bytearray(struct.pack("<8sB6sBIIQB3x", b"RSD PTR ", 0, _OEM, 2, 0, 36, xsdt, 0))
    data[8] = checksum(data[:20])
    data[32] = checksum(data)
    return bytes(data)


def _fadt(hardware: Hardware, dsdt: int, facs: int) -> bytes:
    events, control, timer = (hardware.pm1_base + offset for offset in (0, 4, 8))
    none = bytes(12)
    return _FADT.pack(
        facs, dsdt, 0, 0, hardware.sci, 0,
        events, 0, control, 0, 0, timer,
        4, 2, 0, 4,  # lengths: PM1 event and control blocks, no PM2, PM timer
        0xFFFF, 0xFFFF, 0, 0,  # latencies that mean: no C2, no C3
        0, 0, 0, 0, layout.CMOS_CENTURY,  # no duty cycle; no day and month in the RTC's alarm
        _BOOT_LEGACY_DEVICES | _BOOT_NO_VGA,
        _WBINVD | _PROC_C1 | _SLP_BUTTON | _FIX_RTC | _RESET_REG_SUP,
        _register(layout.I8042_COMMAND[0], 8, _BYTE), _RESET_VALUE,
        0, dsdt,
        _register(events, 32, _WORD), none, _register(control, 16, _WORD), none,
        none, _register(timer, 32, _DWORD), none, none, none, none,
        0,
    )  # fmt: skip


def _register(port: int, bits: int, access: int) -> bytes:
    # Generic address (5.2.3.2) of an I/O port.
    return struct.pack("<BBBBQ", 1, bits, 0, access, port)


def _madt(hardware: Hardware) -> bytes:
    entries = [struct.pack("<II", layout.LAPIC_BASE, _MADT_PCAT_COMPAT)]
    # The processor that runs this comes first; its UID and APIC id are its number.
    entries += [
        struct.pack("<BBBBI", 0, 8, index, index, _ENABLED) for index in range(hardware.cpus)
    ]
    entries.append(struct.pack("<BBBxII", 1, 12, 0, layout.IOAPIC_BASE, 0))
    # ISA interrupts reach the IOAPIC's pin of the same number, the timer's too: KVM's default
    # routing. Only the SCI and those of PCI are unlike ISA, level-triggered.
    levels = {hardware.sci}
    if hardware.pci is not None:
        levels.update(gsi for _, gsi in hardware.pci.routes)
    entries += [struct.pack("<BBBBIH", 2, 10, 0, gsi, gsi, _LEVEL_HIGH) for gsi in sorted(levels)]
    # LINT1 is the NMI on all processors.
    entries.append(struct.pack("<BBBHB", 4, 6, 0xFF, 0, 1))
    return b"".join(entries)


def _mcfg(pci: PciHardware) -> bytes:
    # PCI Firmware Specification 3.3, 4.1.2: segment 0, buses 0 to 0.
    return struct.pack("<8xQHBB4x", pci.ecam, 0, 0, 0)


def _pci_devices(pci: PciHardware) -> list[bytes]:
    windows = [aml.io_window(pci.io[0], pci.io[1] - 1)]
    windows += [aml.memory_window(start, end - 1) for start, end in pci.memory]
    routes = [
        aml.package(*map(aml.integer, (slot << 16 | 0xFFFF, 0, 0, gsi))) for slot, gsi in pci.routes
    ]
    return [
        aml.device(
            "PCI0",
            aml.name("_HID", aml.eisa_id("PNP0A08")),
            aml.name("_CID", aml.eisa_id("PNP0A03")),
            aml.name("_BBN", aml.integer(0)),
            aml.name("_SEG", aml.integer(0)),
            aml.name("_UID", aml.integer(0)),
            aml.name(
                "_CRS",
                aml.resources(aml.bus_numbers(0, 0), aml.io(*layout.PCI_CONFIG), *windows),
            ),
            aml.name("_PRT", aml.package(*routes)),
        ),
        # Kernels use what MCFG tells of only if it is reserved here.
        aml.device(
            "MBRD",
            aml.name("_HID", aml.eisa_id("PNP0C02")),
            aml.name("_CRS", aml.resources(aml.memory32(pci.ecam, 1 << 20))),
        ),
    ]


def _dsdt(hardware: Hardware) -> bytes:
    devices = [
        aml.device(
            f"COM{number}",
            aml.name("_HID", aml.eisa_id("PNP0501")),
            aml.name("_UID", aml.integer(number)),
            aml.name("_CRS", aml.resources(aml.io(port, count), aml.irq(irq))),
        )
        for number, (port, count, irq) in enumerate(hardware.serials, 1)
    ]
    devices.append(
        aml.device(
            "RTC",
            aml.name("_HID", aml.eisa_id("PNP0B00")),
            aml.name("_CRS", aml.resources(aml.io(*layout.CMOS), aml.irq(layout.IRQ_RTC))),
        )
    )
    if hardware.pvpanic is not None:
        devices.append(
            aml.device(
                "PEVT",
                aml.name("_HID", aml.string("QEMU0001")),
                aml.name("_CRS", aml.resources(aml.io(hardware.pvpanic, 1))),
            )
        )
    if hardware.has_fw_cfg:
        devices.append(
            aml.device(
                "FWCF",
                aml.name("_HID", aml.string("QEMU0002")),
                aml.name("_STA", aml.integer(_PRESENT)),
                aml.name("_CRS", aml.resources(aml.io(*layout.FW_CFG))),
            )
        )
    devices += [
        aml.device(
            f"VR{number:02X}",
            aml.name("_HID", aml.string("LNRO0005")),
            aml.name("_UID", aml.integer(number)),
            # Edge: the line is pulsed, which a level-triggered pin could miss.
            aml.name(
                "_CRS",
                aml.resources(aml.memory32(base, size), aml.interrupt(gsi, edge=True)),
            ),
        )
        for number, (base, size, gsi) in enumerate(hardware.virtio_mmio)
    ]
    if hardware.pci is not None:
        devices += _pci_devices(hardware.pci)
    sleep = aml.package(aml.integer(hardware.s5), *[aml.integer(0)] * 3)
    return aml.name("_S5", sleep) + aml.scope("_SB", *devices)
