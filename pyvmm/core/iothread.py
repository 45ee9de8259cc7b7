"""A thread that runs an event loop of its own, for a device whose work would hold up others.

An exec leaves no thread but the main one: what it works on is drained before.
"""

from __future__ import annotations

from pyvmm._native import name_thread
from pyvmm.core.eventloop import EventLoop
from pyvmm.core.threads import START_TIMEOUT_S, Event, report_crash, spawn
from pyvmm.errors import HostError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

STOP_TIMEOUT_S = 10.0


class IoThread:
    """One thread, started by :meth:`start`.

    :param name: as ``top -H`` shows it
    :param on_crash: told on the thread what no handler of the loop caught; the loop is not
        served then, so the VM cannot go on before it is reset and this is started again
    """

    def __init__(self, name: str, on_crash: Callable[[str], None]) -> None:
        self.name = name
        self.loop = EventLoop()
        self._on_crash = on_crash
        self._started = False
        self._ready = Event()
        self._ended = Event()

    def start(self) -> None:
        """Begin to serve the loop, or begin again after a crash; harmless if it runs. The thread
        runs when this returns: what a thread allocates to begin with, it has.

        :raises HostError: the host has no room for a further thread
        """
        if not self._started or self._ended.is_set():
            self._ended.clear()
            self._ready.clear()
            spawn(self._run, self._handle_crash)
            self._started = True
            if not self._ready.wait(START_TIMEOUT_S):
                self._ended.set()
                raise HostError(f"thread {self.name} does not begin; free memory on the host")

    def close(self) -> None:
        """End the thread and its loop; any other thread. Idempotent."""
        if self._started:
            self.loop.stop()
            if not self._ended.wait(STOP_TIMEOUT_S):
                return  # stuck in the host: its loop must not be pulled from under it
        self._started = False
        self.loop.close()

    def _run(self) -> None:
        name_thread(self.name)
        self._ready.set()
        self.loop.run()
        self._ended.set()

    def _handle_crash(self, error: BaseException) -> None:
        report_crash(error)
        self._ended.set()
        self._on_crash(f"thread {self.name} failed: {error!r}")
