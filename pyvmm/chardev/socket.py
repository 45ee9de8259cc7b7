"""``-chardev socket``: a Unix or TCP stream, as server or client, one peer at a time.

Over a live update listener and connection live on, see ``chardev.connector``. Left out:
telnet, websockets, TLS.
"""

from __future__ import annotations

from pyvmm._util import log
from pyvmm.chardev.connector import Connector
from pyvmm.chardev.fdio import FdChardev, read_socket

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pyvmm.chardev.address import Address
    from pyvmm.core.eventloop import EventLoop
    from pyvmm.cpr.handover import Handover


class SocketChardev(FdChardev):
    """A stream socket.

    :param address: where to listen, or whom to call
    :param server: whether to listen
    :param wait: for a server: whether :meth:`wait_connected` waits
    :param reconnect_s: for a client: call again so many seconds after a loss; 0 for never
    :param nodelay: send small TCP segments at once
    :param running: whether the guest runs: a server that does not answer at once is waited for
        in the background
    :raises ConfigError: if the address cannot be used; for a client that does not
        reconnect, also if nobody answers
    :raises VmStateError: if an inherited descriptor is not the socket it should be
    """

    def __init__(
        self,
        id: str,
        loop: EventLoop,
        handover: Handover,
        *,
        address: Address,
        server: bool = False,
        wait: bool = True,
        reconnect_s: int = 0,
        nodelay: bool = False,
        running: bool = False,
    ) -> None:
        super().__init__(id, loop, handover)
        self.address = address
        self._wait = server and wait
        self.connector = Connector(
            self.parcel,
            loop,
            address=address,
            adopt=lambda fd: self._open_stream(fd, fd),
            server=server,
            reconnect_s=reconnect_s,
            nodelay=nodelay,
            running=running,
        )
        try:
            self.is_inherited = self.connector.open()
        except BaseException:
            self.close()
            raise

    @property
    def filename(self) -> str:
        server = ",server=on" if self.connector.server else ""
        if not self.connected:
            return f"disconnected:{self.address}{server}"
        return f"{self.address}{server}{self.address.peer(self._in)}"

    def wait_connected(self) -> None:
        if not self._wait or self.connected:
            return
        log.say(f"waiting for a client on {self.address}")
        while not (self._connected or self.loop.stopping):
            self.loop.run_once()

    def save_state(self) -> bytes:
        return self.address.save_state()

    def load_state(self, state: bytes) -> None:
        try:
            self.address.load_state(state)
        except ValueError as problem:
            raise self._error(str(problem)) from None

    def recover(self) -> None:
        self._disconnect()  # its peer must not go on where something is missing

    def close(self) -> None:
        self.connector.close()
        super().close()

    def _read_fd(self, fd: int, count: int) -> bytes:
        return read_socket(self.frontend, fd, count)

    def _handle_disconnected(self) -> None:
        self.connector.lost()
