"""Finds the peer of a stream socket: listens or calls, one connection at a time.

A listener stays open while a client is there; further clients wait in its backlog until that
one goes. Listener and connection are preserved over a live update, in the owner's parcel,
so no client notices and no connect() is refused. Loop thread only.

It stands on ``_socket``, because ``socket`` takes 5 ms to import, all within the pause.
"""

from __future__ import annotations

import _socket
import errno
import os
import select
import stat

from pyvmm._util import log
from pyvmm.chardev.address import STREAM_TYPE
from pyvmm.core.eventloop import READABLE, WRITABLE
from pyvmm.errors import ConfigError, VmStateError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from pyvmm.chardev.address import Address
    from pyvmm.core.eventloop import EventLoop, Timer
    from pyvmm.cpr.handover import Parcel

STREAM, LISTENER = 0, 1
_CONNECT_TIMEOUT_S = 10
_PATIENCE_MS = 100  # for an answer, while the guest runs
_RETRY_S = 1.0  # after an accept that failed for want of descriptors or memory


class Connector:
    """Listener or caller of one stream.

    :param parcel: what the owner takes from the image before, and gives to the next
    :param address: where to listen, or whom to call
    :param adopt: takes each connection's descriptor: nonblocking, preserved, the owner's
        until :meth:`lost`
    :param server: whether to listen
    :param reconnect_s: for a client: call again so many seconds after a loss; 0 for never,
        but for one attempt after an update
    :param nodelay: send small TCP segments at once
    :param running: whether the guest runs: a call that takes long goes on in the background
    """

    def __init__(
        self,
        parcel: Parcel,
        loop: EventLoop,
        *,
        address: Address,
        adopt: Callable[[int], None],
        server: bool = False,
        reconnect_s: float = 0,
        nodelay: bool = False,
        running: bool = False,
    ) -> None:
        self.address = address
        self.server = server
        self._parcel = parcel
        self._loop = loop
        self._adopt = adopt
        self._reconnect_s = reconnect_s
        self._nodelay = nodelay
        self._running = running
        self._problem: ConfigError | None = None  # of the latest call
        self._opened = False
        self._listener: _socket.socket | None = None
        self._inherited: _socket.socket | None = None
        self._calling: _socket.socket | None = None
        self._timer: Timer | None = None
        self._closed = False

    def open(self) -> bool:
        """Listen or call, or go on with what was inherited; return whether a connection was.

        :raises ConfigError: if the address cannot be used; for a client that does not
            reconnect, also if nobody answers
        :raises VmStateError: if an inherited descriptor is not the socket it should be
        """
        try:
            is_inherited = self._open()
            self._opened = True
            return is_inherited
        except BaseException:
            # The image before needs its name, too, if it has to come back.
            if self._listener is not None and self._listener is self._inherited:
                self._listener = None
                self._parcel.close(self._inherited.detach(), LISTENER)
            raise

    def _open(self) -> bool:
        if self.server:
            self._listener = self._inherited = self._take(LISTENER, listening=True)
            if self._listener is not None and not self.address.matches(self._listener):
                # The new command line gives another address.
                self._parcel.close(self._listener.detach(), LISTENER)
                self._listener = None
            if self._listener is None:
                self._listener = self.address.listen()
            self._parcel.keep(self._listener.fileno(), LISTENER)
        stream = self._take(STREAM, listening=False)
        if stream is not None:
            self._answered(stream)
            return True
        if self.server:
            self._watch_listener()
        elif self._parcel.is_incoming:
            # It was lost before the update. The guest goes on, whether anybody answers or not.
            self._call()
        elif self._running:
            self._call_soon()
        else:
            self.address.resolve()
            if self._reconnect_s:
                self._call()
            else:
                self._call_now()
        return False

    def lost(self) -> None:
        """The owner has closed the connection: look out for another."""
        if self._closed:
            return
        if self.server:
            self._watch_listener()
        else:
            self._call_later()

    def close(self) -> None:
        """Listen and call no more. Idempotent."""
        self._closed = True
        if self._timer is not None:
            self._timer.cancel()
        if self._listener is not None:
            self._loop.remove(self._listener.fileno())
            # First the name, then the socket: whoever finds the name must be served.
            self.address.remove()
            self._parcel.close(self._listener.detach(), LISTENER)
            self._listener = None
        self._stop_calling()

    def _take(self, index: int, *, listening: bool) -> _socket.socket | None:
        """Return the inherited socket of that index; None if there is none.

        :raises VmStateError: it is not the socket it should be
        """
        fd = self._parcel.take(index)
        if fd is None:
            return None
        if not stat.S_ISSOCK(os.fstat(fd).st_mode):
            self._parcel.close(fd, index)
            raise VmStateError(self._parcel.name, f"inherited descriptor {fd} is no socket")
        sock = _socket.socket(fileno=fd)
        if (
            sock.family not in self.address.families
            or sock.type != _socket.SOCK_STREAM
            or bool(sock.getsockopt(_socket.SOL_SOCKET, _socket.SO_ACCEPTCONN)) != listening
        ):
            self._parcel.close(sock.detach(), index)
            raise VmStateError(
                self._parcel.name, f"inherited descriptor {fd} is a socket of another kind"
            )
        sock.setblocking(False)
        return sock

    def _answered(self, sock: _socket.socket) -> None:
        """Give the owner a connection: a peer is there."""
        sock.setblocking(False)
        if self._nodelay and sock.family != _socket.AF_UNIX:
            sock.setsockopt(_socket.IPPROTO_TCP, _socket.TCP_NODELAY, 1)
        fd = sock.detach()
        self._parcel.keep(fd, STREAM)
        self._adopt(fd)

    # Server.

    def _watch_listener(self) -> None:
        self._timer = None
        if self._listener is not None:
            self._loop.add(self._listener.fileno(), READABLE, self._handle_client)

    def _handle_client(self, _revents: int) -> None:
        assert self._listener is not None
        try:
            # Unlike accept() it gives the bare descriptor, close-on-exec already set.
            fd, _peer = self._listener._accept()  # type: ignore[attr-defined]
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                # The client stays in the backlog, and the listener stays readable.
                self._loop.remove(self._listener.fileno())
                self._timer = self._loop.call_later(_RETRY_S, self._watch_listener)
            return  # else the client is gone already
        self._loop.remove(self._listener.fileno())
        self._answered(_socket.socket(fileno=fd))

    # Client.

    def _call(self) -> None:
        """Begin a connection; :meth:`_handle_answer` comes when it is decided."""
        self._timer = None
        self.address.find(self._loop, self._connect)

    def _connect(self, problem: ConfigError | None) -> None:
        if self._closed:
            return  # while its name was looked up
        if problem is not None:
            self._failed(problem)
            return
        try:
            self._calling = _socket.socket(self.address.family, STREAM_TYPE)
            self._calling.setblocking(False)
            error = self._calling.connect_ex(self.address.sockaddr)
        except OSError as refusal:
            self._failed(self._refused(refusal.strerror))
            return
        if error == 0:
            self._called()
        elif error == errno.EINPROGRESS:
            self._loop.add(self._calling.fileno(), WRITABLE, self._handle_answer)
        else:  # EAGAIN of a Unix socket is a full backlog
            self._failed(self._refused(os.strerror(error)))

    def _handle_answer(self, _revents: int) -> None:
        assert self._calling is not None
        self._loop.remove(self._calling.fileno())
        error = self._calling.getsockopt(_socket.SOL_SOCKET, _socket.SO_ERROR)
        if error == 0:
            self._called()
        else:
            self._failed(self._refused(os.strerror(error)))

    def _call_soon(self) -> None:
        """Call while the guest runs: most calls are decided at once, for the others nobody
        waits."""
        self._call()
        if self._calling is not None:
            poll = select.poll()
            poll.register(self._calling, select.POLLOUT)
            if poll.poll(_PATIENCE_MS):
                self._handle_answer(0)
        if self._problem is not None and not self._reconnect_s:
            raise self._problem

    def _failed(self, problem: ConfigError) -> None:
        self._problem = problem
        if self._running and self._opened and not self._reconnect_s:
            log.say(str(problem))
        self._call_later()

    def _refused(self, problem: object) -> ConfigError:
        return ConfigError(
            f"{self.address.option}: cannot connect to {self.address}: {problem};"
            " start the server first, or give reconnect=SECONDS"
        )

    def _call_now(self) -> None:
        """Connect before anything else happens, within bounded time."""
        sock = _socket.socket(self.address.family, STREAM_TYPE)
        try:
            sock.settimeout(_CONNECT_TIMEOUT_S)
            sock.connect(self.address.sockaddr)
        except OSError as error:
            sock.close()
            raise self._refused(error.strerror or error) from error
        self._answered(sock)

    def _called(self) -> None:
        assert self._calling is not None
        sock, self._calling = self._calling, None
        self._answered(sock)

    def _call_later(self) -> None:
        self._stop_calling()
        if self._reconnect_s:
            self._timer = self._loop.call_later(self._reconnect_s, self._call)

    def _stop_calling(self) -> None:
        if self._calling is not None:
            self._loop.remove(self._calling.fileno())
            self._calling.close()
            self._calling = None
