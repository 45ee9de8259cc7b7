"""What comes, goes and moves under a vCPU that runs: memory slots, a bus region, kicks."""

import mmap
import os

import pytest
from harness import wait_until
from harness.kvm_machine import CODE3, PD, Events, Machine

from pyvmm.core.bus import Bus, BusDevice
from pyvmm.core.threads import Lock
from pyvmm.errors import InternalError, KvmError
from pyvmm.kvm.irq import IrqRouting
from pyvmm.machine.cpu import Cpu
from pyvmm.memory.backend import RamBackend
from pyvmm.memory.config import RamConfig
from pyvmm.memory.guest import GuestMemory, MemoryRegion

PAGE = 4096
RAM = 1 << 20
AT = 2 << 20  # what rbx is: here something comes and goes
PORT = 0x98
OUT = b"\xe6" + bytes((PORT,))  # out %al, $PORT
LOAD = b"\x8a\x03"  # mov (%rbx), %al
LOAD_NEXT = b"\x8a\x83\x00\x10\x00\x00"  # mov 0x1000(%rbx), %al
COUNT = b"\xff\x03"  # incl (%rbx)
STORE = b"\xc7\x03\x07\x00\x00\x00"  # movl $7, (%rbx)
NOBODY = 0xFF


class Port(BusDevice):
    """What the guest has written, in order."""

    def __init__(self):
        self.lock = Lock()
        self.values = []

    def on_write(self, offset, size, value):
        self.values.append(value)

    def next_values(self, count=20):
        """Those that come from now on, but for the first, which may have been under way."""
        begin = len(self.values) + 1
        wait_until(lambda: len(self.values) >= begin + count, "the guest's output")
        return self.values[begin : begin + count]


class Answers(BusDevice):
    """Answers with 0x42 at its first address; notes the offsets."""

    def __init__(self):
        self.lock = Lock()
        self.offsets = set()
        self.written = []

    def on_read(self, offset, size):
        self.offsets.add(offset)
        return 0x42

    def on_write(self, offset, size, value):
        self.written.append(value)


class Moving:
    """A vCPU that does the same over and over in ring 3, and a page that is not there yet."""

    def __init__(self):
        self.backends = [ram(RAM), ram(2 * PAGE)]
        self.memory = GuestMemory()
        self.memory.add_ram(self.backends[0], [(0, RAM, 0)])
        self.page = MemoryRegion("page", AT, PAGE, self.backends[1])
        self.backends[1].write(0, b"\x5a")
        self.machine = Machine(ram=self.backends[0].view, memory=self.memory)
        self.events, self.port = Events(), Port()
        ports, self.mmio = Bus("I/O", 1 << 16), Bus("memory", 1 << 64, self.memory)
        ports.add(PORT, 1, self.port, "port")
        self.cpu = Cpu(self.machine.vcpu, ports, self.mmio, self.events, self.memory)

    def run(self, code):
        self.machine.spin_in_ring_3()
        self.memory.write(PD + 8, (AT | 0x87).to_bytes(8, "little"))
        jump = (-len(code) - 2) & 0xFF
        self.memory.write(CODE3, code + b"\xeb" + bytes((jump,)))
        regs = self.machine.vcpu.get_regs()
        regs.rflags, regs.rbx = 0x3002, AT  # ring 3 may use ports
        self.machine.vcpu.set_regs(regs)
        self.cpu.start()
        self.cpu.resume()

    def close(self):
        self.cpu.close()
        self.machine.vm.close()
        self.machine.system.close()
        for backend in self.backends:
            backend.close()


def ram(size):
    return RamBackend(RamConfig("memory-backend-memfd", "ram0", size))


@pytest.fixture
def moving():
    moving = Moving()
    yield moving
    moving.close()
    assert moving.events.errors == moving.events.lacks == []


def test_memory_comes_and_goes(moving):
    moving.run(LOAD + OUT)
    for _ in range(10):
        assert set(moving.port.next_values()) == {NOBODY}
        moving.memory.add(moving.page)
        assert set(moving.port.next_values()) == {0x5A}
        moving.memory.remove(moving.page)


def test_nothing_reaches_memory_that_has_gone(moving):
    counter = moving.page.view.cast("I")
    moving.memory.add(moving.page)
    moving.run(COUNT + OUT)
    wait_until(lambda: counter[0] > 0x5A + 10, "the guest's count")
    moving.memory.remove(moving.page)
    before = counter[0]
    moving.port.next_values()
    assert counter[0] == before
    moving.memory.add(moving.page)
    wait_until(lambda: counter[0] > before + 10, "the guest's count")
    counter.release()


def test_memory_is_there_elsewhere(moving):
    moving.memory.add(moving.page)
    moving.run(LOAD + OUT)
    moving.memory.remove(moving.page)
    moving.memory.add(MemoryRegion("moved", AT + PAGE, PAGE, moving.backends[1]))
    assert set(moving.port.next_values()) == {NOBODY}
    moving.memory.add(MemoryRegion("other", AT, PAGE, moving.backends[1], PAGE))
    assert set(moving.port.next_values()) == {0}


def test_memory_that_kvm_refuses_is_nowhere(moving):
    other = mmap.mmap(-1, PAGE)
    moving.machine.vm.set_user_memory_region(100, AT, other)
    with pytest.raises(KvmError, match="KVM_SET_USER_MEMORY_REGION"):
        moving.memory.add(moving.page)
    assert moving.page not in moving.memory.regions
    assert not moving.memory.contains(AT, 1)
    moving.machine.vm.delete_memory_region(100)
    other.close()
    moving.memory.add(moving.page)
    moving.run(LOAD + OUT)
    assert set(moving.port.next_values()) == {0x5A}


def test_slots_are_used_again(moving):
    """KVM has so many, and no more."""
    for _ in range(2 * moving.machine.system.check_extension("KVM_CAP_NR_MEMSLOTS") // 1000):
        moving.memory.add(moving.page)
        moving.memory.remove(moving.page)
    moving.memory.add(moving.page)
    assert max(moving.machine.vm._memory) == 1


def test_bus_region_moves(moving):
    """As a BAR does. Every access finds the device where it was or where it is, with the offset
    of that place."""
    device = Answers()
    region = moving.mmio.add(AT, 4, device, "device", width=4)
    moving.run(LOAD + OUT + LOAD_NEXT + OUT)
    moving.port.next_values(4)
    for turn in range(400):
        region = moving.mmio.move(region, AT + PAGE * (turn % 2 == 0))
        if turn % 20 == 0:
            assert sorted(set(moving.port.next_values())) == [0x42, NOBODY]
    moving.mmio.remove(region)
    assert set(moving.port.next_values()) == {NOBODY}
    assert device.offsets == {0}


def test_kicks_are_taken_from_kvm(moving):
    """Before an exec that the VM outlives: the guest's writes are exits then."""
    device = Answers()
    moving.mmio.add(AT, 4, device, "device", width=4)
    irqs = IrqRouting(moving.machine.vm)
    fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
    irqs.kick(AT, 7, fd, "queue 0")
    assert irqs.assigned == [f"ioeventfd {fd} of queue 0: 7 at 0x200000"]
    moving.run(STORE + OUT)
    moving.port.next_values()
    assert os.eventfd_read(fd) > 1
    assert device.written == []
    irqs.deassign()
    assert irqs.assigned == []
    moving.port.next_values()
    assert set(device.written) == {7}
    with pytest.raises(BlockingIOError):
        os.eventfd_read(fd), os.eventfd_read(fd)
    irqs.kick(AT, 7, fd, "queue 0")  # as another VM may now
    os.close(fd)


def test_kicks_of_ports(moving):
    """A port is not the memory of the same address, and any value of one width is a kick."""
    device = Answers()
    moving.cpu._ports.add(PORT + 1, 1, device, "device")
    irqs = IrqRouting(moving.machine.vm)
    fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
    irqs.kick(PORT + 1, None, fd, "test", 1, is_port=True)
    irqs.kick(PORT + 1, None, fd, "memory", 1)
    irqs.unkick(PORT + 1, None)
    moving.run(b"\xe6" + bytes((PORT + 1,)) + OUT)
    moving.port.next_values()
    assert os.eventfd_read(fd) > 1
    assert device.written == []
    irqs.unkick(PORT + 1, None, is_port=True)
    assert irqs.assigned == []
    moving.port.next_values()
    assert device.written != []
    os.close(fd)


def test_gsi_has_one_user(moving):
    irqs = IrqRouting(moving.machine.vm)
    assert irqs.line(4, "serial 0").number == 4
    for take in (irqs.claim, irqs.line, irqs.pulse):
        with pytest.raises(InternalError, match="GSI 4 of rtc is that of serial 0"):
            take(4, "rtc")
    irqs.pulse(16, "virtio-rng-device")()
