"""``-device virtio-blk-device``: from its properties and the machine's drives to the device."""

from __future__ import annotations

from pyvmm.backends.block_config import BLK_PROPERTIES as PROPERTIES
from pyvmm.backends.block_config import BlkConfig

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pyvmm.core.eventloop import EventLoop
    from pyvmm.devices.virtio.device import VirtioDevice
    from pyvmm.machine.machine import Machine

__all__ = ["PROPERTIES", "check", "create", "load"]


def load() -> type[VirtioDevice]:
    """The class."""
    from pyvmm.devices.virtio.blk import VirtioBlk

    return VirtioBlk


def create(machine: Machine, properties: dict[str, str], loop: EventLoop) -> VirtioDevice:
    """The device, on the drive that the properties name."""
    from pyvmm.devices.virtio.blk import VirtioBlk

    config = BlkConfig(properties)
    return VirtioBlk(loop, machine.drives[config.drive], config)


def check(properties: dict[str, str], _where: str) -> None:
    """Refuse properties that cannot be; whether there is such a drive is found out later.

    :raises ConfigError: naming the property and the mend
    """
    BlkConfig(properties)
