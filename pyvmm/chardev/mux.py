"""Several front ends on one chardev: QEMU's ``mux=on`` and its Ctrl-a keys.

One front end has the focus and gets the input; the output of all is shared. Input that the
focused one has no room for waits here, up to :data:`INPUT_LIMIT` bytes, so that the keys
work under a guest that reads nothing; after that it waits in the kernel. What waits here is
carried over a live update. Any thread writes; the rest is the loop thread's.
"""

from __future__ import annotations

import struct
import time

from pyvmm.chardev.base import BREAK, CLOSED, MUX_IN, MUX_OUT, OPENED, Chardev, Frontend
from pyvmm.errors import ConfigError, VmStateError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

ESCAPE = 0x01  # Ctrl-a
LARGEST_COUNT = 4  # front ends, as in QEMU
INPUT_LIMIT = 1024
# One chunk of input may change the focus half-way, and so reach a buffer that is full.
_WAITING_LIMIT = 2 * INPUT_LIMIT
_NOTICE_LIMIT = 4096
_HEADER = struct.Struct("<BBQH")  # focus, flags, age of time stamps in ms, own output
_LENGTH = struct.Struct("<H")
_ESCAPED, _STAMPED, _MID_LINE = 1, 2, 4

_HELP = """\r
Ctrl-a h       print this help\r
Ctrl-a x       quit\r
Ctrl-a c       switch between console and monitor\r
Ctrl-a b       send a break\r
Ctrl-a t       turn time stamps on or off\r
Ctrl-a Ctrl-a  send Ctrl-a\r
"""


class MuxChardev(Chardev, Frontend):
    """The one front end of a chardev, which it shares among its own.

    :param base: the chardev that is shared
    :param quit: called for Ctrl-a x, on the loop thread
    """

    def __init__(self, id: str, base: Chardev, quit: Callable[[], None]) -> None:
        super().__init__(id, base.loop, base.handover)
        self.base = base
        self._quit = quit
        self._ports: list[MuxPort] = []
        self._focus = 0
        self._escaped = False
        self._stamped = False
        self._stamps_began = 0.0
        self._mid_line = False
        # Output of the mux itself that was not taken yet: it goes first.
        self._own = bytearray()
        self._deliver_queued = False
        base.attach(self)

    def frontend_chardev(self, index: int) -> MuxPort:
        """Return the chardev for the front end of that number; number 0 begins with the focus.

        :raises ConfigError: if there are too many
        """
        if index >= LARGEST_COUNT:
            raise ConfigError(
                f"chardev {self.id} has {LARGEST_COUNT} users already; give another chardev"
            )
        while len(self._ports) <= index:
            self._ports.append(MuxPort(self, len(self._ports)))
        return self._ports[index]

    @property
    def filename(self) -> str:
        return "mux"

    @property
    def connected(self) -> bool:
        return self.base.connected

    @property
    def waits_for_host(self) -> bool:
        return self.base.waits_for_host

    @property
    def frontend_open(self) -> bool:
        return any(port.frontend is not None for port in self._ports)

    @property
    def focus(self) -> int:
        """Number of the front end that gets the input."""
        return self._focus

    def set_focus(self, index: int) -> None:
        """Give the input to another front end. Loop thread."""
        if index != self._focus:
            self.frontend_chardev(self._focus).tell(MUX_OUT)
            self._focus = index
            self.frontend_chardev(index).tell(MUX_IN)
            self.base.accept_input()

    def write(self, data: bytes) -> int:
        with self.lock:
            if not self._flush_own():
                return 0
            taken = 0
            while taken < len(data):
                end = len(data)
                if self._stamped:
                    end = data.find(b"\n", taken) + 1 or end
                    if not self._mid_line:
                        self._own += self._stamp()
                        self._mid_line = True
                        if not self._flush_own():
                            break
                count = self.base.write(data[taken:end])
                taken += count
                if count:
                    self._mid_line = data[taken - 1] != 0x0A
                if taken < end:
                    break
            return taken

    def window_size(self) -> tuple[int, int]:
        return self.base.window_size()

    def take_keys(self, taken: bool) -> None:
        self.base.take_keys(taken)

    def accept_input(self) -> None:
        if not self._deliver_queued:
            self._deliver_queued = True
            self.loop.call_soon(self._deliver)

    def close(self) -> None:
        self.base.attach(None)

    # As the front end of what is shared.

    def can_receive(self) -> int:
        waiting = self._ports[self._focus].waiting if self._ports else b""
        return max(INPUT_LIMIT - len(waiting), 0)

    def receive(self, data: bytes) -> None:
        at = 0
        while at < len(data):
            if self._escaped:
                self._escaped = False
                self._handle_key(data[at])
                at += 1
                continue
            end = data.find(ESCAPE, at)
            self._escaped = end >= 0
            if end < 0:
                end = len(data)
            self.frontend_chardev(self._focus).waiting += data[at:end]
            at = end + 1
        self._deliver()

    def handle_event(self, event: str) -> None:
        if event == CLOSED:
            self._escaped = False
        for port in self._ports:
            port.is_inherited = self.base.is_inherited
            if event != BREAK or port.index == self._focus:
                port.tell(event)

    def handle_writable(self) -> None:
        with self.lock:
            self._flush_own()
        for port in self._ports:
            port.handle_writable()

    # Live update.

    def save_state(self) -> bytes:
        flags = self._escaped * _ESCAPED | self._stamped * _STAMPED | self._mid_line * _MID_LINE
        age_ms = int((time.monotonic() - self._stamps_began) * 1000) if self._stamped else 0
        state = _HEADER.pack(self._focus, flags, age_ms, len(self._own)) + self._own
        for port in self._ports:
            state += _LENGTH.pack(len(port.waiting)) + port.waiting
        return bytes(state)

    def load_state(self, state: bytes) -> None:
        try:
            focus, flags, age_ms, length = _HEADER.unpack_from(state)
            at = _HEADER.size + length
            own = state[at - length : at]
            waiting = []
            while at < len(state):
                (length,) = _LENGTH.unpack_from(state, at)
                at += _LENGTH.size + length
                waiting.append(state[at - length : at])
        except struct.error:
            at = -1
        if at != len(state):
            raise VmStateError(self.parcel.name, "state of a mux that is cut short")
        if (
            focus >= LARGEST_COUNT
            or flags > 7
            or len(own) > 2 * _NOTICE_LIMIT
            or len(waiting) > LARGEST_COUNT
            or any(len(data) > _WAITING_LIMIT for data in waiting)
        ):
            raise VmStateError(self.parcel.name, "state that no mux can have")
        self._focus = focus
        self._escaped = bool(flags & _ESCAPED)
        self._stamped = bool(flags & _STAMPED)
        self._mid_line = bool(flags & _MID_LINE)
        self._stamps_began = time.monotonic() - min(age_ms, 1 << 50) / 1000
        self._own[:] = own
        self.frontend_chardev(focus)
        for index, data in enumerate(waiting):
            self.frontend_chardev(index).waiting[:] = data

    def _handle_key(self, key: int) -> None:
        if key in (ESCAPE, ord("a")):
            self.frontend_chardev(self._focus).waiting.append(ESCAPE)
        elif key == ord("h"):
            self._print(_HELP)
        elif key == ord("x"):
            self._print("\r\npyvmm: terminated\r\n")
            self._quit()
        elif key == ord("c") and self._ports:
            self.set_focus((self._focus + 1) % len(self._ports))
        elif key == ord("b"):
            self.frontend_chardev(self._focus).tell(BREAK)
        elif key == ord("t"):
            self._stamped = not self._stamped
            self._stamps_began = time.monotonic()

    def _deliver(self) -> None:
        """Hand waiting input to the front ends that have room."""
        self._deliver_queued = False
        for port in self._ports:
            port.deliver()
        self.base.accept_input()

    def _stamp(self) -> bytes:
        ms = int((time.monotonic() - self._stamps_began) * 1000)
        seconds = ms // 1000
        clock = f"{seconds // 3600:02}:{seconds // 60 % 60:02}:{seconds % 60:02}.{ms % 1000:03}"
        return f"[{clock}] ".encode()

    def _print(self, text: str) -> None:
        with self.lock:
            if len(self._own) < _NOTICE_LIMIT:  # who asks for help a hundred times may wait
                self._own += text.encode()
            self._flush_own()

    def _flush_own(self) -> bool:
        """Write the mux's own output; return whether all of it is out."""
        if self._own:
            del self._own[: self.base.write(bytes(self._own))]
        return not self._own


class MuxPort(Chardev):
    """One front end's share of a mux: its own input, the common output."""

    def __init__(self, mux: MuxChardev, index: int) -> None:
        super().__init__(mux.id, mux.loop, mux.handover)
        self.mux = mux
        self.index = index
        self.is_terminal = mux.base.is_terminal
        self.is_typed = mux.base.is_typed
        self.is_inherited = mux.base.is_inherited
        self.waiting = bytearray()
        self._cut_short = False

    @property
    def filename(self) -> str:
        return self.mux.filename

    @property
    def connected(self) -> bool:
        return self.mux.connected

    @property
    def waits_for_host(self) -> bool:
        return self.mux.waits_for_host

    @property
    def focused(self) -> bool:
        """Whether the input comes here."""
        return self.mux.focus == self.index

    def attach(self, frontend: Frontend | None) -> None:
        """Put a front end on; it hears of its focus first, then OPENED."""
        self.frontend = frontend
        self.tell(MUX_IN if self.focused else MUX_OUT)
        if self.connected:
            self.tell(OPENED)
        self.mux.accept_input()

    def write(self, data: bytes) -> int:
        # Set before, cleared after: the main loop may say "writable" in between.
        self._cut_short = True
        taken = self.mux.write(data)
        if taken == len(data):
            self._cut_short = False
        return taken

    def drop(self, count: int, why: str) -> None:
        self.mux.drop(count, why)

    def accept_input(self) -> None:
        if self.waiting:
            self.mux.accept_input()

    def window_size(self) -> tuple[int, int]:
        return self.mux.window_size()

    def take_keys(self, taken: bool) -> None:
        if self.focused:  # else they are another's
            self.mux.take_keys(taken)

    def tell(self, event: str) -> None:
        """Pass an event on to the front end."""
        if self.frontend is not None:
            self.frontend.handle_event(event)

    def handle_writable(self) -> None:
        """Tell the front end that output is taken again, if a write of its was cut short."""
        if self._cut_short:
            self._cut_short = False
            if self.frontend is not None:
                self.frontend.handle_writable()

    def deliver(self) -> None:
        """Hand waiting input to the front end as far as it has room."""
        while self.waiting and self.frontend is not None:
            room = self.frontend.can_receive()
            if room <= 0:
                return
            data = bytes(self.waiting[:room])
            del self.waiting[:room]
            self.frontend.receive(data)
