"""What is on the board itself: devices of more than some ports, and one of none."""

from __future__ import annotations

from pyvmm.errors import ConfigError, InternalError
from pyvmm.machine.drivers import Driver

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from pyvmm.machine.drivers import DeviceConfig
    from pyvmm.machine.parts import Parts


class BoardDriver(Driver):
    """A driver of a device that a machine has once, where it always is.

    :param create: makes the device, and puts it on the buses
    """

    bus = "isa"
    is_single = True

    def __init__(self, name: str, *, create: Callable[[Any, Parts], None], **declared: Any) -> None:
        super().__init__(name, properties=(), **declared)
        self._create = create

    def add(self, parts: Parts, device: DeviceConfig) -> None:
        try:
            self._create(self.model(), parts)
        except InternalError as error:
            raise ConfigError(f"-device {self.name}: {error}; leave one of them out") from None


def _vmcoreinfo(model: Any, parts: Parts) -> None:
    parts.devices.append(parts.opened.add(model()))


def _pc_testdev(model: Any, parts: Parts) -> None:
    def set_irq(gsi: int, level: bool) -> None:
        parts.platform.vm.irq_line(gsi, level)

    device = model(set_irq, parts.memory.forget_page)
    parts.devices.append(parts.opened.add(device))
    for start, count, width, part in device.ports:
        parts.ports.add(start, count, part, device.name, width=width)
    start, size, width, part = device.memory
    parts.mmio.add(start, size, part, device.name, width=width)


DRIVERS = {
    driver.name: driver
    for driver in (
        BoardDriver(
            "vmcoreinfo",
            help="a file of fw_cfg by which a kernel tells where its notes for a dump are",
            model="pyvmm.devices.vmcoreinfo:VmCoreInfo",
            create=_vmcoreinfo,
        ),
        BoardDriver(
            "pc-testdev",
            help="ports and memory that kvm-unit-tests use",
            model="pyvmm.devices.pc_testdev:PcTestdev",
            create=_pc_testdev,
        ),
    )
}
