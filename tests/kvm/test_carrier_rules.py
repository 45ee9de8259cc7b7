"""The kernel's rules that the carrier rests on (docs/carrier.md), each shown on the kernel that
runs. How a guest's accesses behave is in test_access_rules.py.

A test with a ``lab`` runs in a process of its own that has executed another image since it made a
guest; the guest's vCPU is in KVM_RUN in a task that shares the memory of the image before.
"""

import errno
import os
import select
import signal
import struct
import threading
import time

import pytest
from harness import DEADLINE_S, wait_until
from harness.assembler import assemble
from harness.exec_lab import CODE, COUNT, COUNTING, RAM, Process, through_exec
from harness.kvm_machine import Machine
from harness.servant import (
    FUTEX_WAIT,
    FUTEX_WAKE,
    KICK,
    KVM_RUN,
    PR_SET_PDEATHSIG,
    WALL,
    Page,
    address_of,
    syscall,
)

from pyvmm._native import ffi, install_kick, lib
from pyvmm.errors import KvmError
from pyvmm.kvm import exits

GSI = 5
MSR_TSC = 0x10
KVM_CLOCK_REALTIME = 1 << 2
# In struct kvm_run.
IMMEDIATE_EXIT_AT, EXIT_REASON_AT = 1, 8


class Running:
    """A vCPU in a thread of this process."""

    def __init__(self, vcpu):
        install_kick(KICK)
        self._vcpu = vcpu
        self._over = False
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._over = True
        while self._thread.is_alive():
            self._vcpu.set_immediate_exit(True)
            signal.pthread_kill(self._thread.ident, KICK)
            self._thread.join(0.01)
        self._vcpu.set_immediate_exit(False)

    def _run(self):
        while not self._over:
            assert isinstance(self._vcpu.run(), exits.Interrupted)


# ---- the exec ----------------------------------------------------------------------------------


@through_exec
def test_kvm_does_nothing_for_another_address_space(lab):
    """The descriptors went through the exec, and are good for nothing but a look at kvm_run."""
    for name, value in {"KVM_CREATE_VCPU": 1, "KVM_CREATE_PIT2": 0, "KVM_GET_CLOCK": 0}.items():
        result = lib.pyvmm_ioctl_value(lab.vm_fd, getattr(lib, name), value)
        assert (name, result) == (name, -errno.EIO)
    regs = ffi.new("struct kvm_regs *")
    assert lib.pyvmm_ioctl(lab.vcpu_fd, lib.KVM_GET_REGS, regs) == -errno.EIO
    assert lib.pyvmm_ioctl_value(lab.vcpu_fd, KVM_RUN, 0) == -errno.EIO
    assert lib.pyvmm_ioctl_value(lab.kvm_fd, lib.KVM_GET_API_VERSION, 0) == 12
    vm_fd = lib.pyvmm_ioctl_value(lab.kvm_fd, lib.KVM_CREATE_VM, 0)
    assert vm_fd > 0
    assert lib.pyvmm_ioctl_value(vm_fd, lib.KVM_CREATE_VCPU, 0) > 0


@through_exec
def test_a_task_that_shares_the_memory_runs_the_guest_through_an_exec(lab):
    """It has not left KVM_RUN, and goes on with all that an image could do before."""
    assert os.getpid() == lab.facts["pid"]
    assert lab.at_exec < lab.at_start
    lab.counts()
    assert lab.stop() == -errno.EINTR
    regs = lab.get(lab.runner, lab.vcpu_fd, "KVM_GET_REGS", "struct kvm_regs")
    assert CODE <= regs.rip < CODE + 16
    regs.rbx = 0x1234
    assert lab.runner.ioctl(lab.vcpu_fd, "KVM_SET_REGS", bytes(ffi.buffer(regs))) == 0
    # The VM's ioctls, too, and from a task that has never run the vCPU.
    assert lab.get(lab.helper, lab.vm_fd, "KVM_GET_CLOCK", "struct kvm_clock_data").clock
    lab.go_on()
    lab.counts()
    lab.stop()
    assert lab.get(lab.helper, lab.vcpu_fd, "KVM_GET_REGS", "struct kvm_regs").rbx == 0x1234


@through_exec
def test_an_exec_ends_the_tasks_of_its_own_group_alone(lab):
    pid = os.getpid()
    assert lab.runner.pid != pid
    assert syscall("tgkill", lab.runner.pid, lab.runner.words.tid, 0) == 0
    assert lab.comrade.pid == pid
    assert syscall("tgkill", pid, lab.comrade.words.tid, 0) == -errno.ESRCH


@through_exec
def test_immediate_exit_is_set_from_the_new_image(lab):
    """kvm_run is memory of the vCPU, which any process may map."""
    assert lab.stop() == -errno.EINTR
    lab.run[IMMEDIATE_EXIT_AT] = 1
    for _ in range(3):
        assert lab.runner.call("ioctl", lab.vcpu_fd, KVM_RUN, 0) == -errno.EINTR
    lab.run[IMMEDIATE_EXIT_AT] = 0
    lab.go_on()
    lab.counts()


TICKING = """
start:  cli; xor %ax, %ax; mov %ax, %ds; mov %ax, %ss; mov $0x7000, %sp
    movw $(tick - start + 0x1000), 0x20; movw $0, 0x22
    mov $0x11, %al; out %al, $0x20; mov $8, %al; out %al, $0x21
    mov $4, %al; out %al, $0x21; mov $1, %al; out %al, $0x21; mov $0xfe, %al; out %al, $0x21
    mov $0x34, %al; out %al, $0x43; mov $0, %al; out %al, $0x40; mov $0x10, %al; out %al, $0x40
    sti
1:  hlt; jmp 1b
tick:   incl 0x3000; mov $0x20, %al; out %al, $0x20; iret
"""


@through_exec(guest=TICKING)
def test_timers_and_interrupt_controllers_of_the_vm_go_on(lab):
    """A guest that counts the timer's interrupts, and halts in between, is never ended by that."""
    for _ in range(5):
        lab.counts()
    assert not lab.runner.is_done()


READING = """
    incl 0x3000; mov $0x1234, %dx; in %dx, %al; mov %al, 0x3100
1:  incl 0x3000; jmp 1b
"""


@through_exec(guest=READING)
def test_a_read_that_waits_is_made_by_the_new_image(lab):
    """All that the carrier does of it: the exit waits, the state is read, another VM repeats it."""
    assert lab.runner.wait() == 0
    reason = int.from_bytes(lab.run[EXIT_REASON_AT : EXIT_REASON_AT + 4], "little")
    assert reason == lib.KVM_EXIT_IO
    regs = lab.get(lab.runner, lab.vcpu_fd, "KVM_GET_REGS", "struct kvm_regs")
    sregs = lab.get(lab.runner, lab.vcpu_fd, "KVM_GET_SREGS", "struct kvm_sregs")
    machine = Machine(ram=lab.ram)
    machine.vcpu.set_regs(regs)
    machine.vcpu.set_sregs(sregs)
    exit = machine.vcpu.run()
    assert isinstance(exit, exits.Io)
    assert (exit.port, exit.is_write, exit.count) == (0x1234, False, 1)
    exit.data[0] = 0x5A
    with Running(machine.vcpu):
        lab.counts()
    assert lab.ram[0x3100] == 0x5A


# ---- time --------------------------------------------------------------------------------------


def read_tsc(lab):
    """The TSC of the old vCPU."""
    content = struct.pack("<IIIIQ", 1, 0, MSR_TSC, 0, 0)
    assert lab.runner.ioctl(lab.vcpu_fd, "KVM_GET_MSRS", content) == 1
    return struct.unpack_from("<Q", lab.runner.data, 16)[0]


@through_exec
def test_the_tsc_goes_on_with_the_offset_alone(lab):
    lab.stop()
    value_at = 256
    where = lib.KVM_VCPU_TSC_CTRL, lib.KVM_VCPU_TSC_OFFSET, lab.runner.address + value_at
    attr = struct.pack("<IIQQ", 0, *where)
    # Another than a new vCPU may have by itself; or 0, if this KVM shows guests the bare TSC.
    lab.runner.data[value_at : value_at + 8] = struct.pack("<q", -(10**12))
    assert lab.runner.ioctl(lab.vcpu_fd, "KVM_SET_DEVICE_ATTR", attr) == 0
    lab.runner.data[value_at : value_at + 8] = bytes(8)
    assert lab.runner.ioctl(lab.vcpu_fd, "KVM_GET_DEVICE_ATTR", attr) == 0
    (offset,) = struct.unpack_from("<Q", lab.runner.data, value_at)
    vcpu = Machine(ram=lab.ram).vcpu
    assert not offset or not read_tsc(lab) < vcpu.get_msrs([MSR_TSC])[MSR_TSC] < read_tsc(lab)
    vcpu.set_tsc_offset(offset)
    assert vcpu.get_tsc_offset() == offset
    for _ in range(10):
        before = read_tsc(lab)
        now = vcpu.get_msrs([MSR_TSC])[MSR_TSC]
        assert before < now < read_tsc(lab)


@through_exec
def test_the_clock_goes_on_without_flags(lab):
    """Set without flags it goes on from what is given; with KVM_CLOCK_REALTIME KVM adds the time
    that has passed since, by the host's clock, which somebody may set meanwhile."""
    vm = Machine(ram=lab.ram).vm

    def read():
        return lab.get(lab.helper, lab.vm_fd, "KVM_GET_CLOCK", "struct kvm_clock_data").clock

    first = read()
    vm.set_clock(first)
    for _ in range(10):
        # Behind by no more than the time between the two calls.
        now = vm.get_clock()
        assert first <= now <= read()
    data = ffi.new("struct kvm_clock_data *")
    data.clock, data.flags = first, KVM_CLOCK_REALTIME
    data.realtime = time.time_ns() - 3600 * 10**9
    if lib.pyvmm_ioctl(vm.fd, lib.KVM_SET_CLOCK, data) == 0:
        assert vm.get_clock() > first + 3600 * 10**9


# ---- eventfds ----------------------------------------------------------------------------------


@through_exec
def test_an_eventfd_raises_interrupts_in_one_vm(lab):
    """Also if the other belongs to an image that is gone. What is signalled in between is not lost,
    and comes in the VM that gets it next."""
    fd = lab.facts["eventfd"]
    irqfd = struct.pack("<III", fd, GSI, 0).ljust(32, b"\0")
    assert lab.helper.ioctl(lab.vm_fd, "KVM_IRQFD", irqfd) == 0
    vm = Machine(ram=lab.ram).vm
    with pytest.raises(KvmError) as caught:
        vm.irqfd(GSI, fd)
    assert caught.value.errno == errno.EBUSY
    irqfd = struct.pack("<III", fd, GSI, lib.KVM_IRQFD_FLAG_DEASSIGN).ljust(32, b"\0")
    assert lab.helper.ioctl(lab.vm_fd, "KVM_IRQFD", irqfd) == 0
    os.eventfd_write(fd, 1)

    def is_requested():
        chip = vm.get_irqchip("KVM_IRQCHIP_PIC_MASTER").chip.pic
        return chip.irr & 1 << GSI

    assert not is_requested()
    vm.irqfd(GSI, fd)
    wait_until(is_requested, "the interrupt")
    chip = lab.get(lab.helper, lab.vm_fd, "KVM_GET_IRQCHIP", "struct pyvmm_irqchip", bytes(520))
    assert not chip.chip.pic.irr & 1 << GSI


def test_an_eventfd_tells_of_writes_in_two_vms():
    first, second = Machine(), Machine()
    fd = os.eventfd(0, os.EFD_NONBLOCK)
    try:
        for machine in (first, second):
            machine.vm.ioeventfd(0xD0000000, fd, 1)
            with pytest.raises(KvmError):
                machine.vm.ioeventfd(0xD0000000, fd, 1)
    finally:
        first.close()
        second.close()
        os.close(fd)


# ---- tasks -------------------------------------------------------------------------------------


@through_exec
def test_a_futex_in_a_memfd_wakes_across_address_spaces(lab):
    page = lab.page
    word = struct.pack("<I", 7)
    lab.helper.data[:4] = word
    lab.helper.ask("futex", lab.helper.address, FUTEX_WAIT, 7, 0)
    # Where the word is here, which is somewhere else.
    here = address_of(page.memory, lab.helper.data_at)
    assert here != lab.helper.address
    wait_until(lambda: syscall("futex", here, FUTEX_WAKE, 1), "somebody who waits there")
    assert lab.helper.wait() == 0


@through_exec
def test_a_signal_of_the_new_image_ends_kvm_run(lab):
    for _ in range(20):
        assert lab.stop() == -errno.EINTR
        lab.go_on()
    lab.counts()


@through_exec
def test_a_process_stays_what_it_was_to_a_pidfd(lab):
    """It is not readable after the exec; the descriptor is from before it."""
    pollfd = struct.pack("<ihh4xqq", lab.facts["pidfd"], select.POLLIN, 0, 0, 0)
    lab.helper.data[: len(pollfd)] = pollfd
    at = lab.helper.address
    assert lab.helper.call("ppoll", at, 1, at + 8, 0) == 0


def die(lab):
    """Have the helper wait for this process's end, and end without a chance to do anything."""
    lab.stop()
    for servant in (lab.runner, lab.helper):
        assert servant.call("prctl", PR_SET_PDEATHSIG, 0) == 0
    lab.go_on()
    pollfd = struct.pack("<ihh4xqq", lab.facts["pidfd"], select.POLLIN, 0, int(DEADLINE_S), 0)
    lab.helper.data[: len(pollfd)] = pollfd
    at = lab.helper.address
    lab.helper.ask("ppoll", at, 1, at + 8, 0)
    os.kill(os.getpid(), signal.SIGKILL)


def test_the_end_of_a_process_ends_no_task_of_another_group():
    """The guest counts on. The task learns of it by the pidfd."""
    process = Process(die)
    try:
        code, text = process.wait()
        assert code == -signal.SIGKILL, text
        runner, helper = process.page.servants[:2]
        assert helper.wait() == 1
        # And POLLHUP, on newer kernels, once its parent has waited for it.
        assert struct.unpack_from("<h", helper.data, 6)[0] & select.POLLIN
        before = process.ram[COUNT : COUNT + 4]
        wait_until(lambda: process.ram[COUNT : COUNT + 4] != before, "a higher count")
        assert not runner.is_done()
    finally:
        process.close()


@through_exec
def test_a_task_without_a_signal_is_waited_for_with_wall(lab):
    """It stays a child of the process. And its end is told by SIGCHLD, though clone asked for no
    signal: the image that asked is another (do_notify_parent, kernel/signal.c)."""
    pid = lab.helper.pid
    signals = []
    signal.signal(signal.SIGCHLD, lambda *_: signals.append(1))
    with pytest.raises(ChildProcessError):
        os.waitpid(pid, os.WNOHANG)
    assert os.waitpid(pid, os.WNOHANG | WALL) == (0, 0)
    lab.helper.end()
    wait_until(lambda: signals, "SIGCHLD")


@pytest.fixture
def page():
    page = Page()
    yield page
    for servant in page.servants:
        if servant.pid:
            servant.end()
    os.close(page.fd)


class Guest(Machine):
    """One that counts."""

    def __init__(self, text):
        super().__init__(ram=RAM)
        self.load(assemble(text), CODE)

    def counts(self):
        before = self.ram[COUNT : COUNT + 4]
        wait_until(lambda: self.ram[COUNT : COUNT + 4] != before, "a higher count")


@pytest.fixture
def counting():
    machine = Guest(COUNTING)
    yield machine
    machine.close()


@pytest.fixture
def reading():
    machine = Guest(READING)
    yield machine
    machine.close()


def test_a_vcpu_goes_from_task_to_task(counting, page):
    """What that costs is printed: kernels before 6.13 wait for a grace period."""
    vcpu = counting.vcpu
    servants = [servant.start() for servant in page.servants[:2]]
    for _ in range(3):
        with Running(vcpu):
            counting.counts()
        for servant in servants:
            vcpu.set_immediate_exit(True)
            assert servant.call("ioctl", vcpu.fd, KVM_RUN, 0) == -errno.EINTR
            print(f"move: {(servant.words.ended - servant.words.begun) / 1000:.0f} us")
            vcpu.set_immediate_exit(False)
            servant.run(vcpu.fd)
            counting.counts()
            servant.kick()
            assert servant.wait() == -errno.EINTR


def test_an_access_is_completed_by_another_task(reading, page):
    vcpu = reading.vcpu
    servant = page.servants[0].start()
    assert servant.call("ioctl", vcpu.fd, KVM_RUN, 0) == 0
    assert vcpu.mapping.exit_reason == lib.KVM_EXIT_IO
    data = ffi.cast("char *", vcpu.mapping) + vcpu.mapping.exit.io.data_offset
    data[0] = b"\x5a"
    with Running(vcpu):
        reading.counts()
    assert reading.ram[0x3100] == 0x5A


def test_a_task_closes_descriptors_of_its_own(counting, page):
    """Without CLONE_FILES it has copies: what it keeps stays open, and what it has closed delays no
    peer's end of file."""
    read_fd, write_fd = os.pipe()
    vcpu_fd = counting.vcpu.fd
    servant = page.servants[0].start()
    assert servant.call("close_range", 0, vcpu_fd - 1) == 0
    assert servant.call("close_range", vcpu_fd + 1, 0xFFFFFFFF) == 0
    assert servant.call("read", read_fd, servant.address, 0) == -errno.EBADF
    os.fstat(read_fd)
    os.close(write_fd)
    assert os.read(read_fd, 1) == b""
    os.close(read_fd)
    servant.run(vcpu_fd)
    counting.counts()
    servant.kick()
    assert servant.wait() == -errno.EINTR
