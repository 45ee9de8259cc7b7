"""The virtio devices on PCI: each is declared once, for virtio-mmio, and is the same here."""

from __future__ import annotations

from pyvmm.machine.drivers import (
    Property,
    choice,
    virtio_blk,
    virtio_console,
    virtio_net,
    virtio_rng,
)
from pyvmm.machine.drivers.pci import PROPERTIES, PciDriver
from pyvmm.machine.drivers.virtio import eventfds
from pyvmm.x86 import layout

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pyvmm.machine.drivers import DeviceConfig
    from pyvmm.machine.drivers.virtio import VirtioDriver
    from pyvmm.machine.parts import Parts
    from pyvmm.vmstate.fields import Description

#: There is the modern interface alone; QEMU's words for that are taken.
_INTERFACES = (
    Property("disable-legacy", choice("on", "auto"), host=True),
    Property("disable-modern", choice("off"), host=True),
)


class VirtioPciDriver(PciDriver):
    """A driver of the same device on PCI.

    :param twin: on virtio-mmio
    """

    def __init__(self, twin: VirtioDriver) -> None:
        super().__init__(
            twin.name_on_pci,
            help=f"{twin.help}; on PCI" if twin.help[-1] != ":" else "the same on PCI",
            properties=(*twin.properties, *PROPERTIES, *_INTERFACES),
            model=twin.path,
            check=twin.check,
        )
        self.twin = twin

    def settle(self, device: DeviceConfig, devices: list[DeviceConfig]) -> None:
        super().settle(device, devices)
        self.twin.settle_model(device, devices)

    def extent(self, device: DeviceConfig) -> str:
        return self.twin.extent(device)

    def description(self) -> Description:
        from pyvmm.devices.virtio.pci import VirtioPci

        return VirtioPci.description(self.model())

    def add(self, parts: Parts, device: DeviceConfig) -> None:
        from pyvmm.devices.virtio.pci import VirtioPci

        assert parts.pci is not None
        assert device.place is not None
        number = layout.VIRTIO_MMIO_SLOTS + len(parts.pci.functions)
        model, thread = self.twin.create(parts, device, number)
        transport = VirtioPci(
            model,
            parts.memory,
            kick_fds=eventfds(model),
            send=parts.platform.irqs.send_msi,
            thread=thread,
        )
        transport.id = transport.function.id = device.values["id"] or ""
        parts.devices.append(parts.opened.add(transport))
        parts.pci.add(transport.function, device.place)
        transport.place = self.place(device, 0)


_TWINS = (virtio_blk.DRIVER, virtio_net.DRIVER, virtio_rng.DRIVER, virtio_console.SERIAL)
DRIVERS = {twin.name_on_pci: VirtioPciDriver(twin) for twin in _TWINS}
