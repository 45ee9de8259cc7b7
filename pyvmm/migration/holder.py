"""The process that holds the old image's memory and VM beyond the exec, until the guest runs in the
new one: taking them apart takes milliseconds, which would be part of the pause.

It shares the old address space, waits for the end of a pipe, and ends. Old image:
:meth:`Holder.hold`. New image: :meth:`Holder.release`, off the pause, and what is left of it is
waited for. Main loop thread only.
"""

from __future__ import annotations

import os

from pyvmm import _native
from pyvmm.cpr.handover import CPR, OWN, Passenger

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from pyvmm.machine.machine import Machine

REAP_INTERVAL_S = 0.05
_WALL = 0x40000000  # waitpid(2): children of clone that send no signal, too


class Holder(Passenger):
    """The holders of one machine."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        # By process id: the pipe that it waits for.
        self._parcel = machine.handover.parcel(CPR, "holder")
        self._pipes = self._parcel.take_all()
        # Those of earlier updates, if one came before they were waited for.
        ended = machine.handover.parcel(OWN, "holders")
        ended.board(self)
        pids = ended.take_state()
        self._ended = [int.from_bytes(pids[at : at + 4]) for at in range(0, len(pids), 4)]

    def hold(self) -> Callable[[], None]:
        """Start a holder; return how to undo that.

        :raises HostError: the host allows no further process
        """
        machine = self._machine
        read_fd, write_fd = os.pipe2(os.O_CLOEXEC)
        vm_fds = [machine.platform.vm.fd, *(cpu.vcpu.fd for cpu in machine.cpus)]
        try:
            pid = _native.hold_memory(vm_fds, read_fd)
        except BaseException:
            os.close(write_fd)
            raise
        finally:
            os.close(read_fd)
        self._parcel.keep(write_fd, pid)

        def undo() -> None:
            self._parcel.close(write_fd, pid)
            os.waitpid(pid, _WALL)

        return undo

    def release(self) -> None:
        """The guest runs here: the old image's memory is not needed any more."""
        for pid, fd in self._pipes.items():
            os.close(fd)
            self._ended.append(pid)
        self._pipes.clear()
        self._reap()

    def await_end(self, pid: int) -> None:
        """Wait, off the pause, for the end of another child that shares an old address space."""
        self._ended.append(pid)
        self._reap()

    def save_state(self) -> bytes:
        """Return the ids of those that were not waited for yet, 4 bytes each."""
        return b"".join(pid.to_bytes(4) for pid in self._ended)

    def _reap(self) -> None:
        for pid in list(self._ended):
            try:
                if not os.waitpid(pid, _WALL | os.WNOHANG)[0]:
                    continue
            except ChildProcessError:
                pass
            self._ended.remove(pid)
        if self._ended:
            self._machine.loop.call_later(REAP_INTERVAL_S, self._reap)
