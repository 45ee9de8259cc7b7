"""Where functions sit on the PCI bus: ``addr=`` as QEMU has it, or the next free slot."""

from __future__ import annotations

import os

from pyvmm._util.keyval import shorten
from pyvmm._util.sizes import parse_size
from pyvmm.errors import ConfigError, HostError
from pyvmm.machine.drivers import Driver, Property, choice, flag, text

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pyvmm.devices.pci.function import Function
    from pyvmm.machine.drivers import DeviceConfig
    from pyvmm.machine.parts import Parts

SLOTS = 32
FUNCTIONS = 8
#: QEMU's names of the one bus.
BUSES = ("pci.0", "pcie.0")

Place = tuple[int, int]


def addr(value: str, where: str, _key: str) -> Place:
    """Return slot and function of ``SLOT[.FUNCTION]``, both hexadecimal.

    :raises ConfigError: it is no place on the bus
    """
    slot, dot, number = value.partition(".")
    try:
        place = int(slot, 16), int(number or "0", 16) if number or not dot else -1
    except ValueError:
        place = (-1, -1)
    if not (0 < place[0] < SLOTS and 0 <= place[1] < FUNCTIONS):
        raise ConfigError(
            f"{where}: addr={shorten(value)} is no place on the bus; give a slot from 1 to 1f,"
            " and a function, if it has several: 3 or 3.1"
        )
    return place


#: What each function has. An update compares the place that it got, not how it was asked for.
PROPERTIES = (
    Property("addr", addr, host=True),
    Property("bus", choice(*BUSES), host=True),
    Property("multifunction", flag, default=False),
)


class PciDriver(Driver):
    """A driver of a PCI function. ``places`` are the places of those that are settled."""

    bus = "pci"
    is_ordered = True

    def settle(self, device: DeviceConfig, devices: list[DeviceConfig]) -> None:
        here = [one for one in devices if one.driver.bus == self.bus]
        asked = [one.values["addr"] for one in here if one.values["addr"] is not None]
        many = [one.values["addr"] for one in here if one.values["multifunction"]]
        for place in asked:
            where = f"-device {self.name}: addr={place[0]:x}.{place[1]}"
            if asked.count(place) > 1:
                raise ConfigError(f"{where} is given twice; choose another")
            if place[1] and (place[0], 0) not in asked:
                raise ConfigError(f"{where}: guests look for function 0 first; give one to that")
            if place[1] and (place[0], 0) not in many:
                raise ConfigError(
                    f"{where}: function 0 says that it is alone; give it multifunction=on"
                )
        if device.values["addr"] is not None:
            device.place = device.values["addr"]
            return
        taken = {place[0] for place in asked}
        taken.update(one.place[0] for one in here[: here.index(device)] if one.place)
        free = [slot for slot in range(1, SLOTS) if slot not in taken]
        if not free:
            raise ConfigError(
                f"-device {self.name}: the PCI bus is full; at most {SLOTS - 1} slots, each of"
                f" {FUNCTIONS} functions (addr=)"
            )
        device.place = free[0], 0

    def plug(self, parts: Parts, device: DeviceConfig, function: Function) -> None:
        """Put the function of a device on the bus."""
        assert parts.pci is not None
        assert device.place is not None
        multifunction = device.values["multifunction"]
        function.id = device.values["id"] or ""
        parts.pci.add(function, device.place, multifunction=multifunction)

    def place(self, device: DeviceConfig, number: int) -> str:
        from pyvmm.devices.pci.function import place

        assert device.place is not None
        return place(*device.place)


class TestdevDriver(PciDriver):
    """The driver of ``pci-testdev``."""

    def add(self, parts: Parts, device: DeviceConfig) -> None:
        assert parts.pci is not None
        try:
            fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        except OSError as error:
            raise HostError(f"-device {self.name}: {error.strerror}; raise ulimit -n") from None
        model = parts.opened.add(self.model()(parts.pci, fd, device.values["membar"]))
        model.id = device.values["id"] or ""
        parts.devices.append(model)
        self.plug(parts, device, model.function)
        model.place = self.place(device, 0)


def _membar(value: str, where: str, key: str) -> int:
    size = parse_size(value, f"{where}: {key}", minimum=_LEAST, maximum=_MOST)
    if size & (size - 1):
        raise ConfigError(f"{where}: {key}={shorten(value)} is no power of two; give one")
    return size


_LEAST, _MOST = 4096, 32 << 30

DRIVERS = {
    "pci-testdev": TestdevDriver(
        "pci-testdev",
        help="registers that test programs take the time of an access with; on PCI",
        properties=(
            Property("id", text, host=True),
            *PROPERTIES,
            Property("membar", _membar, default=0),
        ),
        model="pyvmm.devices.pci.testdev:PciTestdev",
    )
}
