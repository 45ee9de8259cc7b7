"""Locks on disk images: who uses one for what, told by locks on single bytes of it.

The bytes are QEMU's, so that a QEMU and a pyvmm keep each other from a disk image: byte 100 + n is
locked by whoever uses permission n, byte 200 + n by whoever wants nobody else to have it. All
locks are read locks: they do not exclude each other, but show when another looks for them.
Locks of open file descriptions (fcntl(2), F_OFD_SETLK) live as long as the descriptor, through
an exec, and end with the last process that has it.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

READ, WRITE = 0, 1  # QEMU's permissions consistent-read and write
USED, DENIED = 100, 200
#: The file system, or a mount without locks, does not know them.
UNSUPPORTED = (errno.EINVAL, errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
_FLOCK = struct.Struct("@hhqqi4x")  # struct flock of x86-64


class InUseError(OSError):
    """Another process uses the disk image in a way that does not go together with ours.

    :ivar writing: whether the other writes
    """

    def __init__(self, writing: bool) -> None:
        super().__init__(errno.EAGAIN, "the image is in use by another process")
        self.writing = writing


def lock(fd: int, *, writing: bool, share_rw: bool = False, inherited: bool = False) -> None:
    """Lock the disk image; a second call for the same descriptor changes nothing.

    :param share_rw: allow others to write, as cluster file systems need it
    :param inherited: the image before has locked it, and may come back: its locks stay as
        they are if this fails
    :raises InUseError: another has it
    :raises OSError: with one of :data:`UNSUPPORTED`
    """
    used = [READ, WRITE] if writing else [READ]
    denied = [] if share_rw else [WRITE]
    mine = [*(USED + bit for bit in used), *(DENIED + bit for bit in denied)]
    conflicts = [*(DENIED + bit for bit in used), *(USED + bit for bit in denied)]
    if inherited:
        _look(fd, conflicts)
    # First lock, then look: of two that do so at once at least one sees the other.
    for byte in mine:
        fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _flock(fcntl.F_RDLCK, byte))
    try:
        _look(fd, conflicts)
    except InUseError:
        if not inherited:
            _unlock(fd, mine)
        raise


def _look(fd: int, conflicts: list[int]) -> None:
    held = [byte for byte in conflicts if _is_held(fd, byte)]
    if held:
        raise InUseError(USED + WRITE in held or _is_held(fd, USED + WRITE))


def _is_held(fd: int, byte: int) -> bool:
    answer = fcntl.fcntl(fd, fcntl.F_OFD_GETLK, _flock(fcntl.F_WRLCK, byte))
    return bool(_FLOCK.unpack(answer)[0] != fcntl.F_UNLCK)


def _unlock(fd: int, locked: Iterable[int]) -> None:
    for byte in locked:
        fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _flock(fcntl.F_UNLCK, byte))


def _flock(kind: int, byte: int) -> bytes:
    return _FLOCK.pack(kind, os.SEEK_SET, byte, 1, 0)
