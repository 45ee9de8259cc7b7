"""Bytes to be loaded, read piece by piece: of a file on the host (kernel, initrd, ROM), or what it
unpacks to.

The file may be anything and may change while it is read, so each read is bounded by the size
seen at open, and a short one is an error. Main thread only.
"""

from __future__ import annotations

import os
import stat

from pyvmm._util.sizes import format_size
from pyvmm.errors import ConfigError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Self

    from pyvmm.memory.guest import GuestMemory

SIZE_MAX = 4 << 30
"""All of it is loaded below 4 GiB, and a kernel's debug information fits in this too."""


class Blob:
    """Bytes by offset; ``size`` of them, which does not change.

    :param path: the file that they are from
    :param option: what the operator named it with, e.g. ``-kernel``; it opens every error
    """

    __slots__ = ("option", "path", "size")

    def __init__(self, path: str, option: str) -> None:
        self.path = path
        self.option = option
        self.size = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Give back what it occupies."""

    def error(self, problem: str) -> ConfigError:
        """Return the error that says what is wrong with this file."""
        shown = self.path if self.path.isprintable() else repr(self.path)
        return ConfigError(f"{self.option} {shown}: {problem}")

    def read(self, offset: int, size: int) -> bytes:
        """Return *size* bytes; the caller caps the size.

        :raises ConfigError: they are not all within it
        """
        self._check(offset, size)
        return self._read(offset, size)

    def head(self, size: int) -> bytes:
        """Return the first *size* bytes, fewer if it is shorter."""
        return self.read(0, min(size, self.size))

    def copy(self, offset: int, size: int, memory: GuestMemory, gpa: int) -> None:
        """Copy a part of it to guest memory, which the caller has checked is there.

        :raises ConfigError: it is not all within it
        :raises RamError: the host cannot back the memory
        """
        self._check(offset, size)
        memory.touch(gpa, size)
        with memory.view(gpa, size) as view:
            self._copy(offset, view)

    def _check(self, offset: int, size: int) -> None:
        if offset < 0 or size < 0 or offset + size > self.size:
            raise self.error(f"the file ends before {offset:#x} + {size:#x}; it is truncated")

    def _read(self, offset: int, size: int) -> bytes:
        raise NotImplementedError

    def _copy(self, offset: int, view: memoryview) -> None:
        raise NotImplementedError


class DataBlob(Blob):
    """Bytes that are in the VMM's memory already: *data*, which *origin* unpacks to."""

    __slots__ = ("_data",)

    def __init__(self, origin: Blob, data: bytes) -> None:
        super().__init__(origin.path, origin.option)
        self._data = data
        self.size = len(data)

    def _read(self, offset: int, size: int) -> bytes:
        return self._data[offset : offset + size]

    def _copy(self, offset: int, view: memoryview) -> None:
        view[:] = memoryview(self._data)[offset : offset + len(view)]


class FileBlob(Blob):
    """A regular file, open for reading. ``size`` in bytes is fixed at open.

    :param fd: the file, if it is open already: it stays the caller's
    :raises ConfigError: it cannot be opened, is not a regular file, is empty or over *limit*
    """

    __slots__ = ("_fd", "_owned")

    def __init__(
        self, path: str, option: str, limit: int = SIZE_MAX, *, fd: int | None = None
    ) -> None:
        super().__init__(path, option)
        self._owned = fd is None
        self._fd = self._open() if fd is None else fd
        try:
            status = os.fstat(self._fd)
            self.size = status.st_size
            if not stat.S_ISREG(status.st_mode):
                raise self.error("not a regular file; name one")
            if not self.size:
                raise self.error("the file is empty; build or copy it again")
            if self.size > limit:
                raise self.error(
                    f"{self.size} bytes, larger than {format_size(limit)}; name a smaller file"
                )
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close the file."""
        if self._owned:
            os.close(self._fd)

    def lend(self) -> int:
        """Return the descriptor, which is the caller's from now on."""
        self._owned = False
        return self._fd

    def mark(self) -> tuple[int, int]:
        """Return what differs once the file was written to: its size, and its time in ns."""
        status = os.fstat(self._fd)
        return status.st_size, status.st_mtime_ns

    def _open(self) -> int:
        try:
            # Without O_NONBLOCK the open of a FIFO would wait for a writer for ever.
            flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY
            return os.open(self.path, flags)
        except OSError as error:
            raise self._unreadable(error) from error
        except ValueError as error:  # a NUL in the path
            raise self.error(f"{error}; name a readable file") from error

    def _read(self, offset: int, size: int) -> bytes:
        data = b""
        try:
            while len(data) < size:
                more = os.pread(self._fd, size - len(data), offset + len(data))
                if not more:
                    raise self._shrunk()
                data = data + more if data else more
        except OSError as error:
            raise self._unreadable(error) from error
        return data

    def _copy(self, offset: int, view: memoryview) -> None:
        # Straight into guest memory: kernels and initial RAM disks have tens of megabytes.
        done = 0
        try:
            while done < len(view):
                count = os.preadv(self._fd, [view[done:]], offset + done)
                if not count:
                    raise self._shrunk()
                done += count
        except OSError as error:
            raise self._unreadable(error) from error

    def _shrunk(self) -> ConfigError:
        return self.error("the file shrank while it was read; try again")

    def _unreadable(self, error: OSError) -> ConfigError:
        return self.error(f"{os.strerror(error.errno or 0)}; name a readable file")
