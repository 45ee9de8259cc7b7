"""How virtio devices are put on their bus: device, transport and KVM's eventfds together.

The order of the options decides which slot of virtio-mmio a device has, so an update keeps it.
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
                f"{layout.VIRTIO_MMIO_SLOTS}"
            )
        id = device.values["id"]
        if id is not None and sum(one.values["id"] == id for one in here) > 1:
            raise ConfigError(f"-device: the id {shorten(id)} is given twice; rename one")

    def place(self, number: int) -> str:
        from pyvmm.devices.virtio import mmio

        return mmio.place(_base(number))

    def description(self) -> Description:
        from pyvmm.devices.virtio.mmio import VirtioMmio

        return VirtioMmio.description(self.model())

    def add(self, parts: Parts, device: DeviceConfig) -> None:
        from pyvmm.core.iothread import IoThread
        from pyvmm.devices.virtio import mmio

        slot = len(parts.virtio_mmio)
        base = _base(slot)
        gsi = layout.IRQ_VIRTIO + slot
        report = parts.end.on_thread_error
        thread = IoThread(f"virtio-{slot}", report) if self._own_thread else None
        loop = thread.loop if thread else parts.loop
        model = self._create(self.model(), parts, device.values, loop)
        kick_fds = [_eventfd() for _ in model.queue_sizes]
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


def _base(slot: int) -> int:
    return layout.VIRTIO_MMIO + slot * layout.VIRTIO_MMIO_SIZE


def _eventfd() -> int:
    try:
        return os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
    except OSError as error:
        raise HostError(
            f"-device: {error.strerror}: each queue of a virtio device needs a descriptor; raise"
            " the limit (ulimit -n), or give less ports or devices"
        ) from None
