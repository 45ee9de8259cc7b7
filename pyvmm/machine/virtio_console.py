"""``-device virtio-serial-device`` and what sits on it: ``virtconsole`` and ``virtserialport``,
under QEMU's names."""

from __future__ import annotations

from pyvmm._util.keyval import check_keys, parse_int, shorten
from pyvmm.errors import ConfigError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pyvmm.core.eventloop import EventLoop
    from pyvmm.devices.virtio.device import VirtioDevice
    from pyvmm.machine.config import DeviceConfig, MachineConfig
    from pyvmm.machine.parts import Parts

SERIAL = "virtio-serial-device"
PROPERTIES = ("max_ports",)
PORTS = ("virtconsole", "virtserialport")
PORT_PROPERTIES = ("id", "chardev", "name", "nr", "bus")
MAX_PORTS = 31
MAX_NAME = 128


def check(properties: dict[str, str], where: str) -> None:
    """See that the properties of a ``virtio-serial-device`` are possible.

    :raises ConfigError: naming the property
    """
    if "max_ports" in properties:
        parse_int(properties["max_ports"], where, "max_ports", 1, MAX_PORTS)


def check_port(properties: dict[str, str], where: str) -> None:
    """See that the properties of a port are possible by themselves.

    :raises ConfigError: naming the property
    """
    check_keys(properties, PORT_PROPERTIES, where)
    if "nr" in properties:
        parse_int(properties["nr"], where, "nr", 0, MAX_PORTS - 1)
    name = properties.get("name", "")
    if not name.isprintable():
        raise ConfigError(f"{where}: name={shorten(name)}: give characters that can be printed")
    if len(name.encode()) > MAX_NAME:
        raise ConfigError(f"{where}: name: at most {MAX_NAME} bytes; choose a shorter one")


def check_devices(devices: list[DeviceConfig]) -> None:
    """See that the devices and ports fit together.

    :raises ConfigError: naming the port that does not
    """
    for device in devices:
        if device.driver in PORTS:
            _bus(devices, device)
        elif device.driver == SERIAL:
            ports(devices, device)


def ports(devices: list[DeviceConfig], serial: DeviceConfig) -> tuple[dict[int, DeviceConfig], int]:
    """The ports of one device by their numbers, in rising order, and how many numbers it has.

    The first console is port 0, which a driver without MULTIPORT finds; a number that is not
    given is the lowest that is free.

    :raises ConfigError: naming the port that has no place
    """
    own = [each for each in devices if each.driver in PORTS and _bus(devices, each) is serial]
    found: dict[int, DeviceConfig] = {}
    for port in own:
        if "nr" in port.properties:
            number = parse_int(port.properties["nr"], port.driver, "nr", 0, MAX_PORTS - 1)
            where = f"-device {port.driver}: nr={number}"
            if number in found:
                raise ConfigError(f"{where}: that port is there already; choose another nr")
            if number == 0 and port.driver != "virtconsole":
                raise ConfigError(f"{where}: port 0 is kept for a virtconsole; give nr=1 or more")
            found[number] = port
    for port in own:
        if "nr" not in port.properties:
            number = 0 if port.driver == "virtconsole" else 1
            while number in found:
                number += 1
            found[number] = port
    given = serial.properties.get("max_ports")
    if given is None:
        count = max([1, *(number + 1 for number in found)])
    else:
        count = parse_int(given, f"-device {SERIAL}", "max_ports", 1, MAX_PORTS)
    beyond = [number for number in found if number >= min(count, MAX_PORTS)]
    if beyond:
        raise ConfigError(
            f"-device {found[beyond[0]].driver}: port {beyond[0]} is one too many for "
            f"max_ports={min(count, MAX_PORTS)}; raise it (at most {MAX_PORTS}) or leave the port "
            "out"
        )
    return dict(sorted(found.items())), count


def create(
    parts: Parts, config: MachineConfig, properties: dict[str, str], loop: EventLoop
) -> VirtioDevice:
    """Make the device with its ports."""
    from pyvmm.chardev.config import ChardevConfig
    from pyvmm.devices.virtio.console import Port, VirtioConsole

    devices = config.devices
    (serial,) = [device for device in devices if device.properties is properties]
    numbers, max_ports = ports(devices, serial)
    made = []
    for number, port in numbers.items():
        chardev = None
        if "chardev" in port.properties:
            name = port.properties["chardev"]
            chardev = parts.chardevs.claim(ChardevConfig("chardev", name, {}, "-device"))
        is_console = port.driver == "virtconsole"
        made.append(
            Port(number, chardev, is_console=is_console, name=port.properties.get("name", ""))
        )
    return VirtioConsole(loop, made, max_ports)


def _bus(devices: list[DeviceConfig], port: DeviceConfig) -> DeviceConfig:
    """The device that a port sits on: that of ``bus=ID.0``, or the last one in front of it."""
    where = f"-device {port.driver}"
    bus = port.properties.get("bus")
    at = next(index for index, device in enumerate(devices) if device is port)
    for device in reversed(devices[:at]):
        if device.driver == SERIAL and bus in (None, f"{device.properties.get('id')}.0"):
            return device
    if bus is not None:
        raise ConfigError(
            f"{where}: bus={shorten(bus)}: there is no such bus; give the id of a {SERIAL} in "
            "front of it, and .0"
        )
    raise ConfigError(f"{where}: there is no bus for it; put -device {SERIAL} in front of it")
