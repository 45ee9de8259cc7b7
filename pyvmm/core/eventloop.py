"""The main loop: descriptor readiness, timers, and calls handed over from other threads.

Everything but :meth:`EventLoop.call_soon` and :meth:`EventLoop.stop` belongs to the thread
that runs the loop. poll(2) rather than epoll: the descriptors are few, regular files and
/dev/null are accepted, and nothing is registered in the kernel that a closed or inherited
descriptor could leave behind.
"""

from __future__ import annotations

import _thread
import os
import select
import time
from _heapq import heappop, heappush  # what heapq has of them, without its import

TYPE_CHECKING = False
if TYPE_CHECKING:
    import signal as _signal
    from collections.abc import Callable
else:
    import _signal  # what signal wraps in enums, at the cost of importing enum

READABLE = select.POLLIN
WRITABLE = select.POLLOUT
HANGUP = select.POLLHUP | select.POLLERR

# poll(2) takes an int.
LONGEST_WAIT_MS = (1 << 31) - 1

# How soon poll(2) is called again after it failed: the host had no memory for it, or a limit on
# descriptors was lowered below their number.
_RETRY_S = 0.05
_WAKE_ATTEMPTS = 3


class Timer:
    """A call at a time to come; :meth:`cancel` may come at any moment, even after it."""

    __slots__ = ("callback", "due")

    def __init__(self, due: float, callback: Callable[[], None] | None) -> None:
        self.due = due
        self.callback = callback

    def __lt__(self, other: Timer) -> bool:
        return self.due < other.due

    def cancel(self) -> None:
        """Do not call."""
        self.callback = None


class EventLoop:
    """One loop, run by one thread."""

    def __init__(self) -> None:
        self._poll = select.poll()
        self._handlers: dict[int, Callable[[int], None]] = {}
        self._timers: list[Timer] = []
        self._calls: list[Callable[[], None]] = []
        #: Whether :meth:`stop` was called.
        self.stopping = False
        #: Called with the exception that a handler, timer or call raised, and with that
        #: function; a handler's descriptor is no longer served. None: it leaves :meth:`run`.
        self.on_error: Callable[[Exception, Callable[..., None]], None] | None = None
        self._signal_fds: tuple[int, ...] = ()
        # Keeps _wake from a descriptor that close() has closed. Reentrant, because a signal handler
        # may wake the loop in the middle of either.
        self._wake_lock = _thread.RLock()
        self._wake_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self.add(self._wake_fd, READABLE, self._handle_wake)

    def add(self, fd: int, events: int, handler: Callable[[int], None]) -> None:
        """Call ``handler(revents)`` while ``fd`` is ready; replaces an earlier request.

        ``revents`` may contain :data:`HANGUP` unasked. The owner removes a descriptor
        before closing it.
        """
        self._handlers[fd] = handler
        self._poll.register(fd, events)

    def remove(self, fd: int) -> None:
        """Forget ``fd``; harmless if it is not there."""
        if self._handlers.pop(fd, None) is not None:
            self._poll.unregister(fd)

    def call_later(self, delay_s: float, callback: Callable[[], None]) -> Timer:
        """Call once, ``delay_s`` seconds from now; return the timer, to cancel it."""
        timer = Timer(time.monotonic() + delay_s, callback)
        heappush(self._timers, timer)
        return timer

    def call_soon(self, callback: Callable[[], None]) -> None:
        """Call on the loop's thread, in order, from any thread and from signal handlers; never
        if the loop is closed."""
        self._calls.append(callback)
        self._wake()

    def stop(self) -> None:
        """Let :meth:`run` return; from any thread."""
        self.stopping = True
        self._wake()

    def _wake(self) -> None:
        with self._wake_lock:
            if self._wake_fd >= 0:
                _signal_eventfd(self._wake_fd)

    def run(self) -> None:
        """Serve until :meth:`stop`."""
        while not self.stopping:
            self.run_once()

    def run_once(self, timeout_s: float | None = None) -> None:
        """Wait for something to do, for ``timeout_s`` at most, and do all that is due."""
        try:
            ready = self._poll.poll(self._timeout_ms(timeout_s))
        except OSError:
            # Timers and calls go on meanwhile.
            time.sleep(_RETRY_S)
            ready = []
        handlers = [self._handlers[fd] for fd, _ in ready]
        for (fd, revents), handler in zip(ready, handlers, strict=True):
            # An earlier handler of this round may have removed this one, and its number may
            # be another file's already, which must not be told of the old one's hang-up.
            if self._handlers.get(fd) is handler:
                self._serve(handler, revents, fd=fd)
        now = time.monotonic()
        while self._timers and self._timers[0].due <= now:
            callback = heappop(self._timers).callback
            if callback is not None:
                self._serve(callback)
        # Only what is there now: a call that queues itself again must not starve the rest.
        for _ in range(len(self._calls)):
            self._serve(self._calls.pop(0))

    def watch_signals(self) -> None:
        """Wake up for every signal that has a Python handler. Main thread.

        The handler itself runs between two bytecodes: a signal that comes right before the
        poll would otherwise wait until something else happens.
        """
        read_fd, write_fd = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._signal_fds = (read_fd, write_fd)
        _signal.set_wakeup_fd(write_fd, warn_on_full_buffer=False)
        self.add(read_fd, READABLE, lambda _revents: _drain(read_fd))

    def close(self) -> None:
        """Release the loop's own descriptor."""
        if self._signal_fds:
            _signal.set_wakeup_fd(-1)
        with self._wake_lock:
            # Its number may soon be another file's.
            wake_fd, self._wake_fd = self._wake_fd, -1
        for fd in (wake_fd, *self._signal_fds):
            self.remove(fd)
            os.close(fd)

    def _serve(self, function: Callable[..., None], *arguments: int, fd: int = -1) -> None:
        try:
            function(*arguments)
        except Exception as error:
            if self.on_error is None:
                raise
            # The descriptor is still ready: its handler would fail again without end.
            if self._handlers.get(fd) is function:
                self.remove(fd)
            self.on_error(error, function)

    def _timeout_ms(self, timeout_s: float | None) -> int | None:
        if self._calls or self.stopping:
            return 0
        if self._timers:
            until = max(self._timers[0].due - time.monotonic(), 0)
            timeout_s = until if timeout_s is None else min(until, timeout_s)
        if not timeout_s:
            return None if timeout_s is None else 0
        # Rounded up: waking early would spin until the timer is due.
        return min(int(timeout_s * 1000) + 1, LONGEST_WAIT_MS)

    def _handle_wake(self, _revents: int) -> None:
        try:
            os.eventfd_read(self._wake_fd)
        except OSError:
            pass  # it is ready still and comes again


def _drain(fd: int) -> None:
    try:
        os.read(fd, 4096)
    except OSError:
        pass


def _signal_eventfd(fd: int) -> None:
    # An eventfd that is full wakes the loop all the same; any other failure may pass at once.
    for _ in range(_WAKE_ATTEMPTS):
        try:
            os.eventfd_write(fd, 1)
        except BlockingIOError:
            return
        except OSError:
            continue
        return
