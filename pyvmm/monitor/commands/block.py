"""Disks: which there are, of what, and who has them."""

from __future__ import annotations

import os

from pyvmm.monitor.registry import Command, Context

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from pyvmm.backends.block import BlockFile
    from pyvmm.monitor.registry import Shape

_SECTOR = 512  # unit of st_blocks
_LIMITS = ("bps", "bps_rd", "bps_wr", "iops", "iops_rd", "iops_wr")


def query_block(context: Context) -> list[dict[str, Any]]:
    """Return the disks: the drives, and the block nodes that a device has."""
    users: dict[str, tuple[str, dict[str, Any]]] = {}
    for index, device in enumerate(context.machine.devices):
        properties = device.properties()
        if "drive" in properties:
            path = device.id or f"/machine/unattached/device[{index}]"
            users[properties["drive"]] = path, properties
    found = []
    for id, file in context.machine.drives.items():
        path, properties = users.get(id, ("", {}))
        if not path and not file.config.is_drive:
            continue
        entry = {
            "device": id if file.config.is_drive else "",
            "type": "unknown",
            "removable": False,
            "locked": False,
            "inserted": _inserted(file, properties.get("write-cache", file.config.writeback)),
        }
        if path:
            entry |= {"qdev": path, "io-status": properties["io-status"]}
        found.append(entry)
    return found


def _inserted(file: BlockFile, writeback: bool) -> dict[str, Any]:
    config = file.config
    return {
        "file": config.filename,
        **({} if config.is_drive else {"node-name": config.id}),
        "ro": config.read_only,
        "drv": "raw",
        "backing_file_depth": 0,
        "encrypted": False,
        "detect_zeroes": "off",
        **dict.fromkeys(_LIMITS, 0),
        "image": {
            "filename": config.filename,
            "format": "raw",
            "virtual-size": file.size,
            "actual-size": os.fstat(file.fd).st_blocks * _SECTOR,
        },
        "cache": {
            "writeback": writeback,
            "direct": config.direct,
            "no-flush": config.no_flush,
        },
        "write_threshold": 0,
    }


_INSERTED: Shape = {
    "file": "str",
    "*node-name": "str",
    "ro": "bool",
    "drv": "str",
    "backing_file_depth": "int",
    "encrypted": "bool",
    "detect_zeroes": ("off",),
    **dict.fromkeys(_LIMITS, "int"),
    "image": {"filename": "str", "format": "str", "virtual-size": "int", "actual-size": "int"},
    "cache": {"writeback": "bool", "direct": "bool", "no-flush": "bool"},
    "write_threshold": "int",
}

COMMANDS = (
    Command(
        "query-block",
        query_block,
        returns=[
            {
                "device": "str",
                "*qdev": "str",
                "type": "str",
                "removable": "bool",
                "locked": "bool",
                "*io-status": ("ok", "failed", "nospace"),
                "inserted": _INSERTED,
            }
        ],
    ),
)
