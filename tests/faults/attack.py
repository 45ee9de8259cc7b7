"""A supervisor of a VMM's system calls that does harm at one of those of an update's new image.

Counted are the calls of the new image's first thread, from the exec on: call 0 is the loader's
first. The carrier, which runs the guest meanwhile, and who comes in the new image's place are left
alone.
"""

import os
from pathlib import Path

from faults.syscalls import EXECVE, EXECVEAT, NO_ANSWER, Supervisor
from harness import process

from pyvmm._native import ffi, lib

#: Name of the memfd of the control pages.
CONTROL = "carrier"


def phase(fd):
    """Whose the guest is, by the control pages: one of ``lib.PYVMM_PREPARING`` and so on."""
    at = ffi.offsetof("struct pyvmm_control", "phase")
    return int.from_bytes(os.pread(fd, 4, at), "little")


def send(number):
    """The harm of a signal, sent to the process."""
    return lambda pid: os.kill(pid, number)


def stick(_pid):
    """The call never comes back, and no signal but SIGKILL is noticed."""
    return NO_ANSWER


def kill_carrier(pid):
    """The guest is lost, unless the new image has it already."""
    for child in process.children(pid):
        if Path(f"/proc/{child}/comm").read_text() == f"{process.CARRIER}\n":
            process.kill(child)


class Attacker(Supervisor):
    """One VMM's; see :class:`faults.syscalls.Supervisor` for how it is started.

    :ivar calls: the new image's, until the guest was its own or it was ended
    :ivar taken: whether the guest was its own before it got to the call
    """

    _control = None
    _harm = None
    taken = False

    def attack(self, pid, at=None, harm=None):
        """Look at the next update of the VMM ``pid``, and do harm at call ``at`` of the new image.

        :param harm: called with ``pid``
        """
        self._harm, self.taken = harm, False
        self.watch(pid, at)

    def end(self):
        super().end()
        if self._control is not None:
            os.close(self._control)
            self._control = None

    def _decide(self, call, number):
        pid = self._pid
        if call.thread != pid:
            return 0
        if number in (EXECVE, EXECVEAT):
            if self._executed:
                self._pid = 0  # the way back, in the same process
            else:
                self._control = os.open(process.memfd(pid, CONTROL), os.O_RDONLY)
            self._executed = True
            return 0
        if not self._executed:
            return 0
        if phase(self._control) == lib.PYVMM_TAKEN:
            self.taken = True
            self._pid = 0
            return 0
        self.calls.append(call)
        if len(self.calls) - 1 != self._fail_at:
            return 0
        self.failed = call
        self._pid = 0
        return self._harm(pid) or 0
