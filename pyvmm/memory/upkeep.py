"""What is done for guest RAM beside the running guest, a little at a time: huge pages are made of
it, and after an update it is mapped before the guest asks for it.

**Huge pages.** In pages of 4 KiB memory is slow: each takes an entry in the host's and in KVM's
tables, and after an update a fault. Linux gives a file in memory huge pages of its own accord only
where ``/sys/kernel/mm/transparent_hugepage/shmem_enabled`` says so, and by default it says
``never``. Since Linux 6.1 a process can ask for them all the same (madvise(2), MADV_COLLAPSE). They
are the file's: what one image has made huge the next one finds so, and is told which they are.

Memory that the guest has not touched stays the host's: a huge page is made where nearly all of its
pages are there, and where memory may run out before the host's does, where all of them are.

**Mapping ahead.** A new image's tables are empty. KVM looks up a page of the guest's in the tables
of the process. Where it is not there yet, that takes a fault, and one exit of the guest for each
page; where it is, KVM may take neighbours with it, up to eight.

A thread does the work, once in a while, and ends. Main loop thread, but for that.
"""

from __future__ import annotations

import errno
import os

from pyvmm._native import ffi, lib, name_thread
from pyvmm.core.threads import Event, report_crash, spawn
from pyvmm.cpr.handover import HUGE, Passenger
from pyvmm.errors import HostError
from pyvmm.memory.backend import HUGE_PAGE

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from pyvmm.core.eventloop import EventLoop, Timer
    from pyvmm.cpr.handover import Handover
    from pyvmm.memory.backend import RamBackend

#: When a guest that has just started is looked at first, and after a look that had something to do
#: again. One that had not doubles that time.
FIRST_S, SHORTEST_S, LONGEST_S = 1.0, 2.0, 60.0
#: Of 512 pages so many have to be there: memory grows by a fifteenth at most.
LEAST, ALL = 480, 512
#: One huge page takes the kernel half a millisecond or so, and 2 MiB that are mapped a fifth of
#: that. After so much work the thread rests, in the former case ten times as long, within bounds: a
#: tenth of a processor, and no vCPU waits for more than one page. On a busy host, where the work
#: itself has to wait, that makes it rare. The thread has the vCPUs' priority: with a lower one it
#: would be kept from the processor while it holds the lock of the address space, which their faults
#: wait for.
WORK_NS, RESTS, REST_NS, LONGEST_REST_NS = 100_000, 10, 5_000_000, 1_000_000_000
#: How long the end of the machine waits for the thread, which is at 2 MiB at the most.
END_TIMEOUT_S = 2.0

OFF, WAITING, WORKING, PAUSED, REFUSED = "off", "waiting", "working", "paused", "refused"

_REASONS = {
    errno.ENOMEM: "the host has no huge page free at this time",
    errno.EBUSY: "the control group may have no more memory",
    errno.EAGAIN: "pages are in use at this time",
}
_NEVER = (
    "the kernel makes no huge pages of this memory; that takes Linux 6.1, a file system in memory,"
    " and a shmem_enabled that is not deny"
)


class Block(Passenger):
    """One block of memory.

    :ivar reason: why it has not more huge pages; empty if nothing is in the way
    :ivar is_refused: whether the kernel makes none of it

    :param state: :meth:`save_state` of the image before; empty if there is none
    """

    def __init__(self, backend: RamBackend, state: bytes) -> None:
        self.reason = ""
        self.is_refused = False
        count = backend.size // HUGE_PAGE
        self._huge = ffi.new("uint8_t[]", count)
        if len(state) == count:  # another is of no memory of this size
            ffi.buffer(self._huge)[:] = state
        self._work = work = ffi.new("struct pyvmm_upkeep *")
        work.start = ffi.cast("uint8_t *", backend.address)
        work.huge, work.count = self._huge, count
        work.made = count - self.save_state().count(0)
        work.is_shared = backend.is_shared
        work.least = ALL if backend.is_limited else LEAST
        work.work_ns, work.rests = WORK_NS, RESTS
        work.rest_ns, work.longest_rest_ns = REST_NS, LONGEST_REST_NS

    @property
    def made(self) -> int:
        """How many huge pages there are. Any thread."""
        return int(self._work.made)

    @property
    def longest_ms(self) -> float:
        """How long the kernel took for one of them at most; 0 if this image has made none."""
        return float(self._work.longest_ns) / 1e6

    def save_state(self) -> bytes:
        """Return a byte for each 2 MiB: whether they are a huge page."""
        return bytes(ffi.buffer(self._huge))

    def begin(self) -> None:
        """:meth:`map_ahead` or :meth:`collapse` is about to come: a :meth:`stop` from now on is of
        that."""
        self._work.stop = 0

    def map_ahead(self) -> None:
        """Map what there is. The thread."""
        lib.pyvmm_map_ahead(self._work)  # Linux before 5.14 does not: the guest finds its pages

    def collapse(self) -> None:
        """Make the huge pages that can be made. The thread."""
        error = -lib.pyvmm_collapse(self._work)
        if error == errno.ECANCELED:
            return
        error = error or self._work.error
        self.is_refused = error == errno.EINVAL and not self.made
        self.reason = _NEVER if self.is_refused else _describe(error)

    def stop(self) -> None:
        """Have both return soon. Any thread."""
        lib.pyvmm_stop_upkeep(self._work)


class Upkeep:
    """The care for one machine's memory.

    :param backends: all blocks
    :param collapses: whether huge pages are to be made of those that can have any
    """

    def __init__(
        self,
        loop: EventLoop,
        handover: Handover,
        backends: list[RamBackend],
        *,
        collapses: bool,
    ) -> None:
        self._loop = loop
        self._collapses = collapses
        self._blocks: dict[str, Block] = {}
        for backend in backends:
            if not obstacle(backend):
                parcel = handover.parcel(HUGE, backend.name)
                block = self._blocks[backend.name] = Block(backend, parcel.take_state())
                parcel.board(block)
        self._maps_ahead = handover.is_incoming
        self._is_quiesced = False
        self._is_working = False
        self._problem = ""
        self._made = self._count()
        self._ended = Event()
        self._ended.set()
        self._interval_s = SHORTEST_S
        self._timer: Timer | None = None
        self._plan(0 if self._maps_ahead else FIRST_S)

    def quiesce(self) -> None:
        """Do nothing from now on, but finish the 2 MiB that are under way: an update comes, and has
        better use for the processor."""
        self._is_quiesced = True
        if self._timer is not None:
            self._timer.cancel()
        for block in self._blocks.values():
            block.stop()

    def unquiesce(self) -> None:
        """Go on: the update did not come."""
        if self._is_quiesced:
            self._is_quiesced = False
            self._plan(FIRST_S)

    def close(self) -> bool:
        """End; return whether the thread has, so that the memory may go. Idempotent."""
        self.quiesce()
        return self._ended.wait(END_TIMEOUT_S)

    def describe(self, backend: RamBackend) -> dict[str, Any]:
        """Return what is to be told of a block's huge pages: ``state``, how many bytes are
        ``huge``, and if there is one, the ``reason`` why not more are."""
        block = self._blocks.get(backend.name)
        if block is None or not self._collapses:
            reason = "" if block else obstacle(backend)
            return {"state": OFF, "huge": 0} | ({"reason": reason} if reason else {})
        state = WORKING if self._is_working else WAITING
        if block.is_refused:
            state = REFUSED
        elif self._is_quiesced:
            state = PAUSED
        told: dict[str, Any] = {"state": state, "huge": block.made * HUGE_PAGE}
        if block.longest_ms:
            told["longest-ms"] = round(block.longest_ms, 3)
        reason = block.reason or self._problem
        return told | ({"reason": reason} if reason else {})

    def _plan(self, delay_s: float) -> None:
        """Have the next look then, if there is anything to do."""
        if self._timer is not None:
            self._timer.cancel()
        if not self._is_quiesced and (self._maps_ahead or self._candidates()):
            self._timer = self._loop.call_later(delay_s, self._look)

    def _look(self) -> None:
        if not self._ended.is_set():
            return  # quiesced and not any more, and not at its end yet, which plans the next one
        for block in self._blocks.values():
            block.begin()
        self._ended.clear()
        self._is_working = True
        self._problem = ""
        try:
            spawn(self._run, self._handle_crash)
        except HostError as error:
            self._problem = str(error)
            self._ended.set()
            self._finish()

    def _candidates(self) -> list[Block]:
        if not self._collapses:
            return []
        return [block for block in self._blocks.values() if not block.is_refused]

    def _count(self) -> int:
        return sum(block.made for block in self._blocks.values())

    def _run(self) -> None:
        name_thread("upkeep")
        if self._maps_ahead:
            self._maps_ahead = False
            for block in self._blocks.values():
                block.map_ahead()
        for block in self._candidates():
            block.collapse()
        self._leave()

    def _handle_crash(self, error: BaseException) -> None:
        report_crash(error)
        self._leave()

    def _leave(self) -> None:
        self._ended.set()
        self._loop.call_soon(self._finish)

    def _finish(self) -> None:
        self._is_working = False
        made = self._count()
        self._interval_s = SHORTEST_S if made > self._made else min(2 * self._interval_s, LONGEST_S)
        self._made = made
        self._plan(self._interval_s)


def obstacle(backend: RamBackend) -> str:
    """Return why a block is left as it is; empty if it is not."""
    if backend.size < HUGE_PAGE:
        return "it is smaller than a huge page"
    if backend.is_hugetlb:
        return "it has huge pages of its own"
    if backend.fd is not None and not backend.is_shared:
        return "it is a private copy of a file"
    return ""


def _describe(error: int) -> str:
    return _REASONS.get(error, os.strerror(error)) if error else ""
