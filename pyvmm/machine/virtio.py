"""The machine's virtio devices: what ``-device virtio-...-device`` takes, and how a device, its
transport and KVM's eventfds are put together.

Imported by machines that have such a device. A driver's own module is imported when the device
is made, not when its options are read.
"""

from __future__ import annotations

import os

from pyvmm._util.keyval import check_keys, shorten
from pyvmm.errors import ConfigError, HostError
from pyvmm.machine import netdev, virtio_blk, virtio_console, virtio_rng
from pyvmm.machine.config import DeviceConfig
from pyvmm.x86 import layout

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from pyvmm.core.eventloop import EventLoop
    from pyvmm.devices.virtio.device import VirtioDevice
    from pyvmm.machine.config import MachineConfig
    from pyvmm.machine.parts import Parts
    from pyvmm.vmstate.fields import Description

    Create = Callable[[Parts, MachineConfig, dict[str, str], EventLoop], VirtioDevice]


class Driver:
    """A driver that ``-device`` knows.

    :param properties: those that it takes, besides ``id``
    :param load: imports its class
    :param create: makes the device; by default the class is called with the loop alone
    :param check: raises ConfigError for properties (second argument: the option, for the
        message) that cannot be; opens nothing
    :param own_thread: whether its queues are served by a thread of their own
    """

    __slots__ = ("check", "create", "load", "own_thread", "properties")

    def __init__(
        self,
        properties: tuple[str, ...],
        load: Callable[[], type[VirtioDevice]],
        create: Create | None = None,
        check: Callable[[dict[str, str], str], None] | None = None,
        own_thread: bool = False,
    ) -> None:
        self.properties = properties
        self.load = load
        self.create: Create = create or (lambda _parts, _config, _properties, loop: load()(loop))
        self.check = check
        self.own_thread = own_thread


def _load_console() -> type[VirtioDevice]:
    from pyvmm.devices.virtio.console import VirtioConsole

    return VirtioConsole


DRIVERS = {
    "virtio-blk-device": Driver(
        virtio_blk.PROPERTIES, virtio_blk.load, virtio_blk.create, virtio_blk.check, own_thread=True
    ),
    "virtio-net-device": Driver(netdev.PROPERTIES, netdev.load, netdev.create, netdev.check),
    "virtio-rng-device": Driver(
        virtio_rng.PROPERTIES, virtio_rng.load, virtio_rng.create, virtio_rng.check
    ),
    virtio_console.SERIAL: Driver(
        virtio_console.PROPERTIES, _load_console, virtio_console.create, virtio_console.check
    ),
}
#: Drivers that sit on one of these.
PORTS = virtio_console.PORTS


def is_virtio(device: DeviceConfig) -> bool:
    """Whether a device has a slot of its own on virtio-mmio."""
    return device.driver in DRIVERS


def parse(driver: str, properties: dict[str, str], where: str) -> DeviceConfig:
    """Check one ``-device``.

    :raises ConfigError: naming the property that cannot be, and the mend
    """
    if driver in PORTS:
        virtio_console.check_port(properties, where)
        return DeviceConfig(driver, properties)
    known = DRIVERS[driver]
    check_keys(properties, ("id", *known.properties), where)
    if known.check is not None:
        known.check(properties, where)
    return DeviceConfig(driver, properties)


def check_devices(devices: list[DeviceConfig]) -> None:
    """See that the devices have room, ids of their own, and go together.

    :raises ConfigError: they do not
    """
    virtio_console.check_devices(devices)
    here = [device for device in devices if is_virtio(device)]
    if len(here) > layout.VIRTIO_MMIO_SLOTS:
        raise ConfigError(
            f"-device {here[-1].driver}: one virtio device too many; at most "
            f"{layout.VIRTIO_MMIO_SLOTS}"
        )
    ids = [device.properties["id"] for device in here if "id" in device.properties]
    for id in ids:
        if ids.count(id) > 1:
            raise ConfigError(f"-device: the id {shorten(id)} is given twice; rename one")


def shape(devices: list[DeviceConfig]) -> str:
    """What of them an update must keep, beside which devices there are: the ports."""
    found = []
    for device in devices:
        if device.driver == virtio_console.SERIAL:
            ports, count = virtio_console.ports(devices, device)
            names = [
                f"{number} {port.driver} {port.properties.get('name', '')}".rstrip()
                for number, port in ports.items()
            ]
            found.append(f"{count} ports: {', '.join(names)}".rstrip())
    return "; ".join(found)


def slots(devices: list[DeviceConfig]) -> list[tuple[DeviceConfig, int, int]]:
    """Each virtio device with the address of its registers and its GSI. The order of the
    options decides, so an update must keep it."""
    return [
        (device, layout.VIRTIO_MMIO + slot * layout.VIRTIO_MMIO_SIZE, layout.IRQ_VIRTIO + slot)
        for slot, device in enumerate(filter(is_virtio, devices))
    ]


def descriptions(devices: list[DeviceConfig]) -> dict[tuple[str, int], Description]:
    """What the virtio devices write into a state, by section and instance."""
    from pyvmm.devices.virtio.mmio import VirtioMmio

    found: dict[tuple[str, int], Description] = {}
    for device, _, _ in slots(devices):
        own = VirtioMmio.description(DRIVERS[device.driver].load())
        instance = sum(name == own.name for name, _ in found)
        found[(own.name, instance)] = own
    return found


def add_devices(parts: Parts, config: MachineConfig) -> None:
    """Make all of them."""
    for device, base, gsi in slots(config.devices):
        _add(parts, config, device, base, gsi)


def _add(parts: Parts, machine: MachineConfig, config: DeviceConfig, base: int, gsi: int) -> None:
    from pyvmm.core.iothread import IoThread
    from pyvmm.devices.virtio import mmio

    driver = DRIVERS[config.driver]
    slot = gsi - layout.IRQ_VIRTIO
    thread = IoThread(f"virtio-{slot}", parts.end.on_thread_error) if driver.own_thread else None
    device = driver.create(parts, machine, config.properties, thread.loop if thread else parts.loop)
    kick_fds = [_eventfd() for _ in device.queue_sizes]
    irqs = parts.platform.irqs
    transport = mmio.VirtioMmio(
        device,
        parts.memory,
        base=base,
        gsi=gsi,
        kick_fds=kick_fds,
        pulse=irqs.pulse(gsi, device.name),
        thread=thread,
    )
    transport.id = config.properties.get("id", "")
    parts.devices.append(parts.opened.add(transport))
    parts.virtio_mmio.append((base, mmio.SIZE, gsi))
    parts.mmio.add(base, mmio.SIZE, transport, device.name, width=mmio.WIDTH)
    for index, fd in enumerate(kick_fds):
        irqs.kick(base + mmio.QUEUE_NOTIFY, index, fd, device.name)


def _eventfd() -> int:
    try:
        return os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
    except OSError as error:
        raise HostError(
            f"-device: {error.strerror}: each queue of a virtio device needs a descriptor; raise"
            " the limit (ulimit -n), or give less ports or devices"
        ) from None
