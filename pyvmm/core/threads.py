"""Threads and one-shot events on ``_thread`` alone.

``threading`` costs 5 ms of import time, which a live update would add to the guest's pause;
what is needed of it is a thread, a lock and an event that one thread waits for.
"""

from __future__ import annotations

import _thread
import sys

from pyvmm.errors import HostError

TYPE_CHECKING = False
if TYPE_CHECKING:
    import signal as _signal
    from collections.abc import Callable
else:
    import _signal  # what signal wraps in enums, at the cost of importing enum

Lock = _thread.allocate_lock

#: How long whoever starts a thread waits for its first words: one that the host has no memory
#: for dies without any.
START_TIMEOUT_S = 5.0


class Event:
    """A flag that one thread waits for and any thread sets."""

    __slots__ = ("_guard", "_is_set", "_lock")

    def __init__(self) -> None:
        self._guard = Lock()
        self._lock = Lock()
        self._lock.acquire()
        self._is_set = False

    def is_set(self) -> bool:
        """Return whether :meth:`set` came since the last :meth:`clear`."""
        return self._is_set

    def set(self) -> None:
        """Let the waiter pass, now or when it comes."""
        with self._guard:
            if not self._is_set:
                self._is_set = True
                self._lock.release()

    def clear(self) -> None:
        """Make the next :meth:`wait` block again."""
        with self._guard:
            if self._is_set:
                self._is_set = False
                self._lock.acquire()

    def wait(self, timeout_s: float | None = None) -> bool:
        """Block until the flag is set, for ``timeout_s`` at most (None: for ever); return whether
        it is set."""
        # A deadline that has passed gives less than 0, which a lock does not accept.
        if self._lock.acquire(timeout=-1 if timeout_s is None else max(timeout_s, 0)):
            self._lock.release()
            return True
        return False


def spawn(target: Callable[[], None], on_crash: Callable[[BaseException], None]) -> None:
    """Start a daemon thread. An exception that leaves ``target`` goes to ``on_crash``.

    Signals are the main thread's affair: one that another thread took right before an execve
    would be gone with that thread, while the main thread blocks those that end the VMM, so that
    they wait. But SIGBUS is for what the thread itself did, and the kernel ends a process that
    gets it blocked.

    :raises HostError: the host allows no further thread
    """

    def body() -> None:
        _signal.pthread_sigmask(_signal.SIG_SETMASK, _signal.valid_signals() - {_signal.SIGBUS})
        try:
            target()
        except BaseException as error:
            on_crash(error)

    try:
        _thread.start_new_thread(body, ())
    except RuntimeError:
        raise HostError(
            "the host allows no further thread; raise its limit (ulimit -u, the control group's "
            "pids.max) or free memory"
        ) from None


def report_crash(error: BaseException) -> None:
    """Print an exception that nothing handled, as the interpreter would at exit. Never raises,
    and where ``_util.log`` guards standard error never waits."""
    sys.excepthook(type(error), error, error.__traceback__)
