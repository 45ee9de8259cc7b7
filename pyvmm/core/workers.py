"""A few threads for calls that wait for the host: disk I/O beside a device's own loop.

The threads are started when there is work for them, and wait for more. An exec leaves none of
them: what they do is drained before.
"""

from __future__ import annotations

from _queue import SimpleQueue  # queue imports threading

from pyvmm._native import name_thread
from pyvmm.core.threads import Lock, report_crash, spawn

TYPE_CHECKING = False
if TYPE_CHECKING:
    import signal as _signal
    from collections.abc import Callable
else:
    import _signal  # what signal wraps in enums, at the cost of importing enum


class Workers:
    """Threads that make calls for others.

    :param name: of the threads, as ``top -H`` shows it
    :param most: how many threads there are at most; further calls wait for a free one
    """

    def __init__(self, name: str, most: int) -> None:
        self._name = name
        self._most = most
        self._calls: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._lock = Lock()
        self._threads = 0
        self._busy = 0

    def submit(self, call: Callable[[], None]) -> None:
        """Have ``call()`` made soon. Any thread."""
        with self._lock:
            self._busy += 1
            if self._busy > self._threads and self._threads < self._most:
                self._threads += 1
                spawn(self._run, report_crash)
        self._calls.put(call)

    def close(self) -> None:
        """Let the threads end when they have made the calls that were submitted."""
        for _ in range(self._threads):
            self._calls.put(None)

    def _run(self) -> None:
        name_thread(self._name)
        # Signals are the main thread's, whatever mask was inherited.
        _signal.pthread_sigmask(_signal.SIG_SETMASK, _signal.valid_signals())
        while (call := self._calls.get()) is not None:
            try:
                call()
            except Exception as error:
                report_crash(error)
            with self._lock:
                self._busy -= 1
