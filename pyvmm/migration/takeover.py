"""The new image takes the guest over from the carrier that runs it (docs/carrier.md, the other side
of ``running_exec``).

All that can be done with the guest running is done before: the devices are loaded, the vCPUs made,
their threads wait. Main loop thread only.
"""

from __future__ import annotations

from pyvmm.core import runstate
from pyvmm.cpr.handover import CPR
from pyvmm.kvm import carrier
from pyvmm.machine.cpu import KICK_SIGNAL
from pyvmm.x86 import vcpu_state

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pyvmm.machine.machine import Machine
    from pyvmm.migration.holder import Holder
    from pyvmm.migration.status import Status


class Takeover:
    """One takeover, once.

    :param fd: of the control pages, owned from now on
    :raises PyvmmError: the vCPUs here cannot go on for those
    """

    def __init__(self, machine: Machine, status: Status, fd: int) -> None:
        self._machine = machine
        self._status = status
        self._fd = fd
        platform = machine.platform
        control = carrier.Control.adopt(fd, platform.vcpus)
        self._carrier = carrier.Takeover(control, platform.vm, platform.vcpus, KICK_SIGNAL)
        # Before any state, and it cannot be changed after: it says what MSRs and XSAVE may have.
        for vcpu in platform.vcpus:
            vcpu_state.adopt_cpuid(vcpu, control.cpuid(vcpu.index))

    def begin(self, state: str) -> None:
        """Take the guest over, into run state ``state``.

        :raises MigrationError: it is the carrier's as before, or lost with it
        """
        machine = self._machine
        self._status.running = True
        running = state == runstate.RUNNING
        if running:
            machine.await_cpus()
        self._carrier.take(running=running)
        if not running:
            machine.runstate.set(state)

    def finish(self, holder: Holder) -> None:
        """The guest is here: have its devices work, and end the carrier."""
        machine = self._machine
        if machine.runstate.running:
            machine.attempt(machine.go_on, "update")
            machine.loop.call_soon(self._note_times)
        else:
            # What it did last in the carrier; one that runs does it first of all.
            for cpu in machine.cpus:
                machine.attempt(cpu.settle, "update")
        holder.await_end(self._carrier.end_carrier())
        machine.handover.parcel(CPR, "carrier").close(self._fd)

    def _note_times(self) -> None:
        # All vCPUs have got here by now.
        self._status.cpu_times = self._carrier.times()
