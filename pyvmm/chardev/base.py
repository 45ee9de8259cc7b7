"""What every character device back end offers, and what sits on one.

A chardev is a byte stream to the host (terminal, socket, file); its front end is a serial
port, a monitor or a mux. Input is read on the main loop thread, and only as much as the
front end takes, so that whatever is not taken stays in the kernel over a live update.
Output comes from any thread, never blocks, and says how much was taken.
"""

from __future__ import annotations

from pyvmm._util import log
from pyvmm.core.threads import Lock
from pyvmm.cpr.handover import CHARDEV, Passenger

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from pyvmm.chardev.rights import Rights
    from pyvmm.core.eventloop import EventLoop
    from pyvmm.cpr.handover import Handover

# Events for Frontend.handle_event.
OPENED = "opened"  # a peer is there (sent on attach too, if one is there already)
CLOSED = "closed"  # the peer went away
MUX_IN = "mux-in"  # the mux gave this front end the input
MUX_OUT = "mux-out"  # the mux took it away
BREAK = "break"  # a serial break was asked for
RESIZED = "resized"  # the terminal has another size

#: Why output is dropped that a monitor has for its client.
NOT_READ = "its client does not read"


class Frontend:
    """What sits on a chardev. All methods are called on the main loop thread."""

    #: Takes the descriptors that the peer of a socket sends along.
    rights: Rights | None = None

    def can_receive(self) -> int:
        """Return how many bytes the front end takes now."""
        return 0

    def receive(self, data: bytes) -> None:
        """Take input, at most as many bytes as :meth:`can_receive` said."""

    def handle_event(self, event: str) -> None:
        """One of the events above happened."""

    def handle_writable(self) -> None:
        """The chardev takes output again, after a write that was cut short."""


class Chardev(Passenger):
    """One back end.

    :param id: the name given on the command line
    :param loop: serves the descriptors
    :param handover: has the parcel of the chardev of that id
    """

    #: Whether a person sits at the other end (colour, line editing).
    is_terminal = False

    #: Whether a person types, wherever the output goes.
    is_typed = False

    #: Whether the stream came through a live update: the peer has been greeted already.
    #: False again as soon as that peer goes.
    is_inherited = False

    def __init__(self, id: str, loop: EventLoop, handover: Handover) -> None:
        self.id = id
        self.loop = loop
        self.handover = handover
        self.parcel = handover.parcel(CHARDEV, id)
        self.frontend: Frontend | None = None
        self.lock = Lock()
        #: How many bytes were taken that are lost, since the process began.
        self.dropped = 0

    @property
    def filename(self) -> str:
        """What ``info chardev`` prints, in QEMU's form (``pty:/dev/pts/0``, ``null``)."""
        raise NotImplementedError

    @property
    def connected(self) -> bool:
        """Whether anybody is there to read and write."""
        return True

    @property
    def waits_for_host(self) -> bool:
        """Whether a write may take as long as the host's storage does."""
        return False

    @property
    def frontend_open(self) -> bool:
        """Whether a front end is on it."""
        return self.frontend is not None

    def attach(self, frontend: Frontend | None) -> None:
        """Put a front end on (or take it off); it gets OPENED if the peer is there."""
        self.frontend = frontend
        if frontend is not None and self.connected:
            frontend.handle_event(OPENED)
        self.accept_input()

    def write(self, data: bytes) -> int:
        """Write without blocking; return how many bytes were taken.

        What was taken has reached the kernel: it cannot be lost by an exec. Without a peer
        all bytes are taken and dropped; those that a peer or a file refuses likewise, and they
        are counted. After a short write the front end's ``handle_writable`` is called once.
        Any thread.
        """
        raise NotImplementedError

    def pour(self, move: Callable[[int], tuple[int, bool]]) -> tuple[int, bool]:
        """Have output moved without :meth:`write`, if there is a stream that needs nothing else.

        :param move: called at once, or not at all, with a descriptor that does not block, which
            nobody else writes to meanwhile; returns how much it moved, and whether the descriptor
            takes no more. What it leaves for another reason is for :meth:`write`.
        :returns: the same, ``(0, False)`` if it was not called. After True the front end's
            ``handle_writable`` is called once. Any thread
        """
        return 0, False

    def drop(self, count: int, why: str) -> None:
        """Count bytes that are lost, and tell the operator of the first. Any thread."""
        if not self.dropped:
            log.say(f"chardev {self.id}: {why}; output is dropped until that changes")
        self.dropped += count

    def accept_input(self) -> None:
        """Look again at how much the front end takes. Any thread."""

    def take_keys(self, taken: bool) -> None:
        """Have Ctrl-C, Ctrl-Z and Ctrl-\\ come as input, or have them act on this process
        again, as far as the options leave that open. For a front end in which lines are
        edited, while it has the input. Loop thread."""

    def wait_connected(self) -> None:
        """Block until a peer is there, if the options ask for that (``wait=on``)."""

    def window_size(self) -> tuple[int, int]:
        """Return rows and columns of the terminal."""
        return 24, 80

    def save_state(self) -> bytes:
        """Return host-side state beyond the descriptors, to go over an exec."""
        return b""

    def load_state(self, state: bytes) -> None:
        """Take over what :meth:`save_state` gave in the old image; before :meth:`attach`.

        :raises VmStateError: if it is not possible state
        """

    def close(self) -> None:
        """Give everything back: descriptors, socket files, terminal modes. Idempotent."""


class Outbox:
    """Output that must not be cut short: queued, up to a limit, and sent as the peer reads.

    Its owner (a monitor) calls :meth:`flush` from ``handle_writable``.

    :param limit: bytes; a peer that lets more pile up is not reading, and loses the rest,
        which its chardev counts
    """

    def __init__(self, chardev: Chardev, limit: int = 1 << 20) -> None:
        self._chardev = chardev
        self._limit = limit
        self._pending = bytearray()
        self._lock = Lock()

    def send(self, data: bytes) -> None:
        """Queue ``data`` and write what is taken now. Any thread."""
        with self._lock:
            room = self._limit - len(self._pending)
            if len(data) > room:
                self._chardev.drop(len(data) - max(room, 0), NOT_READ)
            self._pending += data[: max(room, 0)]
            self._flush()

    def flush(self) -> None:
        """Write what is taken now."""
        with self._lock:
            self._flush()

    def pending(self) -> bytes:
        """Return what is still queued, for a save."""
        with self._lock:
            return bytes(self._pending)

    @property
    def size(self) -> int:
        """How many bytes are still queued."""
        return len(self._pending)

    def clear(self) -> None:
        """Forget what is queued: its reader is gone."""
        with self._lock:
            self._pending.clear()

    def _flush(self) -> None:
        while self._pending:
            taken = self._chardev.write(bytes(self._pending[:65536]))
            del self._pending[:taken]
            if taken == 0:
                return
