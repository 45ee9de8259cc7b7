"""Where the state of an update waits for the next image: a file, or memory that no user sees."""

from __future__ import annotations

import os

from pyvmm.core.threads import Event, report_crash, spawn
from pyvmm.errors import HostError, MigrationError
from pyvmm.vmstate.stream import MAX_SIZE

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from pyvmm.cpr.fdstore import FdStore
    from pyvmm.migration.uri import FileUri

STATE_FD = "cpr/vmstate"
# How long the guest stands for a disk that the state is written to. It takes the page cache less
# than a millisecond, and a disk that is out of breath some more.
PATIENCE_S = 2.0


class FileTarget:
    """``file:PATH[,offset=N]``."""

    def __init__(self, uri: FileUri) -> None:
        self.text = uri.text
        self._uri = uri
        self._fd = -1

    def check(self) -> None:
        """In a process that no update made: see that there is a state to load, before anything
        is opened.

        :raises MigrationError: if there is none
        """
        self._uri.check()

    def prepare(self) -> None:
        """Open for writing, while the guest runs.

        :raises MigrationError: if that cannot be
        """
        self._fd = self._uri.open_write()

    def write(self, data: bytes, fds: FdStore) -> None:
        """Write the state; whole or not at all. By a thread, which is left alone with it if the
        disk hangs: the guest stands meanwhile.

        :raises MigrationError: e.g. when the disk is full, or does not answer
        """
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

    def discard(self, fds: FdStore) -> None:
        """The update does not take place."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def read(self, fds: FdStore) -> bytes:
        """The whole state.

        The way back's copy tells whether others reached the file: a bit that was flipped in a
        register's value looks like any other state.

        :raises MigrationError: if it cannot be read, or is not what was saved
        """
        data = self._uri.read()
        copy_fd = fds.peek(STATE_FD)
        if copy_fd is not None and data != _read_memory(copy_fd):
            raise MigrationError(f"'{self._uri.path}' is not the state that was saved")
        return data

    def release(self, fds: FdStore) -> None:
        """The guest runs: the way back's copy is of no use any more. The file stays."""
        fd = fds.take(STATE_FD)
        if fd is not None:
            os.close(fd)

    def append(self, make: Callable[[], bytes]) -> None:
        """Add what only tools read, once the guest runs; nothing happens if it cannot be."""
        self._uri.append(make())

    def matches(self, incoming: str) -> bool:
        """Whether ``-incoming`` names the same place."""
        from pyvmm.migration.uri import FileUri

        try:
            return FileUri(incoming) == self._uri
        except MigrationError:
            return False


class MemoryTarget:
    """``memfd:``: a memfd that is handed over like guest memory."""

    text = "memfd:"

    def __init__(self) -> None:
        self._fd = -1

    def check(self) -> None:
        """In a process that no update made: there is no state to load.

        :raises MigrationError: always
        """
        raise _nothing_handed_over()

    def prepare(self) -> None:
        """Nothing can go wrong yet."""

    def write(self, data: bytes, fds: FdStore) -> None:
        """Write the state and preserve it."""
        fd = os.memfd_create("vmstate", os.MFD_CLOEXEC)
        fds.keep(STATE_FD, fd)
        while data:
            data = data[os.write(fd, data) :]

    def discard(self, fds: FdStore) -> None:
        """The update does not take place."""
        fd = fds.kept().get((STATE_FD, 0))
        if fd is not None:
            fds.forget(STATE_FD)
            os.close(fd)

    def read(self, fds: FdStore) -> bytes:
        """The whole state, once. It stays open: a way back needs it again.

        :raises MigrationError: if there is none
        """
        fd = fds.take(STATE_FD)
        if fd is None:
            raise _nothing_handed_over()
        self._fd = fd
        return _read_memory(fd)

    def release(self, fds: FdStore) -> None:
        """The guest runs: the state is of no use any more."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def append(self, make: Callable[[], bytes]) -> None:
        """No tool sees this state."""

    def matches(self, incoming: str) -> bool:
        """Whether ``-incoming`` names the same place."""
        return incoming == self.text


Target = FileTarget | MemoryTarget


def parse(uri: str) -> Target:
    """The target that a URI names.

    :raises MigrationError: with QEMU's texts
    """
    if uri == MemoryTarget.text:
        return MemoryTarget()
    # Time of an update's pause for those that need none; imported ahead by ``cli``.
    from pyvmm.migration.uri import FileUri

    return FileTarget(FileUri(uri))


def _read_memory(fd: int) -> bytes:
    return os.pread(fd, min(os.fstat(fd).st_size, MAX_SIZE), 0)


def _nothing_handed_over() -> MigrationError:
    return MigrationError("-incoming memfd: is what an update adds; no state was handed over")
