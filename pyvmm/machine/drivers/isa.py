"""ISA devices: some ports, and no state."""

from __future__ import annotations

from pyvmm.machine.drivers import Driver, Property, chosen, integer, text

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Protocol

    from pyvmm.devices.base import Device
    from pyvmm.machine.drivers import DeviceConfig, Values
    from pyvmm.machine.parts import Parts

    class Create(Protocol):
        """Makes the device: with its first port, their number, and bytes of the widest access."""

        def __call__(
            self, model: Any, parts: Parts, values: Values
        ) -> tuple[Device, int, int, int]: ...


class IsaDriver(Driver):
    """A driver of a device on the ISA bus.

    :param create: makes the device
    """

    bus = "isa"
    is_single = True

    def __init__(self, name: str, *, create: Create, **declared: Any) -> None:
        super().__init__(name, **declared)
        self._create = create

    def add(self, parts: Parts, device: DeviceConfig) -> None:
        parts.add_isa(*self._create(self.model(), parts, device.values))


def _debug_exit(model: Any, parts: Parts, values: Values) -> tuple[Device, int, int, int]:
    ports = chosen(values, iobase="iobase", iosize="iosize")
    device = model(parts.end.request_exit, **ports)
    return device, device.iobase, device.iosize, device.width


def _debugcon(model: Any, parts: Parts, values: Values) -> tuple[Device, int, int, int]:
    device = model(parts.claim(values["chardev"]), **chosen(values, iobase="iobase"))
    return device, device.iobase, 1, 1


def _pvpanic(model: Any, parts: Parts, values: Values) -> tuple[Device, int, int, int]:
    device = model(parts.end.report_panic, **chosen(values, ioport="ioport"))
    return device, device.ioport, 1, 1


_PORT = integer(0, 0xFFFF)

DRIVERS = {
    driver.name: driver
    for driver in (
        IsaDriver(
            "isa-debug-exit",
            help="a port by which the guest ends pyvmm, with an exit code",
            properties=(Property("iobase", _PORT), Property("iosize", integer(1, 8))),
            model="pyvmm.devices.debugexit:DebugExit",
            create=_debug_exit,
        ),
        IsaDriver(
            "isa-debugcon",
            help="a port that takes bytes for a chardev",
            properties=(
                Property("iobase", _PORT),
                Property("chardev", text, host=True, refers="chardev"),
            ),
            model="pyvmm.devices.debugcon:DebugConsole",
            create=_debugcon,
        ),
        IsaDriver(
            "pvpanic",
            help="a port by which the guest's kernel says that it panicked",
            properties=(Property("ioport", _PORT),),
            model="pyvmm.devices.pvpanic:PvPanic",
            create=_pvpanic,
        ),
    )
}
