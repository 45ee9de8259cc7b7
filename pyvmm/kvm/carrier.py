"""The carrier: runs the vCPUs while the process executes its next image (``_native/carrier.h``,
docs/carrier.md).

:class:`Control` is the memory that all three share: the image before, the carrier, the image after.
The image before makes a :class:`Carrier`, the one after a :class:`Takeover`. Main loop thread.
"""

from __future__ import annotations

import errno
import os
import time

from pyvmm._native import ffi, lib
from pyvmm.errors import HostError, MigrationError
from pyvmm.kvm import exits

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from typing import Any

    from pyvmm.kvm.vcpu import Vcpu
    from pyvmm.kvm.vm import Vm

VERSION = lib.PYVMM_CARRIER_VERSION
_PAGE = 4096
#: How long its tasks may take to be there, and a vCPU to come and go.
PATIENCE_S = 5.0
SPIN_S = 200e-6
_LOOK_S = 20e-6
#: How long a vCPU is waited for before somebody looks whether there is a carrier at all.
_TURN_S = 0.01
SIGKILL = 9
WALL = 0x40000000  # waitpid(2): children of clone that send no signal, too
_STATE_REQUESTS = (
    "KVM_GET_MP_STATE KVM_GET_REGS KVM_GET_SREGS KVM_GET_XSAVE KVM_GET_XSAVE2 KVM_GET_XCRS "
    "KVM_GET_DEBUGREGS KVM_GET_LAPIC KVM_GET_MSRS KVM_GET_VCPU_EVENTS KVM_SET_REGS KVM_SET_SREGS "
    "KVM_SET_SREGS2 KVM_SET_XCRS KVM_SET_XSAVE KVM_SET_DEBUGREGS KVM_SET_LAPIC KVM_SET_MSRS "
    "KVM_SET_DEVICE_ATTR KVM_SET_ONE_REG KVM_SET_MP_STATE KVM_SET_VCPU_EVENTS KVM_GET_PIT2 "
    "KVM_GET_IRQCHIP KVM_GET_CLOCK KVM_SET_IRQCHIP KVM_IRQ_LINE KVM_SET_PIT2 KVM_SET_CLOCK "
    "KVM_IRQFD"
)


class CpuTimes:
    """When a vCPU changed hands, CLOCK_MONOTONIC in ns; 0 for what did not happen.

    :ivar left: its thread in the image before left it
    :ivar entered: the carrier had it in KVM_RUN
    :ivar asked: the new image asked the carrier for it
    :ivar run: its thread there went on with it
    """

    __slots__ = ("asked", "entered", "left", "run")

    def __init__(self, left: int, entered: int, asked: int, run: int) -> None:
        self.left = left
        self.entered = entered
        self.asked = asked
        self.run = run


class Control:
    """The control pages.

    :param fd: their memfd, which stays the caller's
    :param size: bytes of it
    :ivar pages: ``struct pyvmm_control *``
    """

    def __init__(self, fd: int, size: int) -> None:
        self._size = size
        self._base = ffi.cast("char *", lib.pyvmm_map(fd, size))
        if self._base == ffi.NULL:
            raise HostError("no memory for the control pages of an update")
        self.pages = ffi.cast("struct pyvmm_control *", self._base)

    @classmethod
    def make(
        cls,
        vcpus: Sequence[Vcpu],
        msrs: Sequence[int],
        sparse: Sequence[int],
        *,
        running: bool,
    ) -> tuple[Control, int]:
        """Return control pages for a machine's vCPUs, and their memfd.

        :param msrs: the registers that are always carried
        :param sparse: those of which a 0 is not
        :param running: whether the guest runs, or is paused
        :raises HostError: there is no memory for them
        """
        header = _whole_pages(ffi.sizeof("struct pyvmm_control"))
        xsave_at = _aligned(ffi.sizeof("struct pyvmm_slot"), 64)
        slot_size = _whole_pages(xsave_at + vcpus[0].xsave_size)
        size = header + len(vcpus) * slot_size
        try:
            fd = os.memfd_create("carrier", os.MFD_CLOEXEC)
        except OSError as error:
            raise HostError(f"control pages of an update: {error.strerror}") from None
        try:
            # All of it now: a host that is full would end the carrier with SIGBUS.
            os.posix_fallocate(fd, 0, size)
            control = cls(fd, size)
        except OSError as error:
            os.close(fd)
            raise HostError(f"control pages of an update: {error.strerror}") from None
        except BaseException:
            os.close(fd)
            raise
        pages = control.pages
        pages.version, pages.size = VERSION, ffi.sizeof("struct pyvmm_control")
        pages.slots_at, pages.slot_size = header, slot_size
        pages.xsave_at, pages.xsave_size = xsave_at, vcpus[0].xsave_size
        pages.has_xsave2 = vcpus[0].has_xsave2
        pages.cpu_count = len(vcpus)
        pages.first_command = lib.PYVMM_RUN if running else lib.PYVMM_HOLD
        pages.command = pages.first_command
        pages.msrs.sparse_from = len(msrs)
        pages.msrs.count = len(msrs) + len(sparse)
        pages.msrs.indices[0 : pages.msrs.count] = [*msrs, *sparse]
        for vcpu in vcpus:
            slot = control.slot(vcpu.index)
            slot.cpuid_count = len(vcpu.cpuid) // ffi.sizeof(slot.cpuid[0])
            ffi.buffer(slot.cpuid)[: len(vcpu.cpuid)] = vcpu.cpuid
        return control, fd

    @classmethod
    def adopt(cls, fd: int, vcpus: Sequence[Vcpu]) -> Control:
        """Return the control pages that the image before made.

        :raises MigrationError: they are not for this machine, or of another version
        """
        size = os.fstat(fd).st_size
        if size < ffi.sizeof("struct pyvmm_control"):
            raise MigrationError(f"carrier: control pages of {size} bytes")
        control = cls(fd, size)
        pages = control.pages
        found = (pages.version, pages.size, pages.cpu_count, pages.xsave_size)
        wanted = (
            VERSION,
            ffi.sizeof("struct pyvmm_control"),
            len(vcpus),
            vcpus[0].xsave_size,
        )
        end = pages.slots_at + pages.cpu_count * pages.slot_size
        whole = max(ffi.sizeof("struct pyvmm_slot"), pages.xsave_at + pages.xsave_size)
        if found != wanted or end > size or pages.slot_size < whole:
            raise MigrationError(
                "carrier: version, size, vCPUs and XSAVE area of the control pages are "
                f"{found}, not {wanted}"
            )
        return control

    def slot(self, index: int) -> Any:
        """Return a vCPU's ``struct pyvmm_slot *``."""
        at = self.pages.slots_at + index * self.pages.slot_size
        return ffi.cast("struct pyvmm_slot *", self._base + at)

    def cpuid(self, index: int) -> memoryview:
        """Return a vCPU's CPUID, as the kernel lays it out."""
        slot = self.slot(index)
        size = slot.cpuid_count * ffi.sizeof(slot.cpuid[0])
        return memoryview(ffi.buffer(slot.cpuid))[:size]

    def command(self, command: int, kick_signal: int) -> None:
        """Give the carrier's tasks a command."""
        lib.pyvmm_command(self.pages, command, kick_signal)

    def close(self) -> None:
        """Unmap them: nobody in this process uses them any more."""
        if self._base != ffi.NULL:
            lib.pyvmm_unmap(self._base, self._size)
            self._base = ffi.NULL


class Carrier:
    """A carrier, and the vCPUs' way there and back. Image before.

    :param control: its control pages
    :param vm: the VM
    :param vcpus: its vCPUs
    :param kick_signal: ends KVM_RUN
    """

    def __init__(self, control: Control, vm: Vm, vcpus: Sequence[Vcpu], kick_signal: int) -> None:
        self.control = control
        self.pid = 0
        self._vm = vm
        self._vcpus = vcpus
        self._kick_signal = kick_signal
        # All that the native side reads, for as long as there may be a carrier.
        self._kept: list[Any] = []
        self._stacks: tuple[Any, int] | None = None

    def start(
        self,
        handed: Iterable[int],
        program: int,
        command: Sequence[bytes],
        environments: Sequence[Mapping[bytes, bytes]],
        blocked: Iterable[int],
        patience_s: float,
        irqfds: Sequence[tuple[int, int]] = (),
    ) -> None:
        """Start it; its tasks wait.

        :param handed: descriptors that an image of the way back gets, besides 0, 1 and 2
        :param program: descriptor of its program
        :param command: its words
        :param environments: its environment, if the new image died, and if it came too late
        :param blocked: signals that are blocked in it
        :param patience_s: how long it has
        :param irqfds: GSI and eventfd of each irqfd of the VM
        :raises HostError: the host allows no further process or thread
        """
        pages = self.control.pages
        process_fd = os.pidfd_open(os.getpid())
        try:
            handed = sorted({*handed})
            own = [self._vm.fd, process_fd, program]
            own += [vcpu.fd for vcpu in self._vcpus] + [fd for _, fd in irqfds]
            keep = sorted({0, 1, 2, *handed, *own})
            tasks = self._keep(ffi.new("struct pyvmm_carrier_task[]", len(self._vcpus)))
            carrier = self._keep(ffi.new("struct pyvmm_carrier *"))
            for task, vcpu in zip(tasks, self._vcpus, strict=True):
                task.carrier = carrier
                task.slot = self.control.slot(vcpu.index)
                task.run = vcpu.mapping
                task.vcpu_fd = vcpu.fd
            carrier.control = pages
            carrier.tasks = tasks
            carrier.stacks = self._make_stacks(len(self._vcpus) + 2)
            carrier.vm_fd, carrier.process_fd, carrier.program_fd = (
                self._vm.fd,
                process_fd,
                program,
            )
            carrier.irqfds = self._keep(ffi.new("struct kvm_irqfd[]", len(irqfds)))
            carrier.irqfd_count = len(irqfds)
            for number, (gsi, fd) in enumerate(irqfds):
                carrier.irqfds[number].fd, carrier.irqfds[number].gsi = fd, gsi
            carrier.keep_fds = self._keep(ffi.new("int[]", keep))
            carrier.keep_count = len(keep)
            carrier.handed_fds = self._keep(ffi.new("int[]", handed))
            carrier.handed_count = len(handed)
            carrier.command = words(command, self._kept)
            died, late = (
                words((b"=".join(pair) for pair in environment.items()), self._kept)
                for environment in environments
            )
            carrier.died_environment, carrier.late_environment = died, late
            carrier.signal_mask = sum(1 << number - 1 for number in {*blocked})
            carrier.patience = int(patience_s * 1e9)
            carrier.kick_signal = self._kick_signal
            pid = lib.pyvmm_start_carrier(carrier)
            if pid < 0:
                raise HostError(f"clone for the carrier: {os.strerror(-pid)}")
            self.pid = pid
            result = lib.pyvmm_wait_ready(pages, int(PATIENCE_S * 1e9))
            if result < 0:
                self.end()
                raise HostError(f"clone for the carrier's tasks: {os.strerror(-result)}")
        finally:
            os.close(process_fd)

    def hand_over(self, vcpu: Vcpu) -> None:
        """Have a vCPU given to the carrier by its thread, which has to be kicked for that."""
        vcpu.gate.slot = self.control.slot(vcpu.index)

    def hold(self, vcpu: Vcpu) -> None:
        """Give the carrier a vCPU that stands, with no access half done."""
        self.control.slot(vcpu.index).owner = lib.PYVMM_CARRIED

    def wait_owner(self, index: int, owner: int, timeout_s: float) -> bool:
        """Wait until a vCPU is whose it shall be; return whether it is."""
        slot = self.control.slot(index)
        end = time.monotonic() + timeout_s
        while slot.owner != owner:
            if time.monotonic() >= end:
                return False
            time.sleep(_LOOK_S)
        return True

    def is_running(self, index: int) -> str:
        """Return what keeps a vCPU from running in the carrier, by what KVM said; empty if
        nothing does."""
        slot = self.control.slot(index)
        if slot.is_parked and slot.result:
            return f"KVM_RUN: {os.strerror(-slot.result)}"
        return ""

    def take_back(self) -> None:
        """The vCPUs are their threads' again, and the carrier ends.

        :raises HostError: one does not come back
        """
        for vcpu in self._vcpus:
            vcpu.gate.slot = ffi.NULL
        # A thread may have seen that it is to hand its vCPU over, and be about to.
        moved = [vcpu.index for vcpu in self._vcpus if not self._keep_back(vcpu.index)]
        self.control.command(lib.PYVMM_BACK, self._kick_signal)
        deadline = time.monotonic() + PATIENCE_S
        stuck = [index for index in moved if not self._returns(index, deadline)]
        if stuck and self.is_alive():
            raise HostError(f"vCPU {stuck[0]} does not come back from the carrier")
        for index in stuck:
            # Whoever ended the carrier has ended its tasks: the vCPU is in no KVM_RUN.
            slot = self.control.slot(index)
            slot.result = 0 if slot.is_parked else -errno.EINTR
            slot.owner = lib.PYVMM_OLD
            lib.pyvmm_wake(ffi.addressof(slot, "owner"))
        self.end()

    def _keep_back(self, index: int) -> bool:
        owner = ffi.addressof(self.control.slot(index), "owner")
        return bool(lib.pyvmm_change(owner, lib.PYVMM_OLD, lib.PYVMM_KEPT))

    def _returns(self, index: int, deadline: float) -> bool:
        while not self.wait_owner(index, lib.PYVMM_OLD, _TURN_S):
            if not self.is_alive() or time.monotonic() >= deadline:
                return False
        return True

    def end(self) -> None:
        """Have the carrier end, and wait for that."""
        if self.pid:
            pid, self.pid = self.pid, 0
            self.control.command(lib.PYVMM_END, self._kick_signal)
            # The vCPUs' tasks end it; should there be none, so does this.
            os.kill(pid, SIGKILL)
            os.waitpid(pid, WALL)
        if self._stacks is not None:
            lib.pyvmm_unmap(*self._stacks)
            self._stacks = None

    def is_alive(self) -> bool:
        """Return whether nobody has ended it."""
        look = os.WEXITED | os.WNOHANG | os.WNOWAIT | WALL
        return bool(self.pid) and os.waitid(os.P_PID, self.pid, look) is None

    def _make_stacks(self, count: int) -> Any:
        size = lib.PYVMM_STACK_SIZE
        whole = (count + 1) * size
        memory = ffi.cast("char *", lib.pyvmm_map_private(whole))
        if memory == ffi.NULL:
            raise HostError("no memory for the carrier's stacks")
        self._stacks = memory, whole
        return memory + -int(ffi.cast("uintptr_t", memory)) % size

    def _keep(self, thing: Any) -> Any:
        self._kept.append(thing)
        return thing


class Takeover:
    """The vCPUs' way from the carrier to this image.

    :param control: as the image before left it
    :param vm: this image's
    :param vcpus: its vCPUs, none of which has run yet
    """

    def __init__(self, control: Control, vm: Vm, vcpus: Sequence[Vcpu], kick_signal: int) -> None:
        self.control = control
        self._vcpus = vcpus
        self._kick_signal = kick_signal
        self._fds = ffi.new("int[]", [vcpu.fd for vcpu in vcpus])
        self._native = takeover = ffi.new("struct pyvmm_takeover *")
        takeover.control = control.pages
        takeover.vcpu_fds = self._fds
        takeover.vm_fd = vm.fd
        takeover.kick_signal = kick_signal
        takeover.event_flags = vm.event_flags
        # A wake-up takes longer than all that the carrier does; but where the vCPUs need all of the
        # host's processors, this one, too.
        is_spare = len(vcpus) < len(os.sched_getaffinity(0))
        takeover.spin = int(SPIN_S * 1e9) if is_spare else 0
        takeover.patience = int(PATIENCE_S * 1e9)
        for vcpu in vcpus:
            vcpu.await_at(
                control.slot(vcpu.index),
                lambda index=vcpu.index: self._brought(index),  # type: ignore[misc]
            )

    def take(self, *, running: bool) -> None:
        """Give the vCPUs and the VM their states; what waits in ``Vcpu.run`` goes on.

        :param running: whether threads wait there
        :raises MigrationError: they stay the carrier's, or there is none
        """
        self._native.is_running = running
        result = lib.pyvmm_take_over(self._native)
        if result < 0:
            raise MigrationError(self._explain(-result))

    def end_carrier(self) -> int:
        """The guest runs here: let the carrier go; return its process id."""
        self.control.command(lib.PYVMM_END, self._kick_signal)
        return int(self.control.pages.pid)

    def times(self) -> list[CpuTimes]:
        """Return when each vCPU changed hands, once the threads have entered them."""
        asked = self.control.pages.asked_at
        slots = map(self.control.slot, range(len(self._vcpus)))
        return [CpuTimes(slot.left, slot.entered, asked, slot.run_at) for slot in slots]

    def _explain(self, number: int) -> str:
        error = self._native.error
        if number == errno.ESRCH:
            return "the carrier, which ran the guest, was killed: the guest is lost"
        if number == errno.ECANCELED:
            return "the carrier has given this image up"
        if number == errno.ETIMEDOUT:
            return f"vCPU {error.cpu} does not stop in the carrier"
        names = {getattr(lib, name): name for name in _STATE_REQUESTS.split()}
        what = names.get(error.request, f"request {error.request:#x}")
        msr = f" of MSR {error.msr:#x}" if error.msr else ""
        return f"vCPU {error.cpu} does not take its state: {what}{msr}: {os.strerror(number)}"

    def _brought(self, index: int) -> list[exits.Exit]:
        """Return the writes that a vCPU made in the carrier, and the exit that it stopped with."""
        slot = self.control.slot(index)
        made: list[exits.Exit] = []
        for number in range(slot.write_count):
            write = slot.writes[number]
            size = write.size * write.count
            source = write.data if size <= len(write.data) else slot.port_data
            data = memoryview(bytes(ffi.buffer(source, size)))
            made.append(
                exits.Io(True, write.address, write.size, write.count, data)
                if write.is_port
                else exits.Mmio(True, write.address, data)
            )
        if slot.has_exit:
            made.append(exits.Decoder(slot.exit, len(slot.exit)).decode())
        slot.write_count = slot.has_exit = 0
        return made


def words(texts: Iterable[bytes], kept: list[Any]) -> Any:
    """Return ``char *const *`` for execve(2).

    :param kept: gets what has to be kept as long as that is used
    """
    strings = [ffi.new("char[]", text) for text in texts]
    array = ffi.new("char *[]", [*strings, ffi.NULL])
    kept += [*strings, array]
    return array


def _aligned(size: int, to: int) -> int:
    return -(-size // to) * to


def _whole_pages(size: int) -> int:
    return _aligned(size, _PAGE)
