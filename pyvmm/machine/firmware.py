"""What firmware leaves in memory for a kernel: tables that describe the machine as built.

Imported at a fresh boot and at a reset, never on the way of a live update.
"""

from __future__ import annotations

from pyvmm.devices import acpi_pm, pvpanic
from pyvmm.machine.builder import COM_PORTS
from pyvmm.x86 import tables
from pyvmm.x86.hardware import Hardware

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pyvmm.machine.machine import Machine


def write_tables(machine: Machine) -> int:
    """Write the tables; return the address of ACPI's root pointer, 0 with ``acpi=off``.

    :raises ConfigError: the machine has more devices than they have room for
    """
    config = machine.config
    panics = [device.ioport for device in machine.devices if isinstance(device, pvpanic.PvPanic)]
    hardware = Hardware(
        config.smp,
        pm1_base=acpi_pm.IOBASE,
        sci=acpi_pm.SCI,
        s5=acpi_pm.SLP_TYP_S5,
        serials=[(*ports, irq) for ports, irq in COM_PORTS[: len(config.serials)]],
        virtio_mmio=machine.virtio_mmio,
        pvpanic=panics[0] if panics else None,
    )
    return tables.write(machine.memory, hardware, with_acpi=config.acpi)
