"""Mode cpr-exec, the guest running: its vCPUs are the carrier's (``kvm.carrier``) from before the
exec until the new image has built its machine and takes them over.

Until then the guest has memory, interrupt controllers and timers, and no devices: an access to one
waits. docs/carrier.md has the order and its reasons. What is in here is what differs from the plain
way (``cpr_exec``). Main loop thread only.
"""

from __future__ import annotations

import os
import time

from pyvmm import wayback
from pyvmm._native import lib
from pyvmm.core import runstate
from pyvmm.cpr.handover import CPR
from pyvmm.cpr.state import ENVIRONMENT
from pyvmm.errors import HostError, MigrationError
from pyvmm.kvm.carrier import PATIENCE_S, Carrier, Control
from pyvmm.machine.cpu import KICK_SIGNAL
from pyvmm.migration import rollback
from pyvmm.migration.channel import MemoryChannel
from pyvmm.migration.cpr_exec import CprExec
from pyvmm.migration.status import blockers

#: How long what devices have under way may take, with the guest running.
DRAIN_S = 2.0
#: How long an image has to take the guest over, before it is killed. Longer than its own alarm: one
#: that still can goes back by itself, and keeps the process id.
DEADLINE_S = 2.5 * rollback.DEADLINE_S
DIED = "the new image ended before it took over; its standard error may say why"
LATE = f"the new image did not take over within {DEADLINE_S:.0f} s, and was killed"


class FallBack(Exception):
    """The guest cannot run through this exec; nothing has happened to it, and the plain way is
    open."""


class RunningExec(CprExec):
    """One exec of one machine, as :class:`CprExec`."""

    is_running = True

    def prepare(self, state_fd: int) -> None:
        """Start the carrier, whose tasks wait: nothing that can fail for want of the host's means
        comes after the guest's vCPUs have begun to move.

        :param state_fd: of the CPR state, which will be written
        :raises FallBack: the host does not allow it
        """
        super().prepare(state_fd)
        machine, handover = self._machine, self._machine.handover
        vcpus = [cpu.vcpu for cpu in machine.cpus]
        parcel = handover.parcel(CPR, "carrier")
        try:
            control, fd = Control.make(
                vcpus,
                *machine.platform.carried_msrs(),
                running=self._before == runstate.RUNNING,
            )
            self._undo.append(lambda: parcel.close(fd))
            parcel.keep(fd)
            machine.platform.keep_control(control)
            self._carrier = Carrier(control, machine.platform.vm, vcpus, KICK_SIGNAL)
            self._undo.append(self._carrier.end)
            program = handover.kept()[rollback.EXE]
            self._carrier.start(
                [state_fd, *handover.kept().values()],
                program,
                [os.fsencode(word) for word in rollback.own_command(MemoryChannel.text)],
                [_environment(state_fd, why) for why in (DIED, LATE)],
                rollback.DEFERRED,
                DEADLINE_S,
                machine.platform.irqs.irqfds,
            )
        except (HostError, OSError) as error:
            raise FallBack(str(error)) from None

    def stop_guest(self) -> None:
        """Give the vCPUs to the carrier, one by one as each has no access half done, and have the
        devices come to rest. The guest runs.

        :raises FallBack: one does not get there
        :raises PyvmmError: the guest is about to end, or a device does not come to rest
        """
        machine, carrier = self._machine, self._carrier
        for reason in blockers(machine):
            raise MigrationError(reason)
        self._undo.append(self._take_back)
        if self._before == runstate.RUNNING:
            for cpu in machine.cpus:
                cpu.hand_over(carrier)
            deadline = time.monotonic() + PATIENCE_S
            for cpu in machine.cpus:
                self._await_move(cpu.index, deadline)
        else:
            for cpu in machine.cpus:
                carrier.hold(cpu.vcpu)
        machine.drain(DRAIN_S)
        if machine.end.has_requests or machine.ended or machine.runstate.state != self._before:
            # What it asked for in its last moments here (a reset, its end) is acted on.
            raise FallBack("the guest asked for a reset or for its end meanwhile")
        for cpu in machine.cpus:
            problem = carrier.is_running(cpu.index)
            if problem:
                raise FallBack(f"vCPU {cpu.index} does not run in the carrier: {problem}")
        machine.runstate.set(runstate.FINISH_MIGRATE)
        if self._before == runstate.RUNNING:
            machine.emit("STOP", None)

    def _await_move(self, index: int, deadline: float) -> None:
        carrier, cpu = self._carrier, self._machine.cpus[index]
        while not carrier.wait_owner(index, lib.PYVMM_CARRIED, 0.1):
            if cpu.stands:
                # It cannot go on, and whoever stops the machine for that has not been here yet.
                raise FallBack(f"vCPU {index} has stopped meanwhile")
            if time.monotonic() >= deadline:
                raise FallBack(f"vCPU {index} does not leave KVM_RUN")

    def hold_memory(self) -> None:
        """The carrier does."""

    def _cross(self) -> None:
        control = self._carrier.control.pages
        if not self._carrier.is_alive():
            raise MigrationError("the carrier was killed; the guest is back in this image")
        control.deadline = time.monotonic_ns() + int(DEADLINE_S * 1e9)
        self._undo.append(self._stay)
        # From here on the end of this process is no reason for the guest to end.
        control.phase = lib.PYVMM_CROSSING

    def _stay(self) -> None:
        self._carrier.control.pages.phase = lib.PYVMM_PREPARING

    def _take_back(self) -> None:
        self._carrier.take_back()
        self._restart_guest()


def _environment(state_fd: int, why: str) -> dict[bytes, bytes]:
    told = {ENVIRONMENT: str(state_fd), wayback.FAILURE: f"{why}\n"}
    return {**os.environb, **{name.encode(): value.encode() for name, value in told.items()}}
