"""How long the guest's memory is slow after an update. The new VM's second-level page tables are
empty: the guest's first access to each page is a fault in KVM, and a guest that is bound by its
memory is back at its speed when these have become rare. Main loop thread.
"""

from __future__ import annotations

import time

from pyvmm.errors import PyvmmError
from pyvmm.kvm.stats import VmStats

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pyvmm.machine.machine import Machine
    from pyvmm.migration.status import Status

INTERVAL_S = 0.02
#: So many looks make a window, and it is over when one has this part of the busiest one's faults.
WINDOW = 5
RARE = 0.05
LONGEST_S = 30.0


class Refault:
    """One look at the guest's memory after an update, which tells ``status`` when it is over."""

    def __init__(self, machine: Machine, status: Status) -> None:
        self._machine = machine
        self._status = status
        self._start = time.monotonic()
        self._counts: list[int] = []
        self._busiest = 0
        try:
            self._stats = VmStats(machine.platform.vm.fd)
        except PyvmmError:
            return  # a host before Linux 5.14 does not tell
        self._look()

    def _look(self) -> None:
        if self._machine.ended:
            self._stats.close()
            return
        huge = self._stats.read("pages_2m") + self._stats.read("pages_1g")
        self._counts.append(self._stats.read("pages_4k") + huge)
        passed = time.monotonic() - self._start
        if len(self._counts) > WINDOW:
            first = self._counts.pop(0)
            recent = self._counts[-1] - first
            self._busiest = max(self._busiest, recent)
            if recent <= RARE * self._busiest or passed > LONGEST_S:
                self._stats.close()
                until = max(passed - WINDOW * INTERVAL_S, 0)
                told = {"pages": self._counts[-1], "huge": huge, "ms": round(until * 1e3, 1)}
                self._status.refault = told
                return
        self._machine.loop.call_later(INTERVAL_S, self._look)
