"""The commands, grouped by subject; :func:`build_registry` is the list of all of them."""

from __future__ import annotations

from pyvmm.monitor.commands import (
    block,
    chardev,
    devices,
    fds,
    human,
    memory,
    migration,
    network,
    pci,
    qom,
    status,
)
from pyvmm.monitor.registry import Registry


def build_registry() -> Registry:
    """Return all commands of pyvmm."""
    return Registry(
        [
            *status.COMMANDS,
            *devices.COMMANDS,
            *qom.COMMANDS,
            *chardev.COMMANDS,
            *block.COMMANDS,
            *network.COMMANDS,
            *pci.COMMANDS,
            *fds.COMMANDS,
            *memory.COMMANDS,
            *migration.COMMANDS,
            *human.COMMANDS,
        ]
    )
