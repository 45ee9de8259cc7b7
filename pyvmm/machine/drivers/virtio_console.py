"""``virtio-serial-device`` and what sits on it: ``virtconsole`` and ``virtserialport``, under
QEMU's names."""

from __future__ import annotations

from pyvmm._util.keyval import shorten
from pyvmm.errors import ConfigError
from pyvmm.machine.drivers import Driver, Property, integer, text
from pyvmm.machine.drivers.virtio import VirtioDriver

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from pyvmm.core.eventloop import EventLoop
    from pyvmm.devices.virtio.device import VirtioDevice
    from pyvmm.machine.drivers import DeviceConfig, Values
    from pyvmm.machine.parts import Parts

MAX_PORTS = 31
MAX_NAME = 128


class SerialDriver(VirtioDriver):
    """The device. Its value ``ports`` is each of its ports by its number, in rising order."""

    def settle_model(self, device: DeviceConfig, devices: list[DeviceConfig]) -> None:
        super().settle_model(device, devices)
        own = [one for one in devices if one.driver.bus == BUS and bus_of(one, devices) is device]
        ports = device.values["ports"] = numbered(own)
        count: int | None = device.values["max_ports"]
        if count is None:
            count = max([1, *(number + 1 for number in ports)])
        most = min(count, MAX_PORTS)
        beyond = [number for number in ports if number >= most]
        if beyond:
            raise ConfigError(
                f"-device {ports[beyond[0]].driver.name}: port {beyond[0]} is one too many for "
                f"max_ports={most}; raise it (at most {MAX_PORTS}) or leave the port out"
            )
        device.values["max_ports"] = count

    def extent(self, device: DeviceConfig) -> str:
        names = [
            f"{number} {port.driver.name} {port.values['name'] or ''}".rstrip()
            for number, port in device.values["ports"].items()
        ]
        return f"{device.values['max_ports']} ports: {', '.join(names)}".rstrip()


class PortDriver(Driver):
    """A port, which its device makes. All that the guest was told of it is compared with that."""

    bus = "virtio-serial"
    is_ordered = True

    def __init__(self, name: str, *, help: str) -> None:
        super().__init__(
            name,
            help=help,
            properties=(
                Property("id", text, host=True),
                Property("chardev", text, host=True, refers="chardev"),
                Property("name", _name, host=True),
                Property("nr", integer(0, MAX_PORTS - 1), host=True),
                Property("bus", text, host=True),
            ),
        )

    def settle(self, device: DeviceConfig, devices: list[DeviceConfig]) -> None:
        bus_of(device, devices)


BUS = PortDriver.bus


def bus_of(port: DeviceConfig, devices: list[DeviceConfig]) -> DeviceConfig:
    """Return the device that a port sits on: that of ``bus=ID.0``, or the last one in front of it.

    :raises ConfigError: there is none
    """
    where = f"-device {port.driver.name}"
    bus = port.values["bus"]
    for device in reversed(devices[: devices.index(port)]):
        is_bus = getattr(device.driver, "twin", device.driver) is SERIAL
        if is_bus and bus in (None, f"{device.values['id']}.0"):
            return device
    if bus is not None:
        raise ConfigError(
            f"{where}: bus={shorten(bus)}: there is no such bus; give the id of a {SERIAL.name} in "
            "front of it, and .0"
        )
    raise ConfigError(f"{where}: there is no bus for it; put -device {SERIAL.name} in front of it")


def numbered(ports: list[DeviceConfig]) -> dict[int, DeviceConfig]:
    """Return the ports of one device by their numbers, in rising order.

    The first console is port 0, which a driver without MULTIPORT finds; a number that is not
    given is the lowest that is free.

    :raises ConfigError: naming the port that has no place
    """
    found: dict[int, DeviceConfig] = {}
    for port in ports:
        number = port.values["nr"]
        if number is None:
            continue
        where = f"-device {port.driver.name}: nr={number}"
        if number in found:
            raise ConfigError(f"{where}: that port is there already; choose another nr")
        if number == 0 and port.driver is not CONSOLE:
            raise ConfigError(f"{where}: port 0 is kept for a {CONSOLE.name}; give nr=1 or more")
        found[number] = port
    for port in ports:
        if port.values["nr"] is None:
            number = 0 if port.driver is CONSOLE else 1
            while number in found:
                number += 1
            found[number] = port
    return dict(sorted(found.items()))


def create(model: Any, parts: Parts, values: Values, loop: EventLoop) -> VirtioDevice:
    """Return the device with its ports."""
    from pyvmm.devices.virtio.console import Port

    ports = [
        Port(
            number,
            parts.claim(port.values["chardev"]),
            is_console=port.driver is CONSOLE,
            name=port.values["name"] or "",
        )
        for number, port in values["ports"].items()
    ]
    device: VirtioDevice = model(loop, ports, values["max_ports"])
    return device


def _name(value: str, where: str, _key: str) -> str:
    if not value.isprintable():
        raise ConfigError(f"{where}: name={shorten(value)}: give characters that can be printed")
    if len(value.encode()) > MAX_NAME:
        raise ConfigError(f"{where}: name: at most {MAX_NAME} bytes; choose a shorter one")
    return value


SERIAL = SerialDriver(
    "virtio-serial-device",
    help="a bus for ports, which stand behind it:",
    properties=(Property("max_ports", integer(1, MAX_PORTS), host=True),),
    model="pyvmm.devices.virtio.console:VirtioConsole",
    create=create,
)
CONSOLE = PortDriver("virtconsole", help="a console on it, chardev=ID")
PORT = PortDriver("virtserialport", help="a port with a name, chardev=ID,name=NAME")
DRIVERS = {driver.name: driver for driver in (SERIAL, CONSOLE, PORT)}
