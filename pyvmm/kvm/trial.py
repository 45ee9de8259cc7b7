"""Whether the kernel does what the carrier rests on, tried for real: on a VM of a page, with an
exec of a program that ends at once. A kernel that changes its mind one day makes updates go the
plain way, and costs no guest. Main loop thread."""

from __future__ import annotations

import mmap
import os

from pyvmm._native import ffi, lib
from pyvmm.errors import PyvmmError
from pyvmm.kvm.carrier import SIGKILL, WALL, words
from pyvmm.kvm.vm import Vm

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from pyvmm.kvm.system import System

_STEPS = {
    lib.PYVMM_TRIAL_BEGUN: "a task that shares the memory cannot enter a vCPU",
    lib.PYVMM_TRIAL_ENTERED: "it does not outlive the exec of its maker",
    lib.PYVMM_TRIAL_LEFT: "KVM does nothing for it after the exec of its maker",
}
_HALT = b"\xf4"
_START = 0x100
_STACK_ALIGNMENT = 16


class Trial:
    """One trial, which begins at once, and takes as long as a program takes to start and end.

    :param system: /dev/kvm
    """

    def __init__(self, system: System) -> None:
        self._problem = ""
        self._opened: list[Callable[[], None]] = []
        self._trial = ffi.new("struct pyvmm_trial *")
        self._kept: list[Any] = []
        try:
            self._begin(system)
        except (PyvmmError, OSError) as error:
            self._problem = str(error)

    def _begin(self, system: System) -> None:
        memory = mmap.mmap(-1, mmap.PAGESIZE)
        self._opened.append(memory.close)
        memory[_START : _START + len(_HALT)] = _HALT
        vm = Vm.create(system)
        self._opened.append(vm.close)
        vm.set_user_memory_region(0, 0, memory)
        vcpu = vm.create_vcpu(0)
        self._opened.append(vcpu.close)
        sregs, regs = vcpu.get_sregs(), vcpu.get_regs()
        sregs.cs.base = sregs.cs.selector = 0
        regs.rip, regs.rflags = _START, 2
        vcpu.set_sregs(sregs)
        vcpu.set_regs(regs)
        trial = self._trial
        trial.vcpu_fd, trial.run = vcpu.fd, vcpu.mapping
        read_fd, write_fd = trial.pipe_fds = os.pipe2(os.O_CLOEXEC)
        self._opened.append(lambda: os.close(read_fd))
        program = os.open("/proc/self/exe", os.O_RDONLY | os.O_CLOEXEC)
        try:
            trial.program_fd = program
            trial.command = words([b"python", b"--version"], self._kept)
            environment = [b"=".join(pair) for pair in os.environb.items()]
            trial.environment = words(environment, self._kept)
            stacks = ffi.new("char[]", 2 * lib.PYVMM_TRIAL_STACK + _STACK_ALIGNMENT)
            self._kept.append(stacks)
            trial.stacks = stacks + -int(ffi.cast("uintptr_t", stacks)) % _STACK_ALIGNMENT
            # The vCPU has run in one task when it is another's.
            vcpu.set_immediate_exit(True)
            vcpu.run()
            result = lib.pyvmm_try(trial)
            if result < 0:
                raise OSError(-result, f"clone: {os.strerror(-result)}")
        finally:
            os.close(program)
            os.close(write_fd)

    def end(self, timeout_s: float) -> str:
        """Wait for its end; return what the kernel does not do, or empty. Once.

        :param timeout_s: how long to wait
        """
        trial = self._trial
        if not self._problem:
            result = lib.pyvmm_wait_trial(trial, int(timeout_s * 1e9))
            if result < 0:
                self._problem = f"{_STEPS[trial.step]}: {os.strerror(-result)}"
        for pid in (trial.pid, trial.task_pid):
            if pid:
                os.kill(pid, SIGKILL)
                os.waitpid(pid, WALL)
        while self._opened:
            self._opened.pop()()
        return self._problem

    @property
    def move_ms(self) -> float:
        """How long a vCPU takes from one task to another."""
        return int(self._trial.move) / 1e6
