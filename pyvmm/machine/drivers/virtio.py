"""How virtio devices are put on their bus: device, transport and KVM's eventfds together.

A device is declared once, for virtio-mmio; ``virtio_pci`` makes its driver on PCI of that. The
order of the options decides which slot a device has, so an update keeps it.
"""

from __future__ import annotations

import os

from pyvmm._util.keyval import shorten
from pyvmm.errors import ConfigError, HostError
from pyvmm.machine.drivers import Driver, Property, text
from pyvmm.x86 import layout

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Protocol

    from pyvmm.core.eventloop import EventLoop
    from pyvmm.core.iothread import IoThread
    from pyvmm.devices.virtio.device import VirtioDevice
    from pyvmm.machine.drivers import DeviceConfig, Values
    from pyvmm.machine.parts import Parts
    from pyvmm.vmstate.fields import Description

    class Create(Protocol):
        """Makes the device.

        :param loop: serves its queues
        """

        def __call__(
            self, model: Any, parts: Parts, values: Values, loop: EventLoop
        ) -> VirtioDevice: ...


#: Where virtio devices sit.
BUSES = ("virtio", "pci")


class VirtioDriver(Driver):
    """A driver of a device on virtio-mmio. It has an ``id``, too.

    :param create: makes the device
    :param own_thread: whether its queues are served by a thread of their own
    """

    bus = "virtio"
    is_ordered = True

    def __init__(
        self,
        name: str,
        *,
        create: Create,
        properties: tuple[Property, ...],
        own_thread: bool = False,
        **declared: Any,
    ) -> None:
        super().__init__(
            name, properties=(Property("id", text, host=True), *properties), **declared
        )
        self._create = create
        self._own_thread = own_thread

    def settle(self, device: DeviceConfig, devices: list[DeviceConfig]) -> None:
        here = [one for one in devices if one.driver.bus == self.bus]
        if len(here) > layout.VIRTIO_MMIO_SLOTS:
            raise ConfigError(
                f"-device {here[-1].driver.name}: one virtio device too many; at most "
                f"{layout.VIRTIO_MMIO_SLOTS}; on PCI there is room for more ({self.name_on_pci})"
            )
        self.settle_model(device, devices)

    def settle_model(self, device: DeviceConfig, devices: list[DeviceConfig]) -> None:
        """Do what is the same whatever bus the device is on."""
        check_id(device, devices)

    @property
    def name_on_pci(self) -> str:
        """The name of the driver for the same device on PCI."""
        return self.name.removesuffix("-device") + "-pci"

    def place(self, device: DeviceConfig, number: int) -> str:
        from pyvmm.devices.virtio import mmio

        return mmio.place(_base(number))

    def description(self) -> Description:
        from pyvmm.devices.virtio.mmio import VirtioMmio

        return VirtioMmio.description(self.model())

    def create(
        self, parts: Parts, device: DeviceConfig, number: int
    ) -> tuple[VirtioDevice, IoThread | None]:
        """Return the device, and the thread that serves it, if that is its own.

        :param number: for the thread's name
        """
        from pyvmm.core.iothread import IoThread

        report = parts.end.on_thread_error
        thread = IoThread(f"virtio-{number}", report) if self._own_thread else None
        loop = thread.loop if thread else parts.loop
        return self._create(self.model(), parts, device.values, loop), thread

    def add(self, parts: Parts, device: DeviceConfig) -> None:
        from pyvmm.devices.virtio import mmio

        slot = len(parts.virtio_mmio)
        base = _base(slot)
        gsi = layout.IRQ_VIRTIO + slot
        model, thread = self.create(parts, device, slot)
        kick_fds = eventfds(model)
        irqs = parts.platform.irqs
        transport = mmio.VirtioMmio(
            model,
            parts.memory,
            base=base,
            gsi=gsi,
            kick_fds=kick_fds,
            pulse=irqs.pulse(gsi, model.name),
            thread=thread,
        )
        transport.id = device.values["id"] or ""
        parts.devices.append(parts.opened.add(transport))
        parts.virtio_mmio.append((base, mmio.SIZE, gsi))
        parts.mmio.add(base, mmio.SIZE, transport, model.name, width=mmio.WIDTH)
        for index, fd in enumerate(kick_fds):
            irqs.kick(base + mmio.QUEUE_NOTIFY, index, fd, model.name)


def check_id(device: DeviceConfig, devices: list[DeviceConfig]) -> None:
    """See that no other virtio device has the id of one.

    :raises ConfigError: it is given twice
    """
    id = device.values["id"]
    same = [one for one in devices if one.driver.bus in BUSES and one.values["id"] == id]
    if id is not None and len(same) > 1:
        raise ConfigError(f"-device: the id {shorten(id)} is given twice; rename one")


def _base(slot: int) -> int:
    return layout.VIRTIO_MMIO + slot * layout.VIRTIO_MMIO_SIZE


def eventfds(device: VirtioDevice) -> list[int]:
    """Return an eventfd for each of a device's queues.

    :raises HostError: there are no more descriptors
    """
    found: list[int] = []
    try:
        found.extend(os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK) for _ in device.queue_sizes)
    except OSError as error:
        for fd in found:
            os.close(fd)
        raise HostError(
            f"-device: {error.strerror}: each queue of a virtio device needs a descriptor; raise"
            " the limit (ulimit -n), or give less ports or devices"
        ) from None
    return found
