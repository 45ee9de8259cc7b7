"""An image file on the host, read piece by piece: a kernel, an initrd or a ROM.

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
    from pyvmm.memory.guest import GuestMemory

IMAGE_MAX = 4 << 30
"""Images are loaded below 4 GiB, and a kernel's debug information fits in this too."""
_STEP = 1 << 20


class ImageFile:
    """A regular file, open for reading. ``size`` in bytes is fixed at open.

    :param option: what the operator named it with, e.g. ``-kernel``; it opens every error
    :raises ConfigError: it cannot be opened, is not a regular file, is empty or over *limit*
    """

    __slots__ = ("_fd", "_option", "path", "size")

    def __init__(self, path: str, option: str, limit: int = IMAGE_MAX) -> None:
        self.path = path
        self._option = option
        try:
            # Without O_NONBLOCK the open of a FIFO would wait for a writer for ever.
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
        except (OSError, ValueError) as error:  # ValueError: a NUL in the path
            reason = os.strerror(error.errno or 0) if isinstance(error, OSError) else str(error)
            raise self.error(f"{reason}; name a readable file") from error
        try:
            status = os.fstat(self._fd)
            self.size = status.st_size
            if not stat.S_ISREG(status.st_mode):
                raise self.error("not a regular file; name one")
            if not self.size:
                raise self.error("the file is empty; build or copy it again")
            if self.size > limit:
                raise self.error(f"larger than {format_size(limit)}; name a smaller file")
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> ImageFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        os.close(self._fd)

    def error(self, problem: str) -> ConfigError:
        """Return the error that says what is wrong with this file."""
        shown = self.path if self.path.isprintable() else repr(self.path)
        return ConfigError(f"{self._option} {shown}: {problem}")

    def read(self, offset: int, size: int) -> bytes:
        """Return *size* bytes; the caller caps the size.

        :raises ConfigError: they are not all within the file
        """
        if offset < 0 or size < 0 or offset + size > self.size:
            raise self.error(f"the file ends before {offset:#x} + {size:#x}; it is truncated")
        try:
            data = os.pread(self._fd, size, offset)
            while len(data) < size:
                more = os.pread(self._fd, size - len(data), offset + len(data))
                if not more:
                    raise self.error("the file shrank while it was read; try again")
                data += more
        except OSError as error:
            raise self.error(f"{os.strerror(error.errno or 0)}; name a readable file") from error
        return data

    def head(self, size: int) -> bytes:
        """Return the first *size* bytes, fewer if the file is shorter."""
        return self.read(0, min(size, self.size))

    def copy(self, offset: int, size: int, memory: GuestMemory, gpa: int) -> None:
        """Copy a part of the file to guest memory, which the caller has checked is there."""
        for done in range(0, size, _STEP):
            memory.write(gpa + done, self.read(offset + done, min(_STEP, size - done)))
