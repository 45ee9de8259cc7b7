"""What monitors of every kind do beside being front ends of a chardev."""

from __future__ import annotations

from pyvmm.chardev.base import Frontend
from pyvmm.cpr.handover import Passenger

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


def take_failure(migration: Any) -> str:
    """Return the reply to a command that waited for an update which failed after the exec; empty if
    none failed, or another command has had the reply."""
    error = migration.take_error()
    return f"Error: {error}\n" if error else ""


class MonitorFrontend(Frontend, Passenger):
    """A monitor. Main loop thread only."""

    def load_state(self, state: bytes) -> None:
        """Go on where the image before a live update was; before the chardev is attached.

        :raises VmStateError: impossible state
        """

    def close(self) -> None:
        """The machine ends."""
