"""What firmware leaves in memory for a kernel: tables that describe the machine as built.

Imported at a fresh boot and at a reset, never on the way of a live update.
"""

from __future__ import annotations

from pyvmm.devices import acpi_pm
from pyvmm.x86 import layout, tables
from pyvmm.x86.hardware import Hardware, PciHardware

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pyvmm.devices.pci.host import PciHost
    from pyvmm.machine.config import MachineConfig
    from pyvmm.machine.parts import Parts


def write_tables(parts: Parts, config: MachineConfig) -> int:
    """Write the tables; return the address of ACPI's root pointer, 0 with ``acpi=off``.

    :raises ConfigError: the machine has more devices than they have room for
    """
    hardware = describe(parts, config)
    return tables.write(parts.memory, hardware, with_acpi=config.acpi)


def describe(parts: Parts, config: MachineConfig) -> Hardware:
    """Return what the tables tell of the machine."""
    panics = [one.properties()["ioport"] for one in parts.devices if one.name == "pvpanic"]
    return Hardware(
        config.smp,
        pm1_base=acpi_pm.IOBASE,
        sci=acpi_pm.SCI,
        s5=acpi_pm.SLP_TYP_S5,
        serials=[(*ports, irq) for ports, irq in layout.COM_PORTS[: len(config.serials)]],
        virtio_mmio=parts.virtio_mmio,
        pvpanic=panics[0] if panics else None,
        has_fw_cfg=parts.fw_cfg in parts.devices,
        pci=None if parts.pci is None else _pci(parts.pci),
    )


def _pci(host: PciHost) -> PciHardware:
    windows = [(one.start, one.end) for one in (host.low, host.high) if one.start < one.end]
    routes = {one.slot: host.line_of(one).number for one in host.functions.values() if one.has_pin}
    return PciHardware(
        layout.PCI_ECAM, (host.io.start, host.io.end), windows, sorted(routes.items())
    )
