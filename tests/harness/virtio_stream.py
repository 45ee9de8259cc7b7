"""A chardev whose other end is a socket of the test's, with little room in between."""

import socket

from pyvmm.chardev.fdio import FdChardev
from pyvmm.cpr.handover import Handover


class Stream(FdChardev):
    """One end of a socket."""

    filename = "stream"

    def __init__(self, loop):
        super().__init__("stream", loop, Handover())
        ours, self.peer = socket.socketpair()
        ours.setblocking(False)
        self.peer.setblocking(False)
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4608)
        self._open_stream(ours.detach(), -1)
        self._out = self._in

    def close(self):
        super().close()
        self.peer.close()


def arrived(theirs):
    found = b""
    try:
        while data := theirs.recv(1 << 20):
            found += data
    except BlockingIOError:
        pass
    return found
