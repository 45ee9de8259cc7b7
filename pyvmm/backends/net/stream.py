"""``-netdev stream``: frames over a Unix or TCP stream socket, as QEMU and passt speak it.

Each frame has its length before it, 32 bits big endian; there are no offloads. The parts of
frames that were read or written when a live update comes are carried over, so the framing holds.
A peer that announces a frame longer than any loses the connection; while nobody is there the
link is down and what the guest sends is dropped.
"""

from __future__ import annotations

import _socket
import errno
import struct

from pyvmm.backends.net.base import HEADER, MAX_FRAME, NetBackend, join, skip
from pyvmm.chardev.connector import Connector
from pyvmm.core.eventloop import HANGUP, READABLE, WRITABLE
from pyvmm.errors import VmStateError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from pyvmm.chardev.address import Address
    from pyvmm.core.eventloop import EventLoop
    from pyvmm.cpr.handover import Handover

LENGTH = 4
_FLAGS = _socket.MSG_DONTWAIT | _socket.MSG_NOSIGNAL
# The host is short of memory, while poll(2) says that there is room: looked at again by time.
_SHORT = (errno.ENOBUFS, errno.ENOMEM)
_SHORT_S = 0.1
# A frame's header is written over its length and what is before it, which has been consumed.
_ROOM = HEADER - LENGTH
_NO_HEADER = bytes(HEADER)
_BUFFER = _ROOM + 4 * (LENGTH + MAX_FRAME)
_SIZES = struct.Struct(">III")


class StreamBackend(NetBackend):
    """One stream, with nobody at the other end yet: see :meth:`open_stream`."""

    kind = "stream"
    link_up = False

    def __init__(self, id: str, loop: EventLoop, handover: Handover) -> None:
        super().__init__(id, loop, handover)
        self._sock: _socket.socket | None = None
        self._buffer = memoryview(bytearray(_BUFFER))
        self._start = self._end = _ROOM  # of what was received and not consumed
        self._held: memoryview | None = None
        self._unsent = b""
        self._running = self._wanted = self._full = self._resting = False

    def open_stream(self, fd: int) -> None:
        """Begin with a peer, which is there."""
        self._sock = _socket.socket(fileno=fd)
        self.link_up = True
        self._poll()
        self._tell_link()

    def peek(self) -> memoryview | None:
        while self._held is None:
            start, have = self._start, self._end - self._start
            size = int.from_bytes(self._buffer[start : start + LENGTH], "big")
            if have >= LENGTH and size > MAX_FRAME:
                self._lose()
                return None
            if have >= LENGTH + size:
                self._start += LENGTH + size
                self._held = self._buffer[start - _ROOM : self._start]
                self._held[:HEADER] = _NO_HEADER
            elif not self._receive():
                return None
        return self._held

    def consume(self) -> None:
        self._held = None

    def send(self, parts: list[memoryview]) -> bool:
        if self._sock is None:
            return True
        if not self._full:
            size = sum(map(len, parts)) - HEADER
            parts = skip(parts, HEADER)
            parts.insert(0, memoryview(size.to_bytes(LENGTH, "big")))
            taken = self._write(parts)
            if taken:
                if taken < LENGTH + size:
                    try:
                        self._unsent = join(skip(parts, taken))
                    except OSError:
                        # The host cannot back the rest of a frame that is half sent.
                        self._lose()
                        return True
                    self._set_full()
                return True
            if self._sock is None:
                return True
            self._set_full()
        return False

    def start(self) -> None:
        self._running = True
        self._full = bool(self._unsent)
        self._poll()

    def watch(self, wanted: bool) -> None:
        if wanted != self._wanted:
            self._wanted = wanted
            self._poll()

    def save_state(self) -> bytes:
        address = self._save_address()
        held = b""
        if self._held is not None:
            held = (len(self._held) - HEADER).to_bytes(LENGTH, "big") + self._held[HEADER:]
        received = held + self._buffer[self._start : self._end]
        if not (address or received or self._unsent):
            return b""
        sizes = _SIZES.pack(len(received), len(self._unsent), len(address))
        return sizes + received + self._unsent + address

    def load_state(self, state: bytes) -> None:
        if not state:
            return
        if len(state) < _SIZES.size:
            raise self._error(f"{len(state)} bytes of state")
        received, unsent, address = _SIZES.unpack_from(state)
        if received > _BUFFER - _ROOM or unsent > LENGTH + MAX_FRAME:
            raise self._error(f"{received} and {unsent} bytes do not fit the buffers")
        if len(state) != _SIZES.size + received + unsent + address:
            raise self._error("sizes that do not add up")
        at = _SIZES.size
        # Without the connection that they belong to they are nothing.
        if self._sock is not None:
            self._end = self._start + received
            self._buffer[self._start : self._end] = state[at : at + received]
            self._unsent = state[at + received : at + received + unsent]
            # A kick may come before the start, and its frame must not come before this one.
            self._full = bool(self._unsent)
        self._load_address(state[at + received + unsent :])

    def close(self) -> None:
        if self._sock is not None:
            self.loop.remove(self._sock.fileno())
            self.parcel.close(self._sock.detach())
            self._sock = None
        self._held = None
        self._start = self._end = _ROOM
        self._unsent = b""
        self._full = False

    def recover(self) -> None:
        self._lose()  # the frames that come may not be in step

    # What a kind of stream has of its own.

    def _handle_lost(self) -> None:
        """The peer is gone: look out for another."""

    def _save_address(self) -> bytes:
        return b""

    def _load_address(self, state: bytes) -> None:
        if state:
            raise self._error(f"{len(state)} bytes too many")

    # Reading and writing.

    def _receive(self) -> bool:
        """Fill the buffer; return whether anything came."""
        if self._sock is None or not self._running:
            return False
        if self._start == self._end:
            self._start = self._end = _ROOM
        elif _BUFFER - self._start < LENGTH + MAX_FRAME:
            # A frame has begun whose rest might not fit behind this: move it to the front.
            rest = bytes(self._buffer[self._start : self._end])
            self._start, self._end = _ROOM, _ROOM + len(rest)
            self._buffer[_ROOM : self._end] = rest
        try:
            count = self._sock.recv_into(self._buffer[self._end :], 0, _socket.MSG_DONTWAIT)
        except BlockingIOError:
            return False
        except OSError as error:  # ECONNRESET
            if error.errno in _SHORT:
                self._rest()
                return False
            count = 0
        self._end += count
        if not count:
            self._lose()
        return count > 0

    def _write(self, parts: list[memoryview] | list[bytes]) -> int:
        assert self._sock is not None
        try:
            return self._sock.sendmsg(parts, (), _FLAGS)
        except BlockingIOError:
            return 0
        except OSError as error:  # EPIPE, ECONNRESET
            if error.errno == errno.EFAULT:
                raise
            if error.errno in _SHORT:
                self._rest()
            else:
                self._lose()
            return 0

    def _set_full(self) -> None:
        self._full = True
        self._poll()

    def _rest(self) -> None:
        if not self._resting:
            self._resting = True
            self.loop.call_later(_SHORT_S, self._end_rest)
            self._poll()

    def _end_rest(self) -> None:
        self._resting = False
        self._poll()

    def _lose(self) -> None:
        was_full = self._full
        StreamBackend.close(self)
        self.link_up = False
        self._tell_link()
        if was_full and self.frontend is not None:
            self.frontend.handle_writable()  # to be dropped from now on
        self._handle_lost()

    def _tell_link(self) -> None:
        if self.frontend is not None:
            self.frontend.handle_link(self.link_up)

    def _poll(self) -> None:
        if self._sock is None:
            return
        events = READABLE if self._wanted else 0
        events |= WRITABLE if self._full and self._running else 0
        if events and not self._resting:
            self.loop.add(self._sock.fileno(), events, self._handle_ready)
        else:  # a hang-up could not be masked
            self.loop.remove(self._sock.fileno())

    def _handle_ready(self, revents: int) -> None:
        if self._full and revents & (WRITABLE | HANGUP):
            self._flush()
        if self._sock is None or not self._wanted or self.frontend is None:
            return
        if revents & (READABLE | HANGUP):
            self.frontend.handle_frames()

    def _flush(self) -> None:
        if self._unsent:
            taken = self._write([self._unsent])
            self._unsent = self._unsent[taken:]
        if self._sock is not None and not self._unsent:
            self._full = False
            self._poll()
            if self.frontend is not None:
                self.frontend.handle_writable()

    def _error(self, problem: str) -> VmStateError:
        return VmStateError(self.parcel.name, problem)


class SocketBackend(StreamBackend):
    """A stream to whoever calls, or is called.

    :param address: where to listen, or whom to call
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
        reconnect_s: float = 0,
    ) -> None:
        super().__init__(id, loop, handover)
        self.address = address
        self.connector = Connector(
            self.parcel,
            loop,
            address=address,
            adopt=self.open_stream,
            server=server,
            reconnect_s=reconnect_s,
            nodelay=True,  # frames are whole, and wait for nothing
        )
        try:
            self.connector.open()
        except BaseException:
            self.close()
            raise

    @property
    def info(self) -> dict[str, Any]:
        how = "server" if self.connector.server else "client"
        peer = self.address.peer(self._sock.fileno()) if self._sock is not None else ""
        state = "connected" if self.link_up else "disconnected"
        return {how: f"{self.address}{peer}", "state": state}

    def close(self) -> None:
        self.connector.close()
        super().close()

    def _handle_lost(self) -> None:
        self.connector.lost()

    def _save_address(self) -> bytes:
        return self.address.save_state()

    def _load_address(self, state: bytes) -> None:
        try:
            self.address.load_state(state)
        except ValueError as problem:
            raise self._error(str(problem)) from None
