"""``-device virtio-blk-device``: from its properties and the machine's drives to the device."""

from __future__ import annotations

import errno

from pyvmm.backends.block_config import BLK_PROPERTIES as PROPERTIES
from pyvmm.backends.block_config import BlkConfig

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pyvmm.backends.block import BlockFile
    from pyvmm.core.eventloop import EventLoop
    from pyvmm.devices.virtio.device import VirtioDevice
    from pyvmm.machine.config import MachineConfig
    from pyvmm.machine.parts import Parts

__all__ = ["PROPERTIES", "check", "create", "load"]


def load() -> type[VirtioDevice]:
    """The class."""
    from pyvmm.devices.virtio.blk import VirtioBlk

    return VirtioBlk


def create(
    parts: Parts, _config: MachineConfig, properties: dict[str, str], loop: EventLoop
) -> VirtioDevice:
    """The device, on the drive that the properties name."""
    from pyvmm.devices.virtio.blk import VirtioBlk

    config = BlkConfig(properties)
    file = parts.drives[config.drive]

    def report(operation: str, error: OSError, action: str) -> None:
        parts.loop.call_soon(lambda: tell(operation, error, action))

    def tell(operation: str, error: OSError, action: str) -> None:
        _emit(parts, file, operation, error, action)
        if device.retries:
            parts.end.on_io_error()

    device = VirtioBlk(loop, file, config, report)
    return device


def _emit(parts: Parts, file: BlockFile, operation: str, error: OSError, action: str) -> None:
    id = file.config.id
    properties = [device.properties() for device in parts.devices]
    index = [one.get("drive") for one in properties].index(id)
    parts.events.emit(
        "BLOCK_IO_ERROR",
        {
            "qom-path": f"/machine/unattached/device[{index}]",
            "device": id if file.config.is_drive else "",
            **({} if file.config.is_drive else {"node-name": id}),
            "operation": operation,
            "action": action,
            "nospace": error.errno == errno.ENOSPC,
            "reason": error.strerror or str(error),
        },
    )


def check(properties: dict[str, str], _where: str) -> None:
    """Refuse properties that cannot be; whether there is such a drive is found out later.

    :raises ConfigError: naming the property and the mend
    """
    BlkConfig(properties)
