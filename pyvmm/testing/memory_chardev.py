"""A chardev whose other end is the test: what was written is a bytearray, input is fed."""

from __future__ import annotations

from pyvmm.chardev.base import CLOSED, OPENED, Chardev
from pyvmm.core.eventloop import EventLoop
from pyvmm.cpr.handover import Handover


class MemoryChardev(Chardev):
    """Byte stream in memory, with a bounded way out.

    :param room: how many bytes :meth:`write` takes before it is full; None for no limit
    :param loop: carries calls to the test's thread; one of its own if None
    """

    def __init__(
        self, id: str = "memory0", *, room: int | None = None, loop: EventLoop | None = None
    ) -> None:
        super().__init__(id, loop or EventLoop(), Handover())
        self._own_loop = None if loop else self.loop
        self.output = bytearray()
        self.unread = bytearray()
        self.room = room
        self._cut_short = False
        self._connected = True

    @property
    def filename(self) -> str:
        return "memory"

    @property
    def connected(self) -> bool:
        return self._connected

    def write(self, data: bytes) -> int:
        with self.lock:
            if not self._connected:
                return len(data)
            taken = len(data) if self.room is None else min(len(data), self.room)
            self.output += data[:taken]
            if self.room is not None:
                self.room -= taken
            self._cut_short |= taken < len(data)
            return taken

    def accept_input(self) -> None:
        self.loop.call_soon(self.pump)

    def feed(self, data: bytes) -> None:
        """Let ``data`` arrive, and deliver what the front end takes."""
        self.unread += data
        self.pump()

    def pump(self) -> None:
        """Deliver waiting input for as long as the front end has room."""
        while self.frontend is not None and self.unread:
            room = self.frontend.can_receive()
            if room <= 0:
                return
            data = bytes(self.unread[:room])
            del self.unread[:room]
            self.frontend.receive(data)

    def make_room(self, count: int | None) -> None:
        """Set how much more is taken (None: no limit) and tell a front end that waits."""
        with self.lock:
            self.room = count
            tell, self._cut_short = self._cut_short, False
        if tell and self.frontend is not None:
            self.frontend.handle_writable()

    def connect(self) -> None:
        """Let a peer come."""
        self._connected = True
        self._tell(OPENED)

    def disconnect(self) -> None:
        """Let the peer go."""
        self._connected = False
        self._tell(CLOSED)

    def take_output(self) -> bytes:
        """Return what was written since the last call."""
        with self.lock:
            data = bytes(self.output)
            self.output.clear()
            return data

    def close(self) -> None:
        if self._own_loop is not None:
            self._own_loop.close()
            self._own_loop = None

    def _tell(self, event: str) -> None:
        if self.frontend is not None:
            self.frontend.handle_event(event)
