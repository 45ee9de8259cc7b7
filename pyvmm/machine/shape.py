"""What the next image of a live update must have too: the machine as the guest knows it.

Nothing is opened or made, so a command line can be judged before the update. Off the way of a
new image to its guest.
"""

from __future__ import annotations

from pyvmm.devices import acpi_pm, i8042
from pyvmm.devices.fw_cfg import FwCfg
from pyvmm.devices.rtc import Rtc
from pyvmm.devices.serial import Serial
from pyvmm.vmstate.section import section_names
from pyvmm.x86 import irqchip, vcpu_state

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pyvmm.machine.config import MachineConfig
    from pyvmm.machine.drivers import DeviceConfig
    from pyvmm.vmstate.fields import Description
    from pyvmm.vmstate.section import Key


def describe(config: MachineConfig) -> dict[str, str]:
    """Return what must be equal, by the option that says it."""
    ordered = [device for device in config.devices if device.driver.is_ordered]
    unordered = [device for device in config.devices if not device.driver.is_ordered]
    return {
        "-m": str(config.memory_size),
        "-smp": str(config.topology),
        "-cpu": ",".join(["host", *("-+"[on] + name for name, on in config.cpu_changes.items())]),
        "-object": ", ".join(f"{block.id} ({block.size} bytes)" for block in config.objects),
        "-serial": str(len(config.serials)),
        "-drive": " ".join(sorted(drive.shape() for drive in config.drives)),
        # What a back end can do is part of what the guest was told.
        "-netdev": ", ".join(netdev.shape() for netdev in config.netdevs),
        "-device": ",".join(
            [*sorted(_told(device) for device in unordered), *(_told(device) for device in ordered)]
        ),
        "-fw_cfg": ", ".join(sorted(item.shape() for item in config.fw_cfg)),
        **({"-machine": "pci=on"} if config.has_pci else {}),
        **_extents(config.devices),
    }


def chardev_kinds(config: MachineConfig) -> dict[str, str]:
    """Return of what kind each chardev is: one that an update keeps goes on with the descriptors
    and the state that it has."""
    places = [*config.chardevs, *config.serials, *(monitor.chardev for monitor in config.monitors)]
    return {one.id: one.shape() for one in places if one is not None and one.kind != "chardev"}


def descriptions(config: MachineConfig) -> dict[Key, Description]:
    """Return what a machine of this configuration writes into a state, by section and instance."""
    found = {(Serial.name, number): Serial.vmstate for number in range(len(config.serials))}
    for model in (Rtc, i8042.I8042, i8042.Port92, acpi_pm.AcpiPm):
        found[(model.name, 0)] = model.vmstate
    for index in range(config.smp):
        found[(vcpu_state.VCPU.name, index)] = vcpu_state.VCPU
    if config.has_pci:
        from pyvmm.devices.pci.host import PciHost

        found[(PciHost.name, 0)] = PciHost.vmstate
    for chip in (irqchip.I8259, irqchip.IOAPIC, irqchip.I8254, irqchip.KVMCLOCK):
        found[(chip.name, 0)] = chip
    found[(irqchip.I8259.name, 1)] = irqchip.I8259
    return found | {key: description for description, key, _ in _device_sections(config)}


def optional_descriptions() -> dict[Key, Description]:
    """Return the sections that are in a state only if the guest has used the device, as
    :func:`descriptions` does."""
    return {(FwCfg.name, 0): FwCfg.vmstate}


def former_names(config: MachineConfig) -> dict[Key, Key]:
    """Return, from what images before call a section to what it is called, where that differs."""
    return {former: key for _, key, former in _device_sections(config) if former != key}


def _device_sections(config: MachineConfig) -> list[tuple[Description, Key, Key]]:
    """Return the sections of ``-device``: description, what it is called, and was before."""
    found, places = [], []
    on_bus: dict[str, int] = {}
    for device in config.devices:
        driver = device.driver
        number = on_bus.get(driver.bus, 0)
        on_bus[driver.bus] = number + 1
        description = driver.description()
        if description is not None:
            found.append(description)
            places.append((driver.place(device, number), description.name))
    return [(one, *names) for one, names in zip(found, section_names(places), strict=True)]


def _told(device: DeviceConfig) -> str:
    """Return a device's driver, its back ends, its place if the command line can choose that, and
    its properties that the guest sees, as text."""
    behind = [*device.refers("drive"), *device.refers("netdev")]
    told = {one.name for one in device.driver.properties if not one.host}
    words = [f"{key}={text}" for key, text in sorted(device.given.items()) if key in told]
    if device.place is not None:
        words.insert(0, "at {:x}.{:x}".format(*device.place))
    return " ".join([device.driver.name, *(f"({id})" for id in behind), *words])


def _extents(devices: list[DeviceConfig]) -> dict[str, str]:
    found: dict[str, str] = {}
    for device in devices:
        option, extent = f"-device {device.driver.name}", device.driver.extent(device)
        if extent:
            found[option] = f"{found[option]}; {extent}" if option in found else extent
    return found
