"""Descriptors that a peer sends along with its bytes over a Unix socket (SCM_RIGHTS, unix(7)).

They wait here until a command asks for one. A peer can send hundreds: only the newest few
wait, the others are closed. Loop thread only.
"""

from __future__ import annotations

import _socket
import struct

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pyvmm.cpr.handover import Parcel

MAX_FDS = 16
_INT = struct.Struct("i")
_SPACE = _socket.CMSG_SPACE(MAX_FDS * _INT.size)


class Rights:
    """The descriptors that one peer sent.

    :param parcel: what is preserved over an exec
    """

    def __init__(self, parcel: Parcel) -> None:
        self._parcel = parcel
        self._waiting: list[int] = []
        for fd in parcel.take_all().values():
            self._add(fd)

    def receive(self, fd: int, count: int) -> bytes:
        """Return what read(2) would, and keep the descriptors that come along.

        :raises OSError: as of recvmsg(2)
        """
        sock = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM, 0, fileno=fd)
        try:
            # Close-on-exec from the start: no helper must inherit what a client sent.
            data, control, _flags, _peer = sock.recvmsg(count, _SPACE, _socket.MSG_CMSG_CLOEXEC)
        finally:
            sock.detach()
        for level, kind, value in control:
            if (level, kind) == (_socket.SOL_SOCKET, _socket.SCM_RIGHTS):
                # The last one is cut short if the sender had more than there is space for.
                whole = value[: len(value) - len(value) % _INT.size]
                for (number,) in _INT.iter_unpack(whole):
                    self._add(number)
        return bytes(data)

    def take(self) -> int | None:
        """Return the oldest descriptor, which the caller owns then; None if none waits."""
        if not self._waiting:
            return None
        fd = self._waiting.pop(0)
        self._parcel.forget(fd)
        return fd

    def close(self) -> None:
        """The peer is gone: nobody will ask for them."""
        while self._waiting:
            self._drop_oldest()

    def _add(self, fd: int) -> None:
        self._waiting.append(fd)
        self._parcel.keep(fd, fd)
        if len(self._waiting) > MAX_FDS:
            self._drop_oldest()

    def _drop_oldest(self) -> None:
        fd = self._waiting.pop(0)
        self._parcel.close(fd, fd)
