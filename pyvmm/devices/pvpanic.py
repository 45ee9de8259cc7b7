"""pvpanic (QEMU's docs/specs/pvpanic): a port by which a guest kernel says that it panicked.

Called on vCPU threads only; has no state.
"""

from __future__ import annotations

from pyvmm.devices.base import Device

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

IOPORT = 0x505

PANICKED = 0x01
CRASH_LOADED = 0x02  # panicked, but a crash kernel takes over
SHUTDOWN = 0x04  # a power-off that does not need ACPI
EVENTS = (PANICKED, CRASH_LOADED, SHUTDOWN)


class PvPanic(Device):
    """The port. A read tells the events that are understood.

    :param report: called with one of :data:`EVENTS`
    :param ioport: the port, for ``info qtree``
    """

    name = "pvpanic"

    def __init__(self, report: Callable[[int], None], *, ioport: int = IOPORT) -> None:
        super().__init__()
        self._report = report
        self.ioport = ioport

    def properties(self) -> dict[str, Any]:
        return {"ioport": self.ioport, "events": sum(EVENTS)}

    def on_read(self, offset: int, size: int) -> int:
        return sum(EVENTS)

    def on_write(self, offset: int, size: int, value: int) -> None:
        # The gravest alone: what follows a panic is the operator's to say.
        for event in EVENTS:
            if value & event:
                self._report(event)
                return
