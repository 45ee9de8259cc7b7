"""A guest over KVM whose accesses native code answers, beside one that Python serves alone."""

import sys

import pytest
from harness import DEADLINE_S
from harness.kvm_machine import Events, Machine
from harness.process import Deadline
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from pyvmm.cli import SWITCH_INTERVAL_S
from pyvmm.core.bus import Bus, BusDevice, Nobody
from pyvmm.core.irq import IrqLine
from pyvmm.core.threads import Event, Lock
from pyvmm.devices.debugcon import IOBASE, DebugConsole
from pyvmm.devices.serial import IER, IIR, LSR, PORTS, THR, Serial
from pyvmm.kvm.answers import Answers
from pyvmm.machine.cpu import Cpu
from pyvmm.testing.memory_chardev import MemoryChardev

COM, GSI, POST, END = 0x3F8, 4, 0x80, 0x99
ANSWERS, CODE = 0x40000, 0x20000

# What the PIC has latched since the last time: an edge that came is seen, however short. Then it
# is initialised again, which forgets it.
LATCHED = (
    b"\xb0\x0a\xe6\x20\xe4\x20\xaa"  # mov $0x0a, %al; out %al, $0x20; in $0x20, %al; stosb
    b"\xb0\x11\xe6\x20\xb0\x20\xe6\x21\xb0\x04\xe6\x21\xb0\x01\xe6\x21"
)


def code(accesses):
    """A program that makes them, and stores what it finds."""
    # mov $0x4000, %ax; mov %ax, %es; xor %di, %di; cld
    parts = [b"\xb8\x00\x40\x8e\xc0\x31\xff\xfc"]
    for port, value in accesses:
        parts.append(b"\xba" + port.to_bytes(2, "little"))  # mov $port, %dx
        # mov $value, %al; out %al, (%dx)  |  in (%dx), %al; stosb
        parts.append(b"\xec\xaa" if value is None else bytes((0xB0, value, 0xEE)))
        parts.append(LATCHED)
    # out %al, $END; jmp .
    return b"".join(parts) + bytes((0xE6, END)) + b"\xeb\xfe"


class End(BusDevice):
    """The port by which a program says that it is done."""

    def __init__(self):
        self.lock = Lock()
        self.reached = Event()

    def on_write(self, offset, size, value):
        self.reached.set()


class Guest:
    """A machine with a serial port, a debug console and the port of POST codes."""

    def __init__(self, *, native):
        self.machine = machine = Machine(ram=1 << 20)
        self.chardevs = [MemoryChardev(), MemoryChardev()]
        line = IrqLine(GSI, machine.vm.irq_line, machine.vm.fd)
        self.serial = Serial(line, self.chardevs[0])
        self.devices = [self.serial, DebugConsole(self.chardevs[1])]
        self.bus, mmio, self.end = Bus("I/O", 1 << 16), Bus("memory", 1 << 64), End()
        for start, length, device in zip((COM, IOBASE), (PORTS, 1), self.devices, strict=True):
            self.bus.add(start, length, device, device.name)
            device.prepare()
            device.attach()
        for chardev in self.chardevs:
            chardev.loop.run_once(0)
        self.bus.add(POST, 1, Nobody(), "post-code")
        self.bus.add(END, 1, self.end, "end")
        if native:
            Answers(machine.vcpus, self.bus, mmio)
        self.events = Events()
        self.cpu = Cpu(machine.vcpu, self.bus, mmio, self.events)
        self.cpu.start()

    def run(self, accesses):
        """Make them; what was read, interrupts included, and what was sent."""
        self.cpu.call(lambda vcpu: self.load(code(accesses)))
        self.end.reached.clear()
        self.cpu.resume()
        assert self.end.reached.wait(DEADLINE_S)
        self.cpu.request_stop()
        assert self.cpu.wait_stopped()
        assert not self.events.errors
        for device in self.devices:
            device.drain()
        saved = bytearray()
        self.serial.vmstate.save(saved, self.serial.save())
        count = sum(1 + (value is None) for _, value in accesses)
        found = bytes(self.machine.ram[ANSWERS : ANSWERS + count])
        return found, bytes(saved), [chardev.take_output() for chardev in self.chardevs]

    def load(self, program):
        machine = self.machine
        machine.load(b"\xea\x00\x00" + (CODE >> 4).to_bytes(2, "little"))  # ljmp CODE
        machine.ram[CODE : CODE + len(program)] = program

    def close(self):
        self.cpu.close()
        for device in self.devices:
            device.close()
        for chardev in self.chardevs:
            chardev.close()
        self.machine.close()


@pytest.fixture
def guests():
    interval = sys.getswitchinterval()
    # A vCPU's thread waits for the interpreter as long as in a VMM. With Python's own interval a
    # loop that gives it up for a moment each time, and sooner, never has to let go of it.
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    made = [Guest(native=True), Guest(native=False)]
    yield made
    for guest in made:
        guest.close()
    sys.setswitchinterval(interval)


ports = st.one_of(
    st.sampled_from([COM + THR, COM + IER, COM + IIR, COM + LSR, IOBASE, POST]),
    st.integers(COM, COM + PORTS - 1),
)
accesses = st.lists(
    st.tuples(ports, st.none() | st.sampled_from([0, 1, 2, 3, 15]) | st.integers(0, 255)),
    max_size=60,
)


# A failure is not made smaller: each attempt may be one at a guest that hangs.
@settings(
    max_examples=25,
    phases=[Phase.explicit, Phase.reuse, Phase.generate],
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(accesses)
def test_both_ways_are_one_machine(guests, accesses):
    native, python = guests
    assert native.run(accesses) == python.run(accesses)


def test_a_driver_that_sends_does_not_come_back_to_python(guests, monkeypatch):
    native, python = guests
    found = []
    for guest in (native, python):
        handle = guest.cpu._handle

        def note(exit, handle=handle):
            found.append(exit.port)
            handle(exit)

        monkeypatch.setattr(guest.cpu, "_handle", note)
    sends = [(COM + IER, 2)]
    for byte in b"hello":
        sends += [(COM + IIR, None), (COM + LSR, None), (COM + THR, byte), (IOBASE, byte)]
    assert native.run(sends)[2] == [b"hello", b"hello"]
    assert found == [END]
    found.clear()
    assert python.run(sends)[2] == [b"hello", b"hello"]
    assert found == [port for port, _ in sends] + [END]


def test_a_vcpu_that_is_answered_natively_is_stopped(guests):
    """However fast it comes, and whatever it is asked for."""
    guest = guests[0]
    # mov $0x3fd, %dx; 1: in (%dx), %al; jmp 1b
    guest.cpu.call(lambda vcpu: guest.load(b"\xba\xfd\x03\xec\xeb\xfd"))
    for _ in range(20):
        guest.cpu.resume()
        rip = guest.cpu.call(lambda vcpu: vcpu.get_regs().rip)
        assert rip <= 6 or rip == 0x1000  # in the loop, or before the first instruction
        guest.cpu.request_stop()
        assert guest.cpu.wait_stopped()


def test_a_region_moves_under_a_vcpu_that_is_answered(guests):
    guest = guests[0]
    region = guest.bus.find(IOBASE)
    # mov $0xe9, %dx; 1: mov $65, %al; out %al, (%dx); jmp 1b
    guest.cpu.call(lambda vcpu: guest.load(b"\xba\xe9\x00\xb0\x41\xee\xeb\xfb"))
    guest.cpu.resume()
    for _ in range(100):
        region = guest.bus.move(region, 0x200)
        region = guest.bus.move(region, IOBASE)
    guest.cpu.request_stop()
    assert guest.cpu.wait_stopped()
    assert not guest.events.errors
    guest.devices[1].drain()
    assert set(guest.chardevs[1].take_output()) <= {0x41}


def test_a_vcpu_that_sends_while_others_are_in_the_device(guests):
    guest = guests[0]
    # mov $0x3f8, %dx; mov $0, %al; 1: out %al, (%dx); inc %al; jmp 1b
    guest.cpu.call(lambda vcpu: guest.load(b"\xba\xf8\x03\xb0\x00\xee\xfe\xc0\xeb\xfb"))
    handled, handle = [], guest.cpu._handle
    guest.cpu._handle = lambda exit: (handled.append(exit.port), handle(exit))
    guest.cpu.resume()
    out = bytearray()
    deadline = Deadline()
    # Both ways are gone, in one run or the other.
    while len(out) < 10_000 or not handled:
        assert not deadline.over, f"{len(out)} bytes, {len(handled)} exits"
        for _ in range(100):
            with guest.serial.lock:
                guest.serial.save()
        guest.chardevs[0].loop.run_once(0)
        out += guest.chardevs[0].take_output()
    guest.cpu.request_stop()
    assert guest.cpu.wait_stopped()
    guest.serial.drain()
    out += guest.chardevs[0].take_output()
    assert not guest.events.errors
    assert len(handled) < len(out)
    assert out == bytes(at % 256 for at in range(len(out)))
