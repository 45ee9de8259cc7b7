"""``virtio-net-device``: a network card on a ``-netdev``."""

from __future__ import annotations

from pyvmm._util.keyval import shorten
from pyvmm.errors import ConfigError
from pyvmm.machine.drivers import Property, chosen, flag, integer, power, text
from pyvmm.machine.drivers.virtio import VirtioDriver

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from pyvmm.core.eventloop import EventLoop
    from pyvmm.devices.virtio.device import VirtioDevice
    from pyvmm.machine.drivers import Values
    from pyvmm.machine.parts import Parts

NAME = "virtio-net-device"
KIND = "virtio-net-"  # on any bus
#: Properties that switch a feature, which the model has as F_NAME.
FLAGS = (
    *("mrg_rxbuf", "status", "csum", "guest_csum", "guest_tso4", "guest_tso6", "guest_ecn"),
    *("host_tso4", "host_tso6", "host_ecn"),
)
#: Of the first device; the next ones count up, as in QEMU.
FIRST_MAC = 0x525400123456
_QUEUE_SIZE = power(16, 1024, "give 256")


def mac(value: str, where: str, _key: str) -> bytes:
    """Return the 6 bytes of ``52:54:00:12:34:56``.

    :raises ConfigError: it is no address that a device can have
    """
    pairs = value.split(":")
    hexadecimal = not "".join(pairs).strip("0123456789abcdefABCDEF")
    if len(pairs) == 6 and hexadecimal and all(len(pair) == 2 for pair in pairs):
        address = bytes.fromhex("".join(pairs))
        if address[0] & 1 == 0 and any(address):  # not of a group
            return address
    raise ConfigError(
        f"{where}: mac={shorten(value)} is no address of a device; give one like 52:54:00:12:34:56"
    )


def create(model: Any, parts: Parts, values: Values, loop: EventLoop) -> VirtioDevice:
    """Return the device, on its back end."""
    from pyvmm.devices.virtio import net

    before = sum(device.name.startswith(KIND) for device in parts.devices)
    assert parts.netdevs is not None
    device: VirtioDevice = model(
        loop,
        parts.netdevs.get(values["netdev"]),
        values["mac"] or (FIRST_MAC + before).to_bytes(6, "big"),
        features=sum(getattr(net, f"F_{name.upper()}") for name in FLAGS if values[name]),
        **chosen(
            values,
            mtu="host_mtu",
            rx_queue_size="rx_queue_size",
            tx_queue_size="tx_queue_size",
        ),
    )
    return device


DRIVER = VirtioDriver(
    NAME,
    help="a network card on a -netdev, netdev=ID",
    properties=(
        Property("netdev", text, host=True, refers="netdev", required="give the id of a -netdev"),
        Property("mac", mac, host=True),
        Property("host_mtu", integer(68, 65535)),  # virtio 1.3, 5.1.4.1
        Property("rx_queue_size", _QUEUE_SIZE),
        Property("tx_queue_size", _QUEUE_SIZE),
        *(Property(name, flag, True) for name in FLAGS),
    ),
    model="pyvmm.devices.virtio.net:VirtioNet",
    create=create,
)
DRIVERS = {DRIVER.name: DRIVER}
