"""Mode cpr-exec, the plain order: the guest stands from before its state is saved until the new
image has loaded it.

What is in here is what the other way through an exec does otherwise (``running_exec``). The order
of the steps, and their undoing, is ``outgoing``'s. Main loop thread only.
"""

from __future__ import annotations

import os

from pyvmm.core import runstate
from pyvmm.errors import HostError, MigrationError
from pyvmm.migration import rollback
from pyvmm.migration.channel import MemoryChannel
from pyvmm.migration.status import blockers

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from pyvmm.machine.machine import Machine
    from pyvmm.migration.holder import Holder
    from pyvmm.migration.status import Status

# All has come to rest before the vCPUs stop. This is for a thread that looks at its queue, and
# for what a driver can still begin (a flush), which must not be waited for in the pause.
DRAIN_S = 0.1


class CprExec:
    """One exec of one machine. Each step puts what undoes it on ``undo`` before it can fail.

    :param before: the run state in which the update finds the guest
    """

    #: Whether the guest runs meanwhile.
    is_running = False

    def __init__(
        self,
        machine: Machine,
        status: Status,
        holder: Holder,
        before: str,
        undo: list[Callable[[], None]],
    ) -> None:
        self._machine = machine
        self._status = status
        self._holder = holder
        self._before = before
        self._undo = undo

    def prepare(self, state_fd: int) -> None:
        """Do what can fail for want of the host's means. The guest runs.

        :param state_fd: of the CPR state, which will be written
        """
        self._state_fd = state_fd

    def stop_guest(self) -> None:
        """Have the guest stand, with all done that it asked for.

        :raises PyvmmError: it does not, or it ended
        """
        self._undo.append(self._restart_guest)
        # What the guest asked for in its last moments (a reset, its end) is acted on first.
        machine = self._machine
        machine.pause_cpus(DRAIN_S)
        while machine.end.has_requests and not machine.ended:
            machine.end.serve()
            machine.pause_cpus(DRAIN_S)
        for reason in blockers(machine):
            raise MigrationError(reason)
        if machine.runstate.state != self._before or machine.ended:
            raise MigrationError(f"The guest ended in the meantime ({machine.runstate.state})")
        machine.runstate.set(runstate.FINISH_MIGRATE)
        if self._before == runstate.RUNNING:
            machine.emit("STOP", None)

    def hold_memory(self) -> None:
        """Keep the old address space and the VM beyond the exec. An update without takes longer,
        that is all; the new image says so, once the guest runs."""
        try:
            self._undo.append(self._holder.hold())
        except HostError as error:
            self._status.note = f"the old memory was taken apart in the pause ({error})"

    def execute(self, path: str, argv: list[str]) -> None:
        """Replace this program by the next; return only by an exception.

        :raises MigrationError: it cannot be executed
        """
        machine, handover, undo = self._machine, self._machine.handover, self._undo
        undo.append(rollback.disarm)
        rollback.arm()
        if machine.signalled:
            raise MigrationError(f"Signal {machine.signalled} ends the VMM")
        environment = rollback.publish(handover, MemoryChannel.text, self._state_fd)
        os.set_inheritable(self._state_fd, True)
        # The very last act: a helper forked earlier must not inherit guest memory.
        undo.append(lambda: handover.set_inheritable(False))
        handover.set_inheritable(True)
        self._cross()
        try:
            os.execve(path, argv, os.environ | environment)
        except OSError as error:
            raise MigrationError(f"execve {path} failed: {error.strerror}") from None

    def _cross(self) -> None:
        """All is there that the next image needs, whoever starts it."""

    def _restart_guest(self) -> None:
        machine = self._machine
        if machine.runstate.state != runstate.FINISH_MIGRATE:
            # The update did not get as far as the stop, or the guest ended by itself.
            if machine.runstate.running and not machine.ended:
                machine.resume_cpus()
        elif self._before == runstate.RUNNING:
            machine.set_running()
        else:
            machine.runstate.set(self._before)
