"""``-netdev`` and ``-device virtio-net-device``: from the options to back end and device."""

from __future__ import annotations

from pyvmm._util.keyval import parse_bool, parse_int, shorten
from pyvmm.errors import ConfigError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pyvmm.core.eventloop import EventLoop
    from pyvmm.devices.virtio.device import VirtioDevice
    from pyvmm.machine.config import MachineConfig
    from pyvmm.machine.parts import Parts

DRIVER = "virtio-net-device"
#: As in ``devices.virtio.net``, which is not imported to read options.
FLAGS = (
    *("mrg_rxbuf", "status", "csum", "guest_csum", "guest_tso4", "guest_tso6", "guest_ecn"),
    *("host_tso4", "host_tso6", "host_ecn"),
)
PROPERTIES = ("netdev", "mac", "host_mtu", "rx_queue_size", "tx_queue_size", *FLAGS)
#: Of the first device; the next ones count up, as in QEMU.
FIRST_MAC = 0x525400123456
MTUS = (68, 65535)  # virtio 1.3, 5.1.4.1
QUEUE_SIZES = (16, 1024)


def check(properties: dict[str, str], where: str) -> None:
    """See that the properties of a device are possible.

    :raises ConfigError: naming the one that is not, and the mend
    """
    if "netdev" not in properties:
        raise ConfigError(f"{where}: netdev= is missing; give the id of a -netdev")
    if "mac" in properties:
        parse_mac(properties["mac"], where)
    if "host_mtu" in properties:
        parse_int(properties["host_mtu"], where, "host_mtu", *MTUS)
    for key in ("rx_queue_size", "tx_queue_size"):
        if key in properties:
            size = parse_int(properties[key], where, key, *QUEUE_SIZES)
            if size & size - 1:
                raise ConfigError(f"{where}: {key}={size} is no power of two; give 256")
    for key in FLAGS:
        if key in properties:
            parse_bool(properties[key], where, key)


def check_all(config: MachineConfig) -> None:
    """See that devices and back ends belong together.

    :raises ConfigError: they do not
    """
    devices = [device for device in config.devices if device.driver == DRIVER]
    if devices or config.netdevs:
        from pyvmm.backends.net.config import check_netdevs

        check_netdevs(config.netdevs, [device.properties["netdev"] for device in devices])


def parse_mac(text: str, where: str) -> bytes:
    """The 6 bytes of ``52:54:00:12:34:56``.

    :raises ConfigError: it is no address that a device can have
    """
    pairs = text.split(":")
    hexadecimal = not "".join(pairs).strip("0123456789abcdefABCDEF")
    if len(pairs) == 6 and hexadecimal and all(len(pair) == 2 for pair in pairs):
        mac = bytes.fromhex("".join(pairs))
        if mac[0] & 1 == 0 and any(mac):  # not of a group
            return mac
    raise ConfigError(
        f"{where}: mac={shorten(text)} is no address of a device; give one like 52:54:00:12:34:56"
    )


def load() -> type[VirtioDevice]:
    """The class of the device."""
    from pyvmm.devices.virtio.net import VirtioNet

    return VirtioNet


def create(
    parts: Parts, _config: MachineConfig, properties: dict[str, str], loop: EventLoop
) -> VirtioDevice:
    """The device, on its back end."""
    from pyvmm.devices.virtio import net

    where = f"-device {DRIVER}"
    before = sum(device.name == DRIVER for device in parts.devices)
    mac = (FIRST_MAC + before).to_bytes(6, "big")
    if "mac" in properties:
        mac = parse_mac(properties["mac"], where)

    def number(key: str, default: int, least: int, most: int) -> int:
        return parse_int(properties[key], where, key, least, most) if key in properties else default

    flags = [key for key in FLAGS if parse_bool(properties.get(key, "on"), where, key)]
    assert parts.netdevs is not None
    return net.VirtioNet(
        loop,
        parts.netdevs.get(properties["netdev"]),
        mac,
        mtu=number("host_mtu", 0, *MTUS),
        features=sum(net.FLAGS[key] for key in flags),
        rx_queue_size=number("rx_queue_size", net.QUEUE_SIZE, *QUEUE_SIZES),
        tx_queue_size=number("tx_queue_size", net.QUEUE_SIZE, *QUEUE_SIZES),
    )
