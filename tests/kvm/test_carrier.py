"""The carrier, and a takeover from it: here from one VM of this process to another, since what an
exec adds is no part of either."""

import errno
import mmap
import os
import signal
import threading

import pytest
from harness import DEADLINE_S, wait_until
from harness.kvm_machine import Machine

from pyvmm._native import ffi, install_kick, lib
from pyvmm.errors import KvmError, MigrationError
from pyvmm.kvm import exits
from pyvmm.kvm.carrier import Carrier, Control, Takeover

KICK = signal.SIGURG
RAM = 0xA0000
COUNT = 0x3000  # where guests count
CODE = 0x1000
COUNTING = b"\xff\x06\x00\x30"  # incw 0x3000
# Count until the word at 0x3100 says that it is time: cmpw $1, 0x3100; jne back
WAIT = COUNTING + b"\x83\x3e\x00\x31\x01\x75\xf5"
AFTER = COUNTING + b"\xeb\xfa"  # for ever
SET_DX = b"\xba\x34\x12"  # mov $0x1234, %dx


class Thread:
    """Enters a vCPU until it is told to stop; what KVM_RUN came back with."""

    def __init__(self, vcpu, answer=b""):
        self.vcpu = vcpu
        self.exits = []
        self.answer = answer
        self._stop = False
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {KICK})
        while not self._stop:
            exit = self.vcpu.run()
            if isinstance(exit, exits.Interrupted):
                self.vcpu.set_immediate_exit(self._stop)
                continue
            if not isinstance(exit, exits.Io | exits.Mmio):
                return  # a vCPU that got no state
            self.exits.append(described(exit))
            if not exit.is_write and self.answer:
                exit.data[:] = self.answer[: len(exit.data)]
            elif not exit.is_write:
                return

    def kick(self):
        self.vcpu.set_immediate_exit(True)
        signal.pthread_kill(self._thread.ident, KICK)

    def leave(self):
        self._stop = True

    def stop(self):
        self._stop = True
        deadline = threading.Event()
        while self._thread.is_alive():
            self.kick()
            self._thread.join(0.01)
            deadline.wait(0.001)


def described(exit):
    place = exit.port if isinstance(exit, exits.Io) else exit.gpa
    return ("write", place, bytes(exit.data)) if exit.is_write else ("read", place, len(exit.data))


class Pair:
    """Two VMs that share their memory, and a carrier of the first one's guest."""

    def __init__(self, code, cpus=1, running=True):
        install_kick(KICK)
        self.ram = mmap.mmap(-1, RAM)
        self.old, self.new = (Machine(cpus, self.ram) for _ in range(2))
        self.old.load(code, CODE)
        self.control, self.fd = Control.make(self.old.vcpus, [0x174, 0x175], [], running=running)
        self.carrier = Carrier(self.control, self.old.vm, self.old.vcpus, KICK)
        self.threads = [Thread(vcpu) for vcpu in self.old.vcpus] if running else []

    def start(self, irqfds=()):
        program = os.open("/proc/self/exe", os.O_RDONLY | os.O_CLOEXEC)
        try:
            self.carrier.start([self.fd], program, [b"x"], [{}, {}], [], 60.0, irqfds)
        finally:
            os.close(program)

    def move(self):
        """Have the vCPUs in the carrier."""
        for vcpu, thread in zip(self.old.vcpus, self.threads, strict=True):
            self.carrier.hand_over(vcpu)
            thread.kick()
        for index in range(len(self.old.vcpus)):
            assert self.carrier.wait_owner(index, lib.PYVMM_CARRIED, DEADLINE_S)
        self.control.pages.phase = lib.PYVMM_CROSSING
        self.control.pages.deadline = (1 << 63) - 1

    def wait_parked(self, index=0):
        wait_until(lambda: self.control.slot(index).is_parked, "an exit in the carrier")

    def take_over(self, answer=b""):
        """Have them in the second VM; the threads there."""
        takeover = Takeover(self.control, self.new.vm, self.new.vcpus, KICK)
        threads = [Thread(vcpu, answer) for vcpu in self.new.vcpus]
        self.threads += threads
        takeover.take(running=True)
        return threads

    @property
    def count(self):
        return int.from_bytes(self.ram[COUNT : COUNT + 2], "little")

    def counts(self):
        before = self.count
        wait_until(lambda: self.count != before, "the guest's counter")

    def close(self):
        self.carrier.end()
        for thread in self.threads:
            thread.leave()
        for vcpu in (*self.old.vcpus, *self.new.vcpus):
            vcpu.gate.slot = ffi.NULL
            slot = self.control.slot(vcpu.index)
            slot.owner = lib.PYVMM_OLD
            lib.pyvmm_wake(ffi.addressof(slot, "owner"))
        for thread in self.threads:
            thread.stop()
        for machine in (self.old, self.new):
            for vcpu in machine.vcpus:
                vcpu.close()
            machine.vm.close()
            machine.system.close()
        os.close(self.fd)


@pytest.fixture
def pair():
    made = []

    def make(code, **arguments):
        made.append(Pair(code, **arguments))
        made[-1].start()
        return made[-1]

    yield make
    for each in made:
        each.close()


def test_a_guest_counts_on_in_the_carrier_and_after(pair):
    guest = pair(AFTER)
    guest.counts()
    guest.move()
    guest.counts()
    guest.take_over()
    guest.counts()
    slot = guest.control.slot(0)
    assert 0 < slot.left <= slot.entered <= guest.control.pages.asked_at <= slot.stopped_at
    assert slot.stopped_at <= guest.control.pages.loaded_at <= slot.run_at


def test_a_guest_goes_back_where_it_was(pair):
    guest = pair(AFTER)
    for _ in range(3):
        guest.move()
        guest.counts()
        guest.carrier.take_back()
        guest.counts()
        guest.carrier = Carrier(guest.control, guest.old.vm, guest.old.vcpus, KICK)
        guest.control.pages.ready = 0
        guest.control.pages.command = lib.PYVMM_RUN
        guest.start()


#: What a guest does once, and the exits of the second VM. It counts before and after.
ACCESSES = {
    "in": (SET_DX + b"\xec", [("read", 0x1234, 1)]),
    "out": (SET_DX + b"\xb0\x5a\xee", [("write", 0x1234, b"\x5a")]),
    "outw": (SET_DX + b"\xb8\xcd\xab\xef", [("write", 0x1234, b"\xcd\xab")]),
    # mov $0xb000, %ax; mov %ax, %ds; then mov to and from %ds:0xffe
    "mmio read": (b"\xb8\x00\xb0\x8e\xe0\x64\xa1\xfe\x0f", [("read", 0xB0FFE, 2)]),
    "mmio write": (
        b"\xb8\x00\xb0\x8e\xe0\xb8\x34\x12\x64\xa3\xfc\x0f",
        [("write", 0xB0FFC, b"\x34\x12")],
    ),
    "split read": (
        b"\xb8\x00\xb0\x8e\xe0\x66\x64\xa1\xfe\x0f",
        [("read", 0xB0FFE, 2), ("read", 0xB1000, 2)],
    ),
    "split write": (
        b"\xb8\x00\xb0\x8e\xe0\x66\xb8\x78\x56\x34\x12\x66\x64\xa3\xfe\x0f",
        [("write", 0xB0FFE, b"\x78\x56"), ("write", 0xB1000, b"\x34\x12")],
    ),
    # addw $1, %fs:0xffc
    "read, modify, write": (
        b"\xb8\x00\xb0\x8e\xe0\x64\x83\x06\xfc\x0f\x01",
        [("read", 0xB0FFC, 2), ("write", 0xB0FFC, b"\x13\x12")],
    ),
}
ANSWER = b"\x12\x12\x12\x12"


@pytest.mark.parametrize("name", ACCESSES)
def test_an_access_is_made_once_and_whole(pair, name):
    code, expected = ACCESSES[name]
    guest = pair(WAIT + code + AFTER)
    guest.move()
    guest.counts()
    guest.ram[0x3100] = 1
    guest.wait_parked()
    (thread,) = guest.take_over(ANSWER)
    guest.counts()
    assert thread.exits == expected
    assert guest.threads[0].exits == []


@pytest.mark.parametrize("name", ["in", "out", "split write"])
def test_an_access_comes_back(pair, name):
    code, expected = ACCESSES[name]
    guest = pair(WAIT + code + AFTER)
    guest.threads[0].answer = ANSWER
    guest.move()
    guest.ram[0x3100] = 1
    guest.wait_parked()
    guest.control.pages.phase = lib.PYVMM_PREPARING
    guest.carrier.take_back()
    guest.counts()
    assert guest.threads[0].exits == expected


@pytest.mark.parametrize("count", [100, 5000])
@pytest.mark.parametrize(
    ("code", "kind"),
    [
        # mov $0x2000, %si; mov $count, %cx; cld; rep outsb
        (b"\xbe\x00\x40\xb9%b\xfc\xf3\x6e", "write"),
        (b"\xbf\x00\x40\xb9%b\xfc\xf3\x6c", "read"),
    ],
)
def test_a_string_to_a_port_is_whole(pair, code, kind, count):
    code = SET_DX + code.replace(b"%b", count.to_bytes(2, "little"))
    guest = pair(WAIT + code + AFTER)
    data = bytes(range(256)) * 20
    guest.ram[0x4000 : 0x4000 + len(data)] = data
    guest.move()
    guest.ram[0x3100] = 1
    guest.wait_parked()
    (thread,) = guest.take_over(b"\x5a" * 4096)
    guest.counts()
    assert {(found, place) for found, place, _ in thread.exits} == {(kind, 0x1234)}
    if kind == "write":
        assert b"".join(text for _, _, text in thread.exits) == data[:count]
    else:
        assert sum(size for _, _, size in thread.exits) == count
        assert guest.ram[0x4000 : 0x4000 + count + 1] == b"\x5a" * count + data[count : count + 1]


def test_a_takeover_that_fails_leaves_the_guest_where_it_is(pair):
    guest = pair(AFTER)
    guest.move()
    takeover = Takeover(guest.control, guest.new.vm, guest.new.vcpus, KICK)
    takeover._native.vm_fd = -1
    with pytest.raises(MigrationError, match="KVM_SET_IRQCHIP: Bad file descriptor"):
        takeover.take(running=True)
    guest.counts()
    guest.take_over()
    guest.counts()


@pytest.mark.parametrize("name", ["in", "out", "split write"])
def test_an_access_outlives_a_takeover_that_fails(pair, name):
    code, expected = ACCESSES[name]
    guest = pair(WAIT + code + AFTER)
    guest.move()
    guest.ram[0x3100] = 1
    guest.wait_parked()
    takeover = Takeover(guest.control, guest.new.vm, guest.new.vcpus, KICK)
    takeover._native.vm_fd = -1
    with pytest.raises(MigrationError):
        takeover.take(running=True)
    (thread,) = guest.take_over(ANSWER)
    guest.counts()
    assert thread.exits == expected


def test_a_carrier_that_is_killed(pair):
    guest = pair(AFTER)
    guest.move()
    os.kill(guest.carrier.pid, signal.SIGKILL)
    wait_until(lambda: not guest.carrier.is_alive(), "the carrier's end")
    with pytest.raises(MigrationError, match="was killed: the guest is lost"):
        guest.take_over()


def test_a_carrier_that_is_killed_before_the_exec(pair):
    guest = pair(AFTER)
    guest.move()
    guest.control.pages.phase = lib.PYVMM_PREPARING
    os.kill(guest.carrier.pid, signal.SIGKILL)
    wait_until(lambda: not guest.carrier.is_alive(), "the carrier's end")
    guest.carrier.take_back()
    guest.counts()


def test_a_vcpu_that_is_about_to_leave_stays(pair):
    """Its thread has seen that it is to be handed over, and is told late that it is not."""
    guest = pair(AFTER)
    guest.carrier.take_back()
    guest.old.vcpus[0].gate.slot = guest.control.slot(0)
    guest.threads[0].kick()
    guest.counts()


def test_an_image_that_comes_too_late(pair):
    guest = pair(AFTER)
    guest.move()
    guest.control.pages.phase = lib.PYVMM_LATE
    with pytest.raises(MigrationError, match="has given this image up"):
        guest.take_over()
    guest.counts()


def test_a_paused_guest_stays_so(pair):
    guest = pair(AFTER, running=False)
    guest.carrier.hold(guest.old.vcpu)
    guest.control.pages.phase = lib.PYVMM_CROSSING
    guest.control.pages.deadline = (1 << 63) - 1
    takeover = Takeover(guest.control, guest.new.vm, guest.new.vcpus, KICK)
    takeover.take(running=False)
    assert guest.count == 0
    assert guest.new.vcpu.get_regs().rip == CODE


GSI = 5


def requests(machine):
    return machine.vm.get_irqchip("KVM_IRQCHIP_PIC_MASTER").chip.pic.irr & 1 << GSI


def test_an_irqfd_passes_to_the_second_vm(irqfd_pair):
    guest, fd = irqfd_pair
    with pytest.raises(KvmError) as caught:
        guest.new.vm.irqfd(GSI, fd)
    assert caught.value.errno == errno.EBUSY
    guest.take_over()
    os.eventfd_write(fd, 1)
    # What was signalled when no VM had it comes when one has.
    guest.new.vm.irqfd(GSI, fd)
    wait_until(lambda: requests(guest.new), "the interrupt")
    assert not requests(guest.old)


def test_an_irqfd_stays_if_the_takeover_fails(irqfd_pair):
    guest, fd = irqfd_pair
    takeover = Takeover(guest.control, guest.new.vm, guest.new.vcpus, KICK)
    takeover._native.vm_fd = -1
    with pytest.raises(MigrationError):
        takeover.take(running=True)
    guest.counts()
    os.eventfd_write(fd, 1)
    wait_until(lambda: requests(guest.old), "the interrupt")


@pytest.fixture
def irqfd_pair():
    """A guest in the carrier, and the eventfd of an irqfd of its VM."""
    guest = Pair(AFTER)
    fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
    guest.old.vm.irqfd(GSI, fd)
    guest.start([(GSI, fd)])
    guest.move()
    yield guest, fd
    guest.close()
    os.close(fd)


@pytest.mark.parametrize("size", [0, 100, 8192])
def test_control_pages_of_another(size):
    machine = Machine()
    fd = os.memfd_create("control")
    os.ftruncate(fd, size)
    try:
        with pytest.raises(MigrationError, match="carrier: "):
            Control.adopt(fd, machine.vcpus)
    finally:
        os.close(fd)
        machine.close()
