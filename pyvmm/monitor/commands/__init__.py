"""The commands, grouped by subject; :func:`build_registry` is the list of all of them."""

from __future__ import annotations

from pyvmm.monitor.commands import devices, human, memory, migration, status
from pyvmm.monitor.registry import Registry


def build_registry() -> Registry:
    """All commands of pyvmm."""
    return Registry(
        [
            *status.COMMANDS,
            *devices.COMMANDS,
            *memory.COMMANDS,
            *migration.COMMANDS,
            *human.COMMANDS,
        ]
    )
