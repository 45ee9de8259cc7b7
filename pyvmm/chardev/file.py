"""``-chardev file``: output goes to a file, FIFO or device. There is no input.

What the file does not take (disk full, FIFO without a reader) is dropped and counted: the guest
goes on. Over a live update the descriptor lives on, so nothing is truncated or reordered.
"""

from __future__ import annotations

import errno
import os
import stat

from pyvmm.chardev.fdio import FdChardev
from pyvmm.errors import ConfigError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pyvmm.core.eventloop import EventLoop
    from pyvmm.cpr.handover import Handover


class FileChardev(FdChardev):
    """A file that is written.

    :param append: keep what it holds, rather than truncate it
    :param option: the option that asked for it, for errors
    :raises ConfigError: if it cannot be opened
    :raises VmStateError: if an inherited descriptor is no file
    """

    def __init__(
        self,
        id: str,
        loop: EventLoop,
        handover: Handover,
        *,
        path: str,
        append: bool = False,
        option: str = "-chardev",
    ) -> None:
        super().__init__(id, loop, handover)
        fd = self.parcel.take()
        if fd is None:
            fd = _open(path, append, option)
        elif stat.S_ISSOCK(os.fstat(fd).st_mode):
            self.parcel.close(fd)
            raise self._error(f"inherited descriptor {fd} is no file")
        else:
            self.is_inherited = True
        self.parcel.keep(fd)
        self._open_stream(-1, fd)

    @property
    def filename(self) -> str:
        return "file"


def _open(path: str, append: bool, option: str) -> int:
    flags = os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOCTTY
    flags |= os.O_APPEND if append else os.O_TRUNC
    try:
        # Opening a FIFO to write would wait for a reader.
        return os.open(path, flags | os.O_NONBLOCK, 0o666)
    except OSError as error:
        mend = "give a file you may write"
        if error.errno == errno.ENXIO:
            mend = "start what reads the FIFO first"
        raise ConfigError(
            f"{option}: cannot open path={path!r}: {error.strerror}; {mend}"
        ) from error
