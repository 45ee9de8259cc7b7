"""Where the state of an update waits for the next image: what every such place offers, and the one
that needs no name, memory that no user sees.

Others have a module each, which is imported for a URI that names one.
"""

from __future__ import annotations

import os

from pyvmm.cpr.handover import CPR
from pyvmm.errors import MigrationError
from pyvmm.vmstate.stream import MAX_SIZE

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from pyvmm.cpr.handover import Handover, Parcel


class Channel:
    """One place, which the old image writes to and the new one reads from.

    :ivar text: its URI
    :ivar is_lasting: whether a state there may be loaded when the host has been started again, and
        others can change it
    """

    text = ""
    is_lasting = True

    def check(self) -> None:
        """In a process that no update made: see that there is a state to load, before anything
        is opened.

        :raises MigrationError: if there is none
        """

    def prepare(self) -> None:
        """Do what can fail of a write, while the guest runs.

        :raises MigrationError: if that cannot be
        """

    def reserve(self, handover: Handover) -> None:
        """Take what a write needs of what the update hands over. Idempotent."""

    def write(self, data: bytes, handover: Handover) -> None:
        """Write the state; whole or not at all.

        :raises MigrationError: e.g. when the disk is full, or does not answer
        """
        raise NotImplementedError

    def discard(self, handover: Handover) -> None:
        """The update does not take place: give back what it took. Idempotent."""

    def read(self, handover: Handover) -> bytes:
        """Return the whole state, which a way back can still read.

        :raises MigrationError: if it cannot be read, or is not what was saved
        """
        raise NotImplementedError

    def release(self, handover: Handover) -> None:
        """The guest runs: no way back needs the state any more."""

    def append(self, make: Callable[[], bytes]) -> None:
        """Add what only tools read, once the guest runs; nothing happens if it cannot be."""

    def matches(self, incoming: str) -> bool:
        """Return whether ``-incoming`` names the same place."""
        return incoming == self.text


class MemoryChannel(Channel):
    """``memfd:``: a memfd that is handed over like guest memory."""

    text = "memfd:"
    is_lasting = False

    def __init__(self) -> None:
        self._fd: int | None = None

    def check(self) -> None:
        raise _nothing_handed_over()

    def reserve(self, handover: Handover) -> None:
        if memory(handover).kept() is None:
            memory(handover).keep(os.memfd_create("vmstate", os.MFD_CLOEXEC))

    def write(self, data: bytes, handover: Handover) -> None:
        self.reserve(handover)
        fd = memory(handover).kept()
        assert fd is not None
        while data:
            data = data[os.write(fd, data) :]

    def discard(self, handover: Handover) -> None:
        fd = memory(handover).kept()
        if fd is not None:
            memory(handover).close(fd)

    def read(self, handover: Handover) -> bytes:
        self._fd = memory(handover).take()
        if self._fd is None:
            raise _nothing_handed_over()
        return read_memory(self._fd)

    def release(self, handover: Handover) -> None:
        if self._fd is not None:
            memory(handover).close(self._fd)
            self._fd = None


def memory(handover: Handover) -> Parcel:
    """Return the parcel of the state in memory: the state itself, or a copy for the way back."""
    return handover.parcel(CPR, "vmstate")


def read_memory(fd: int) -> bytes:
    """Return the state in a memfd."""
    return os.pread(fd, min(os.fstat(fd).st_size, MAX_SIZE), 0)


def _nothing_handed_over() -> MigrationError:
    return MigrationError("-incoming memfd: is what an update adds; no state was handed over")
