"""``virtio-blk-device``: a disk on a ``-drive`` or ``-blockdev``."""

from __future__ import annotations

import errno

from pyvmm._util.keyval import parse_bool, shorten
from pyvmm.backends.block_config import RERROR, SECTOR, WERROR
from pyvmm.errors import ConfigError
from pyvmm.machine.drivers import Property, choice, chosen, flag, power, text
from pyvmm.machine.drivers.virtio import VirtioDriver

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from pyvmm.backends.block import BlockFile
    from pyvmm.core.eventloop import EventLoop
    from pyvmm.devices.virtio.blk import BlkConfig, VirtioBlk
    from pyvmm.devices.virtio.device import VirtioDevice
    from pyvmm.machine.drivers import Values
    from pyvmm.machine.parts import Parts

MAX_SERIAL = 20


def config(values: Values) -> BlkConfig:
    """Return the properties as the model has them."""
    from pyvmm.devices.virtio.blk import BlkConfig

    return BlkConfig(
        **chosen(
            values,
            drive="drive",
            serial="serial",
            write_cache="write-cache",
            config_wce="config-wce",
            discard="discard",
            write_zeroes="write-zeroes",
            block_size="logical_block_size",
            physical_block_size="physical_block_size",
            queue_size="queue-size",
            werror="werror",
            rerror="rerror",
        )
    )


def create(model: Any, parts: Parts, values: Values, loop: EventLoop) -> VirtioDevice:
    """Return the device, on its drive."""
    file = parts.drives[values["drive"]]

    def report(operation: str, error: OSError, action: str) -> None:
        parts.loop.call_soon(lambda: tell(operation, error, action))

    def tell(operation: str, error: OSError, action: str) -> None:
        _emit(parts, file, operation, error, action)
        if device.retries:
            parts.end.on_io_error()

    device: VirtioBlk = model(loop, file, config(values), report)
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


def _serial(value: str, where: str, _key: str) -> str:
    if not value.isascii() or len(value) > MAX_SERIAL:
        raise ConfigError(
            f"{where}: serial={shorten(value)} is not possible; give at most"
            f" {MAX_SERIAL} ASCII characters"
        )
    return value


def _flag_or_auto(value: str, where: str, key: str) -> bool | None:
    return None if value == "auto" else parse_bool(value, where, key)


def _policy(*known: str) -> Any:
    parse = choice("auto", *known)
    # What the drive says is the default.
    return lambda value, where, key: parse(value, where, key).replace("auto", "")


def _check(values: Values, where: str) -> None:
    logical, physical = values["logical_block_size"], values["physical_block_size"]
    if physical and physical < (logical or 0):
        raise ConfigError(
            f"{where}: physical_block_size={physical} is below logical_block_size={logical};"
            " give a multiple"
        )


DRIVER = VirtioDriver(
    "virtio-blk-device",
    help="a disk on a -drive or -blockdev, drive=ID",
    properties=(
        Property(
            "drive",
            text,
            host=True,
            refers="drive",
            required="give the id of a -drive or -blockdev",
        ),
        Property("serial", _serial),
        Property("write-cache", _flag_or_auto, host=True),
        Property("config-wce", flag),
        Property("discard", flag),
        Property("write-zeroes", flag),
        Property("logical_block_size", power(SECTOR, 4096)),
        Property("physical_block_size", power(SECTOR, 32768)),
        Property("queue-size", power(4, 1024)),
        Property("share-rw", flag, False, host=True),
        Property("werror", _policy(*WERROR), host=True),
        Property("rerror", _policy(*RERROR), host=True),
    ),
    model="pyvmm.devices.virtio.blk:VirtioBlk",
    create=create,
    check=_check,
    own_thread=True,
)
DRIVERS = {DRIVER.name: DRIVER}
