"""A state that waits in a file: ``file:PATH[,offset=N]``. How files are written and read is in
``uri``; here is what an update adds to that."""

from __future__ import annotations

import os

from pyvmm.core.threads import Event, report_crash, spawn
from pyvmm.errors import HostError, MigrationError
from pyvmm.migration.channel import Channel, memory, read_memory
from pyvmm.migration.uri import FileUri

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from pyvmm.cpr.handover import Handover

# How long the guest stands for a disk that the state is written to. It takes the page cache less
# than a millisecond, and a disk that is out of breath some more.
PATIENCE_S = 2.0


class FileChannel(Channel):
    """One file.

    :raises MigrationError: with QEMU's texts, if ``uri`` names none
    """

    def __init__(self, uri: str) -> None:
        self.text = uri
        self._uri = FileUri(uri)
        self._fd = -1

    def check(self) -> None:
        self._uri.check()

    def prepare(self) -> None:
        self._fd = self._uri.open_write()

    def write(self, data: bytes, handover: Handover) -> None:
        """Write the state, by a thread, which is left alone with the file if the disk hangs."""
        fd, self._fd = self._fd, -1
        ended, is_wanted = Event(), True
        failures: list[MigrationError] = []

        def write() -> None:
            try:
                self._uri.write(fd, data, lambda: is_wanted)
            except MigrationError as error:
                failures.append(error)
            finally:
                os.close(fd)
                ended.set()

        try:
            spawn(write, report_crash)
        except HostError:
            write()  # the host allows no more threads
        if not ended.wait(PATIENCE_S):
            is_wanted = False
            raise MigrationError(
                f"Could not write '{self._uri.path}': its disk did not take the state within"
                f" {PATIENCE_S:.0f} s; wait for the host, or name another file"
            )
        if failures:
            raise failures[0]

    def discard(self, handover: Handover) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def read(self, handover: Handover) -> bytes:
        """Return the whole state, if it is the same as the way back's copy. Others may have reached
        the file, and a bit that was flipped in a register's value looks like any other state."""
        data = self._uri.read()
        copy_fd = memory(handover).peek()
        if copy_fd is not None and data != read_memory(copy_fd):
            raise MigrationError(f"'{self._uri.path}' is not the state that was saved")
        return data

    def release(self, handover: Handover) -> None:
        # The way back's copy is given up; the file stays.
        fd = memory(handover).take()
        if fd is not None:
            memory(handover).close(fd)

    def append(self, make: Callable[[], bytes]) -> None:
        self._uri.append(make())

    def matches(self, incoming: str) -> bool:
        try:
            return FileUri(incoming) == self._uri
        except MigrationError:
            return False
