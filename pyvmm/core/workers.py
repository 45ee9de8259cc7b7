"""A few threads for calls that wait for the host: disk I/O beside a device's own loop.

The threads are started when there is work for them, and wait for more. An exec leaves none of
them: what they do is drained before.
"""

from __future__ import annotations

import errno
from _queue import SimpleQueue  # queue imports threading

from pyvmm._native import name_thread
from pyvmm.core.threads import Event, Lock, report_crash, spawn
from pyvmm.errors import HostError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable


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
        self._unfinished = 0
        self._idle = Event()
        self._idle.set()

    def submit(self, call: Callable[[], None]) -> None:
        """Have ``call()`` made soon. Any thread.

        :raises OSError: the host allows not one thread
        """
        with self._lock:
            if self._unfinished >= self._threads and self._threads < self._most:
                try:
                    spawn(self._run, report_crash)
                    self._threads += 1
                except HostError as error:
                    # The host allows no more threads: the calls wait for those there are.
                    if not self._threads:
                        raise OSError(errno.EAGAIN, str(error)) from None
            self._unfinished += 1
            self._idle.clear()
        self._calls.put(call)

    @property
    def unfinished(self) -> int:
        """How many calls were submitted that have not returned."""
        return self._unfinished

    def wait(self, timeout_s: float) -> bool:
        """Wait until all calls have ended; return whether they have. One thread at a time."""
        return self._idle.wait(timeout_s)

    def close(self) -> None:
        """Let the threads end when they have made the calls that were submitted."""
        for _ in range(self._threads):
            self._calls.put(None)

    def _run(self) -> None:
        name_thread(self._name)
        while (call := self._calls.get()) is not None:
            try:
                call()
            except Exception as error:
                report_crash(error)
            # The call may hold views of guest memory, which must go before anybody is told.
            del call
            with self._lock:
                self._unfinished -= 1
                if not self._unfinished:
                    self._idle.set()
