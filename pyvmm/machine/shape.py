"""What the next image of a live update must have too: the machine as the guest knows it.

Nothing is opened or made, so a command line can be judged before the update. Off the way of a
new image to its guest.
"""

from __future__ import annotations

from pyvmm.devices import acpi_pm, i8042
from pyvmm.devices.rtc import Rtc
from pyvmm.devices.serial import Serial
from pyvmm.x86 import irqchip, vcpu_state

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pyvmm.machine.config import DeviceConfig, MachineConfig
    from pyvmm.vmstate.fields import Description

#: Properties of devices that are the host's affair, or part of the state, or (of ports) compared
#: with their device.
_NOT_TOLD = frozenset(
    "id drive netdev chardev bus nr name mac share-rw write-cache werror rerror max_ports"
    " rng max-bytes period".split()
)


def describe(config: MachineConfig) -> dict[str, str]:
    """Return what must be equal, by the option that says it."""
    return {
        "-m": str(config.memory_size),
        "-smp": str(config.topology),
        "-cpu": ",".join(["host", *("-+"[on] + name for name, on in config.cpu_changes.items())]),
        "-object": ", ".join(f"{block.id} ({block.size} bytes)" for block in config.objects),
        "-serial": str(len(config.serials)),
        "-drive": " ".join(sorted(drive.shape() for drive in config.drives)),
        # What a back end can do is part of what the guest was told.
        "-netdev": ", ".join(netdev.shape() for netdev in config.netdevs),
        # Of virtio devices the order decides where they are.
        "-device": ",".join(
            sorted(
                [_device(device) for device in config.devices],
                key=lambda driver: "~" if driver.startswith("virt") else driver,
            )
        ),
        **_ports(config),
    }


def chardev_kinds(config: MachineConfig) -> dict[str, str]:
    """Return of what kind each chardev is: one that an update keeps goes on with the descriptors
    and the state that it has."""
    places = [*config.chardevs, *config.serials, *(monitor.chardev for monitor in config.monitors)]
    return {one.id: one.shape() for one in places if one is not None and one.kind != "chardev"}


def descriptions(config: MachineConfig) -> dict[tuple[str, int], Description]:
    """Return what a machine of this configuration writes into a state, by section and instance."""
    found = {(Serial.name, number): Serial.vmstate for number in range(len(config.serials))}
    for device in (Rtc, i8042.I8042, i8042.Port92, acpi_pm.AcpiPm):
        found[(device.name, 0)] = device.vmstate
    for index in range(config.smp):
        found[(vcpu_state.VCPU.name, index)] = vcpu_state.VCPU
    for chip in (irqchip.I8259, irqchip.IOAPIC, irqchip.I8254, irqchip.KVMCLOCK):
        found[(chip.name, 0)] = chip
    found[(irqchip.I8259.name, 1)] = irqchip.I8259
    if any(device.driver.startswith("virt") for device in config.devices):
        from pyvmm.machine import virtio

        found |= virtio.descriptions(config.devices)
    return found


def _device(device: DeviceConfig) -> str:
    """Which disk or network is which, and all that the guest was told."""
    behind = device.properties.get("drive") or device.properties.get("netdev")
    told = [f"{k}={v}" for k, v in sorted(device.properties.items()) if k not in _NOT_TOLD]
    return " ".join([device.driver, *([f"({behind})"] if behind else []), *told])


def _ports(config: MachineConfig) -> dict[str, str]:
    if not any(device.driver == "virtio-serial-device" for device in config.devices):
        return {}
    from pyvmm.machine import virtio

    return {"-device virtio-serial-device": virtio.shape(config.devices)}
