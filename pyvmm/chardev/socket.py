"""``-chardev socket``: a Unix or TCP stream, as server or client, one peer at a time.

The listener stays open while a client is there; further clients wait in its backlog until
that one goes. Over a live update both descriptors live on, so no client notices and no
connect() is refused. Left out: telnet, websockets, TLS.

It stands on ``_socket``, because ``socket`` takes 5 ms to import, all within the pause.
"""

from __future__ import annotations

import _socket
import errno
import os
import stat
import sys

from pyvmm.chardev.address import STREAM_TYPE
from pyvmm.chardev.fdio import FdChardev, read_socket
from pyvmm.core.eventloop import READABLE, WRITABLE
from pyvmm.errors import ConfigError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pyvmm.chardev.address import Address
    from pyvmm.core.eventloop import EventLoop, Timer
    from pyvmm.cpr.fdstore import FdStore

STREAM, LISTENER = 0, 1
_CONNECT_TIMEOUT_S = 10
_RETRY_S = 1.0  # after an accept that failed for want of descriptors or memory


class SocketChardev(FdChardev):
    """A stream socket.

    :param address: where to listen, or whom to call
    :param server: whether to listen
    :param wait: for a server: whether :meth:`wait_connected` waits
    :param reconnect_s: for a client: call again so many seconds after a loss; 0 for never
    :param nodelay: send small TCP segments at once
    :raises ConfigError: if the address cannot be used; for a client that does not
        reconnect, also if nobody answers
    :raises VmStateError: if an inherited descriptor is not the socket it should be
    """

    def __init__(
        self,
        id: str,
        loop: EventLoop,
        fds: FdStore,
        *,
        address: Address,
        server: bool = False,
        wait: bool = True,
        reconnect_s: int = 0,
        nodelay: bool = False,
    ) -> None:
        super().__init__(id, loop, fds)
        self.address = address
        self._server = server
        self._wait = server and wait
        self._reconnect_s = reconnect_s
        self._nodelay = nodelay
        self._listener: _socket.socket | None = None
        self._inherited: _socket.socket | None = None
        self._calling: _socket.socket | None = None
        self._timer: Timer | None = None
        self._closed = False
        try:
            self._open()
        except BaseException:
            # What was inherited stays open: the old image needs it for its return.
            if self._listener is not None and self._listener is self._inherited:
                self._listener = None
                self.fds.forget(self._name, LISTENER)
                self.fds.drop(self._inherited.detach())
            self.close()
            raise

    def _open(self) -> None:
        if self._server:
            self._listener = self._inherited = self._take(LISTENER, listening=True)
            if self._listener is not None and not self.address.matches(self._listener):
                # The new command line gives another address.
                self.fds.drop(self._listener.detach())
                self._listener = None
            if self._listener is None:
                self._listener = self.address.listen()
            self.fds.keep(self._name, self._listener.fileno(), LISTENER)
        stream = self._take(STREAM, listening=False)
        if stream is not None:
            self.resumed = True
            self._adopt(stream)
        elif self._server:
            self._watch_listener()
        else:
            self.address.resolve()
            if self._reconnect_s:
                self._call()
            else:
                self._call_now()

    @property
    def filename(self) -> str:
        server = ",server=on" if self._server else ""
        if not self.connected:
            return f"disconnected:{self.address}{server}"
        return f"{self.address}{server}{self.address.peer(self._in)}"

    def wait_connected(self) -> None:
        if not self._wait or self.connected:
            return
        print(f"pyvmm: waiting for a client on {self.address}", file=sys.stderr, flush=True)
        while not (self._connected or self.loop.stopping):
            self.loop.run_once()

    def save_state(self) -> bytes:
        return self.address.save_state()

    def load_state(self, state: bytes) -> None:
        try:
            self.address.load_state(state)
        except ValueError as problem:
            raise self._error(str(problem)) from None

    def close(self) -> None:
        self._closed = True
        if self._timer is not None:
            self._timer.cancel()
        if self._listener is not None:
            self.loop.remove(self._listener.fileno())
            self.fds.forget(self._name, LISTENER)
            # First the name, then the socket: whoever finds the name must be served.
            self.address.remove()
            self._listener.close()
            self._listener = None
        self._stop_calling()
        super().close()

    def _read_fd(self, fd: int, count: int) -> bytes:
        return read_socket(self.frontend, fd, count)

    def _take(self, index: int, *, listening: bool) -> _socket.socket | None:
        """The inherited socket of that index, once it is known to be one."""
        fd = self.fds.take(self._name, index)
        if fd is None:
            return None
        if not stat.S_ISSOCK(os.fstat(fd).st_mode):
            self.fds.drop(fd)
            raise self._error(f"inherited descriptor {fd} is no socket")
        sock = _socket.socket(fileno=fd)
        if (
            sock.family not in self.address.families
            or sock.type != _socket.SOCK_STREAM
            or bool(sock.getsockopt(_socket.SOL_SOCKET, _socket.SO_ACCEPTCONN)) != listening
        ):
            self.fds.drop(sock.detach())
            raise self._error(f"inherited descriptor {fd} is a socket of another kind")
        sock.setblocking(False)
        return sock

    def _adopt(self, sock: _socket.socket) -> None:
        """A peer is there."""
        sock.setblocking(False)
        if self._nodelay and sock.family != _socket.AF_UNIX:
            sock.setsockopt(_socket.IPPROTO_TCP, _socket.TCP_NODELAY, 1)
        fd = sock.detach()
        self.fds.keep(self._name, fd, STREAM)
        self._open_stream(fd, fd)

    # Server.

    def _watch_listener(self) -> None:
        self._timer = None
        if self._listener is not None:
            self.loop.add(self._listener.fileno(), READABLE, self._handle_client)

    def _handle_client(self, _revents: int) -> None:
        assert self._listener is not None
        try:
            # Unlike accept() it gives the bare descriptor, close-on-exec already set.
            fd, _peer = self._listener._accept()  # type: ignore[attr-defined]
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                # The client stays in the backlog, and the listener stays readable.
                self.loop.remove(self._listener.fileno())
                self._timer = self.loop.call_later(_RETRY_S, self._watch_listener)
            return  # else the client is gone already
        self.loop.remove(self._listener.fileno())
        self._adopt(_socket.socket(fileno=fd))

    # Client.

    def _call(self) -> None:
        """Begin a connection; :meth:`_handle_answer` comes when it is decided."""
        self._timer = None
        try:
            self.address.resolve()
            self._calling = _socket.socket(self.address.family, STREAM_TYPE)
            self._calling.setblocking(False)
            problem = self._calling.connect_ex(self.address.sockaddr)
        except (OSError, ConfigError):
            self._call_later()
            return
        if problem == 0:
            self._answered()
        elif problem == errno.EINPROGRESS:
            self.loop.add(self._calling.fileno(), WRITABLE, self._handle_answer)
        else:  # EAGAIN of a Unix socket is a full backlog
            self._call_later()

    def _handle_answer(self, _revents: int) -> None:
        assert self._calling is not None
        self.loop.remove(self._calling.fileno())
        if self._calling.getsockopt(_socket.SOL_SOCKET, _socket.SO_ERROR) == 0:
            self._answered()
        else:
            self._call_later()

    def _call_now(self) -> None:
        """Connect before anything else happens, within bounded time."""
        sock = _socket.socket(self.address.family, STREAM_TYPE)
        try:
            sock.settimeout(_CONNECT_TIMEOUT_S)
            sock.connect(self.address.sockaddr)
        except OSError as error:
            sock.close()
            raise ConfigError(
                f"{self.address.option}: cannot connect to {self.address}:"
                f" {error.strerror or error}; start the server first, or give reconnect=SECONDS"
            ) from error
        self._adopt(sock)

    def _answered(self) -> None:
        assert self._calling is not None
        sock, self._calling = self._calling, None
        self._adopt(sock)

    def _call_later(self) -> None:
        self._stop_calling()
        self._timer = self.loop.call_later(self._reconnect_s, self._call)

    def _stop_calling(self) -> None:
        if self._calling is not None:
            self.loop.remove(self._calling.fileno())
            self._calling.close()
            self._calling = None

    def _handle_disconnected(self) -> None:
        if self._closed:
            return  # the front end closed us when it heard of it
        if self._server:
            self._watch_listener()
        elif self._reconnect_s:
            self._timer = self.loop.call_later(self._reconnect_s, self._call)
