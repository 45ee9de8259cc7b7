"""Faults in memory that the host cannot back, as KVM shows them, one vCPU by hand."""

import ctypes
import os
import signal
import struct
import subprocess
import sys
from pathlib import Path

import pytest
from harness import DEADLINE_S, wait_until
from harness.kvm_machine import CODE3, GDT, PD, Events, Machine

from pyvmm.core.bus import Bus, BusDevice
from pyvmm.core.threads import Event, Lock
from pyvmm.machine.cpu import Cpu
from pyvmm.memory.backend import RamBackend
from pyvmm.memory.config import RamConfig
from pyvmm.memory.guest import GuestMemory

SIZE = 4 << 20
LACKING = 2 << 20  # from here on there is no memory, until somebody gives it
DATA = LACKING + 0x100
IDT, TSS, HANDLER, STACK, USER_STACK = 0x14000, 0x15000, 0x16000, 0x17000, 0x9800
END, HANDLED = 0x99, 0x98
#: Ring 3 with ports allowed, and interrupts on or off.
OFF, ON = 0x3002, 0x3202
#: In ring 3 with interrupts off; 0x...: what rbx, the address, is then.
CODE = {
    "store": b"\x48\x89\x03",  # mov %rax, (%rbx)
    "load": b"\x48\x8b\x0b",  # mov (%rbx), %rcx
    "add": b"\x48\x01\x03",  # add %rax, (%rbx)
    "exchange": b"\x48\x87\x03",  # xchg %rax, (%rbx)
    "store 16": b"\x0f\x11\x03",  # movups %xmm0, (%rbx)
    "push": b"\x48\x89\xdc\x50",  # mov %rbx, %rsp; push %rax
    "run": b"\x48\x89\xdc\x48\x83\xc3\x40\xc6\x03\xc3\xff\xd3",  # a ret at 0x40(%rbx); call it
}


class Port(BusDevice):
    def __init__(self):
        self.lock = Lock()
        self.values = []
        self.happened = Event()

    def on_write(self, offset, size, value):
        self.values.append(offset)
        self.happened.set()


class Lacking:
    """A vCPU in ring 3 whose upper memory is gone."""

    def __init__(self):
        config = RamConfig("memory-backend-memfd", "ram0", SIZE, seal=False)
        self.backend = RamBackend(config)
        self.memory = GuestMemory()
        self.memory.add_ram(self.backend, [(0, SIZE, 0)])
        self.machine = Machine(ram=self.backend.view)
        self.events, self.port = Events(), Port()
        ports, mmio = Bus("I/O", 1 << 16), Bus("memory", 1 << 64, self.memory)
        ports.add(HANDLED, 2, self.port, "port")
        self.cpu = Cpu(self.machine.vcpu, ports, mmio, self.events, self.memory)

    def start(self, code, flags=OFF, stack=STACK):
        machine, memory = self.machine, self.memory
        machine.spin_in_ring_3()
        memory.write(PD + 8, (LACKING | 0x87).to_bytes(8, "little"))
        # out %al, $END; 1: jmp 1b
        memory.write(CODE3, code + b"\xe6" + bytes((END,)) + b"\xeb\xfe")
        segments = [0, 0, 0x00AF9B000000FFFF, 0x00CF93000000FFFF, 0x00CFFB000000FFFF]
        segments += [0x00CFF3000000FFFF, 0x00AFFB000000FFFF, 0x0000890000000067 | TSS << 16, 0]
        memory.write(GDT, struct.pack("<9Q", *segments))
        gate = struct.pack("<HHBBHII", HANDLER & 0xFFFF, 0x10, 0, 0xEE, HANDLER >> 16, 0, 0)
        memory.write(IDT, gate * 256)
        memory.write(TSS, bytes(4) + stack.to_bytes(8, "little") + bytes(92))
        # out %al, $HANDLED; 1: jmp 1b
        memory.write(HANDLER, b"\xe6" + bytes((HANDLED,)) + b"\xeb\xfe")
        memory.touch(USER_STACK - 0x800, 0x1000)
        memory.touch(STACK - 0x1000, 0x1000)
        vcpu = machine.vcpu
        sregs = vcpu.get_sregs()
        sregs.gdt.base, sregs.gdt.limit = GDT, 71
        sregs.idt.base, sregs.idt.limit = IDT, 0xFFF
        sregs.tr.base, sregs.tr.limit, sregs.tr.selector = TSS, 0x67, 0x38
        sregs.tr.type, sregs.tr.present, sregs.tr.s = 11, 1, 0
        sregs.cs.selector, sregs.ss.selector = 0x33, 0x2B
        vcpu.set_sregs(sregs)
        regs = vcpu.get_regs()
        regs.rflags, regs.rbx, regs.rsp, regs.rax = flags, DATA, USER_STACK, 0x1122334455667788
        vcpu.set_regs(regs)
        os.ftruncate(self.backend.fd, LACKING)
        self.cpu.start()
        self.cpu.resume()

    def wait_lack(self):
        assert self.events.happened.wait(DEADLINE_S)
        self.events.happened.clear()
        assert self.cpu.wait_stopped()
        assert self.events.errors == []
        assert "memory ram0" in str(self.events.lacks.pop())
        assert self.port.values == []

    def give(self):
        os.ftruncate(self.backend.fd, SIZE)
        self.cpu.resume()

    def close(self):
        self.cpu.close()
        self.machine.vm.close()
        self.machine.system.close()
        self.backend.close()


@pytest.fixture
def lacking():
    lacking = Lacking()
    yield lacking
    lacking.close()


@pytest.mark.parametrize("name", CODE)
def test_without_interrupts(lacking, name):
    lacking.start(CODE[name])
    lacking.wait_lack()
    for _ in range(2):
        lacking.cpu.resume()
        lacking.wait_lack()
    lacking.give()
    assert lacking.port.happened.wait(DEADLINE_S)
    assert lacking.port.values == [END - HANDLED]
    assert lacking.events.lacks == []
    value = 0x1122334455667788
    if name in ("store", "add", "exchange"):
        assert lacking.memory.read_u64(DATA) == value
    if name == "push":
        assert lacking.memory.read_u64(DATA - 8) == value


@pytest.mark.parametrize("name", [name for name in CODE if name != "run"])
def test_with_interrupts(lacking, name):
    """KVM waits for the page itself, for ever, unless it is made to tell."""
    lacking.start(CODE[name], ON)

    def told():
        lacking.cpu.probe()
        return lacking.events.lacks

    wait_until(told, "the vCPU tells what it waits for")
    lacking.wait_lack()
    lacking.give()
    assert lacking.port.happened.wait(DEADLINE_S)
    assert lacking.port.values == [END - HANDLED]
    if name in ("store", "add", "exchange"):
        assert lacking.memory.read_u64(DATA) == 0x1122334455667788


def test_probing_harms_no_guest_that_lacks_nothing(lacking):
    # fldz; fstp %st: what KVM's emulator need not know, again and again
    lacking.start(b"\xd9\xee\xdd\xd8\xf3\x90\xeb\xf8", ON)
    os.ftruncate(lacking.backend.fd, SIZE)
    for _ in range(200):
        lacking.cpu.probe()
        lacking.cpu.call(lambda _vcpu: None)
    assert lacking.events.errors == lacking.events.lacks == []


STACKS = {"exception": b"\x0f\x0b", "interrupt": b"\xcd\x80"}  # ud2; int $0x80


@pytest.mark.parametrize("name", STACKS)
def test_stack_of_a_handler(lacking, name):
    """Not a triple fault."""
    lacking.start(STACKS[name], stack=LACKING + 0x1000)
    lacking.wait_lack()
    lacking.cpu.resume()
    lacking.wait_lack()
    lacking.give()
    assert lacking.port.happened.wait(DEADLINE_S)
    assert lacking.port.values == [0]
    regs = lacking.cpu.call(lambda vcpu: vcpu.get_regs())
    assert regs.rsp & 0xFFF >= 0xFC0


def test_abandoned_access_is_never_made(lacking):
    lacking.start(CODE["load"], ON)

    def told():
        lacking.cpu.probe()
        return lacking.events.lacks

    wait_until(told, "the vCPU tells what it waits for")
    lacking.wait_lack()
    lacking.cpu.abandon()
    assert not lacking.cpu.is_unfinished
    os.ftruncate(lacking.backend.fd, SIZE)
    assert lacking.memory.read(LACKING, 0x1000) == bytes(0x1000)


def take_a_hardware_error():
    """The test, for a process that has no threads but its own: the signal goes to the process, and
    only the vCPU's thread is to take it. KVM sends it to the thread; no process may do that."""
    lacking = Lacking()
    lacking.machine.load(b"\xfa\xf4")  # cli; hlt
    lacking.cpu.start()
    lacking.cpu.wait_started()
    lacking.cpu.resume()
    thread = Path(f"/proc/self/task/{lacking.cpu.thread_id}/syscall")
    wait_until(lambda: thread.read_text().split()[2:3] == ["0xae80"], "the thread is in KVM_RUN")
    info = (ctypes.c_int * 32)(signal.SIGBUS, 0, 4)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGBUS})
    assert not ctypes.CDLL(None).syscall(129, os.getpid(), signal.SIGBUS, info)  # rt_sigqueueinfo
    lacking.wait_lack()
    lacking.cpu.resume()
    lacking.cpu.call(lambda _vcpu: None)
    assert lacking.events.errors == lacking.events.lacks == []
    lacking.close()


def test_page_with_a_hardware_error():
    """SIGBUS with BUS_MCEERR_AR."""
    program = "from kvm.test_backing import take_a_hardware_error as test; test()"
    tests = Path(__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tests, capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stderr) == (0, "")
