"""The KVM bindings and the vCPU thread on a machine made by hand: every get/set pair, every
exit that needs finishing, and kicks that must not get lost."""

import mmap
import os
import signal
import subprocess
import sys
import threading

import pytest
from harness import DEADLINE_S, guests, wait_until

from pyvmm.core.bus import Bus
from pyvmm.core.eventloop import EventLoop
from pyvmm.core.threads import Event
from pyvmm.cpr.fdstore import FdStore
from pyvmm.errors import InternalError, KvmError
from pyvmm.kvm import exits
from pyvmm.kvm.system import System
from pyvmm.machine import cpu as cpu_module
from pyvmm.machine.config import MachineConfig
from pyvmm.machine.cpu import Cpu, CpuEvents
from pyvmm.machine.machine import Machine as WholeMachine
from pyvmm.x86 import cpuid, irqchip, vcpu_state

RAM = 4 << 20
#: What counts on by itself: TSC, its deadline and adjustment, kvmclock, Hyper-V's run time and
#: reference counter.
TSC_AND_TIMER = {0x10, 0x6E0, 0x4B564D00, 0x4B564D01, 0x11, 0x12, 0x3B, 0x40000010, 0x40000020}
# Long mode in ring 3, as the guest kernel runs: page tables at 0x10000, code at 0x8000.
PML4, PDPT, PD, GDT, CODE3 = 0x10000, 0x11000, 0x12000, 0x13000, 0x8000


class Machine:
    """A VM with RAM at 0, an irqchip and vCPUs."""

    def __init__(self, cpus=1, ram=RAM):
        self.system = System.open()
        self.vm = self.system.create_vm()
        self.vm.set_identity_map_addr(0xFEFFC000)
        self.vm.set_tss_addr(0xFEFFD000)
        self.ram = mmap.mmap(-1, ram)
        self.vm.set_user_memory_region(0, 0, self.ram)
        self.vm.create_irqchip()
        self.vm.create_pit2()
        self.vcpus = [self.vm.create_vcpu(index) for index in range(cpus)]
        topology = cpuid.Topology(1, cpus, 1)
        offered = cpuid.host_cpuid(self.system, topology, {})
        for vcpu in self.vcpus:
            cpuid.set_identity(offered, vcpu.index, topology)
            vcpu.set_cpuid2(offered)

    @property
    def vcpu(self):
        return self.vcpus[0]

    def load(self, code, start=0x1000):
        """Put 16-bit code into RAM and point the first vCPU there, flat in real mode."""
        self.ram[start : start + len(code)] = code
        sregs = self.vcpu.get_sregs()
        sregs.cs.selector, sregs.cs.base = 0, 0
        self.vcpu.set_sregs(sregs)
        regs = self.vcpu.get_regs()
        regs.rip, regs.rflags = start, 2
        self.vcpu.set_regs(regs)

    def spin_in_ring_3(self):
        """Let the first vCPU count in rax, in ring 3 of long mode."""
        self.ram[CODE3 : CODE3 + 5] = b"\x48\xff\xc0\xeb\xfb"  # 1: inc %rax; jmp 1b
        for table, entry in ((PML4, PDPT | 7), (PDPT, PD | 7), (PD, 0x87)):
            self.ram[table : table + 8] = entry.to_bytes(8, "little")
        sregs = self.vcpu.get_sregs()
        for segment, kind, selector in ((sregs.cs, 11, 0x1B), (sregs.ss, 3, 0x23)):
            segment.base, segment.limit, segment.selector = 0, 0xFFFFFFFF, selector
            segment.type, segment.present, segment.dpl, segment.s = kind, 1, 3, 1
            segment.g = 1
        sregs.cs.l, sregs.cs.db, sregs.ss.l, sregs.ss.db = 1, 0, 0, 1
        sregs.cr0, sregs.cr3, sregs.cr4, sregs.efer = 0x80050033, PML4, 0x620, 0xD00
        self.vcpu.set_sregs(sregs)
        regs = self.vcpu.get_regs()
        regs.rip, regs.rflags, regs.rsp, regs.rax = CODE3, 0x202, 0x9000, 0
        self.vcpu.set_regs(regs)

    def close(self):
        for vcpu in self.vcpus:
            vcpu.close()
        self.vm.close()
        self.system.close()
        self.ram.close()


@pytest.fixture
def machine():
    machine = Machine()
    yield machine
    machine.close()


@pytest.fixture
def threaded(machine):
    """The first vCPU in its thread, with buses around it."""
    ports, mmio = Bus("I/O", 1 << 16), Bus("memory", 1 << 64)
    events = Events()
    cpu = Cpu(machine.vcpu, ports, mmio, events)
    cpu.start()
    machine.cpu, machine.events = cpu, events
    yield machine
    cpu.close()
    assert events.errors == []


class Events(CpuEvents):
    def __init__(self):
        self.errors = []
        self.happened = Event()

    def on_shutdown_exit(self, index):
        self.happened.set()

    def on_cpu_error(self, index, error):
        self.errors.append(error)
        self.happened.set()


def same(left, right):
    from pyvmm._native import ffi

    return bytes(ffi.buffer(left)) == bytes(ffi.buffer(right))


# ---- every get and set -----------------------------------------------------------------------


@pytest.mark.parametrize("name", ["regs", "sregs", "debugregs", "xcrs", "vcpu_events"])
def test_structures_come_back(machine, name):
    get, set_ = getattr(machine.vcpu, f"get_{name}"), getattr(machine.vcpu, f"set_{name}")
    before = get()
    set_(before)
    assert same(get(), before)


def test_regs_are_set(machine):
    regs = machine.vcpu.get_regs()
    names = "rax rbx rcx rdx rsi rdi rbp rsp r8 r9 r10 r11 r12 r13 r14 r15".split()
    for number, name in enumerate(names):
        setattr(regs, name, 0x1111111111111111 * (number % 15) + number)
    machine.vcpu.set_regs(regs)
    after = machine.vcpu.get_regs()
    assert [getattr(after, name) for name in names] == [getattr(regs, name) for name in names]


def test_debugregs_are_set(machine):
    registers = machine.vcpu.get_debugregs()
    registers.db[0], registers.db[3], registers.dr6, registers.dr7 = (
        0x1000,
        0x3000,
        0xFFFF0FF1,
        1024,
    )
    machine.vcpu.set_debugregs(registers)
    after = machine.vcpu.get_debugregs()
    assert list(after.db) == [0x1000, registers.db[1], registers.db[2], 0x3000]
    assert (after.dr6, after.dr7) == (0xFFFF0FF1, 0x400)


def test_lapic_comes_back(machine):
    page = bytearray(machine.vcpu.get_lapic())
    assert len(page) == 1024
    page[0x80:0x84] = (0x20).to_bytes(4, "little")  # task priority
    machine.vcpu.set_lapic(bytes(page))
    page[0xA0:0xA4] = page[0x80:0x84]  # the processor priority follows
    assert machine.vcpu.get_lapic() == bytes(page)


def test_xsave_comes_back(machine):
    area = bytearray(machine.vcpu.get_xsave())
    assert len(area) >= 4096
    area[160:176] = bytes(range(16))  # XMM0
    area[512] |= 2  # XSTATE_BV: SSE in use
    machine.vcpu.set_xsave(bytes(area))
    assert machine.vcpu.get_xsave()[160:176] == bytes(range(16))
    with pytest.raises(KvmError, match="KVM_SET_XSAVE"):
        machine.vcpu.set_xsave(bytes(area[:-1]))


def test_all_msrs_come_back(machine):
    before = machine.vcpu.get_msrs()
    assert len(before) > 10
    assert machine.vcpu.set_msrs(before) == []
    after = machine.vcpu.get_msrs()
    assert before.keys() == after.keys()
    changed = {index for index in before if before[index] != after[index]}
    assert changed <= TSC_AND_TIMER, [hex(index) for index in changed]


def test_unknown_msrs_are_named(machine):
    values = {0xC0000082: 0xFFFF800000001000, 0x12345678: 1, 0xC0000083: 0xFFFF800000002000}
    assert machine.vcpu.set_msrs(values) == [0x12345678]
    del values[0x12345678]
    assert machine.vcpu.get_msrs([0xC0000082, 0x12345678, 0xC0000083]) == values


def test_mp_states():
    machine = Machine(cpus=2)
    try:
        runnable, uninitialized, halted = 0, 1, 3
        assert [vcpu.get_mp_state() for vcpu in machine.vcpus] == [runnable, uninitialized]
        for state in (halted, runnable):
            machine.vcpu.set_mp_state(state)
            assert machine.vcpu.get_mp_state() == state
    finally:
        machine.close()


def test_irqchips_and_pit_come_back(machine):
    for chip in ("KVM_IRQCHIP_PIC_MASTER", "KVM_IRQCHIP_PIC_SLAVE", "KVM_IRQCHIP_IOAPIC"):
        before = machine.vm.get_irqchip(chip)
        machine.vm.set_irqchip(before)
        assert same(machine.vm.get_irqchip(chip), before)
    before = machine.vm.get_pit2()
    before.channels[0].count, before.channels[0].mode = 0x1234, 2
    machine.vm.set_pit2(before)
    assert machine.vm.get_pit2().channels[0].count == 0x1234


# KVM raises the PIT's line and lowers it at once, on a thread of its own. A state that was read
# in between swallows the next edge, and with no EOI for that KVM's PIT never ticks again.


def test_pic_read_within_a_tick_does_not_stop_the_pit(machine):
    vm, master = machine.vm, "KVM_IRQCHIP_PIC_MASTER"
    pic, pit = irqchip.save_pic(vm, master), irqchip.save_pit(vm)
    pic.imr, pic.last_irr = 0, 1
    pit.channels[0].mode, pit.channels[0].count, pit.channels[0].gate = 2, 11932, 1
    irqchip.load_pic(vm, master, pic)
    irqchip.load_pit(vm, pit)
    wait_until(lambda: vm.get_irqchip(master).chip.pic.irr & 1, "the PIT's interrupt")


def test_ioapic_read_within_a_tick_does_not_stop_the_pit(machine):
    vm = machine.vm
    ioapic, pit = irqchip.save_ioapic(vm), irqchip.save_pit(vm)
    ioapic.irr = 1
    irqchip.load_ioapic(vm, ioapic)
    irqchip.load_pit(vm, pit)
    assert not vm.get_irqchip("KVM_IRQCHIP_IOAPIC").chip.ioapic.irr & 1


def test_a_signal_does_not_keep_a_vm_from_being_made(machine):
    seen = []
    handler = signal.signal(signal.SIGALRM, lambda *_: seen.append(1))
    timer = signal.setitimer(signal.ITIMER_REAL, 0.0001, 0.0001)
    try:
        for _ in range(500):
            machine.system.create_vm().close()
    finally:
        # It is the time limit's of the test.
        signal.setitimer(signal.ITIMER_REAL, *timer)
        signal.signal(signal.SIGALRM, handler)
    assert seen


def test_guests_of_the_guest_are_not_offered(machine):
    # Whether this host would or not.
    offered = machine.system.get_supported_cpuid()
    entries = [offered.entries[index] for index in range(offered.nent)]
    for leaf, bit in ((1, 5), (0x80000001, 2)):
        next(entry for entry in entries if entry.function == leaf).ecx |= 1 << bit
    machine.system.get_supported_cpuid = lambda: offered
    assert cpuid.host_cpuid(machine.system, cpuid.Topology(1, 1, 1), {}) is offered
    for leaf, bit in ((1, 5), (0x80000001, 2)):
        assert not next(entry for entry in entries if entry.function == leaf).ecx & 1 << bit


def test_registers_that_kvm_does_not_list(machine):
    """Memory types and machine-check banks: kept over an update, and cleared by a reset."""
    values = {
        0x2FF: 0xC06,
        0x250: 0x0606060606060606,
        0x26F: 0x0505050505050505,
        0x200: 0x6,
        0x201: 0xFFF00800,
        0x400: (1 << 64) - 1,
        0x404: (1 << 64) - 1,
    }
    start = vcpu_state.power_on(machine.vcpu)
    assert machine.vcpu.set_msrs(values) == []
    new = Machine()
    vcpu_state.write(new.vcpu, vcpu_state.read(machine.vcpu))
    assert new.vcpu.get_msrs(values) == values
    machine.vcpu.set_msrs({0x2FF: 0})
    new.vcpu.set_msrs({0x2FF: 0x806})  # as a machine starts
    vcpu_state.write(new.vcpu, vcpu_state.read(machine.vcpu))
    assert new.vcpu.get_msrs([0x2FF]) == {0x2FF: 0}
    new.close()
    vcpu_state.reset(machine.vcpu, start)
    assert machine.vcpu.get_msrs(values) == dict.fromkeys(values, 0)


def test_clocks_go_on_from_what_is_set(machine):
    machine.vm.set_clock(10**15)
    first = machine.vm.get_clock()
    assert 10**15 <= first <= machine.vm.get_clock() < 10**15 + 60 * 10**9
    assert machine.vcpu.get_tsc_khz() > 0
    before = machine.vcpu.get_tsc_offset()
    # None: an old kernel; 0: this one shows its guests the bare TSC, and cannot do otherwise.
    if before:
        machine.vcpu.set_tsc_offset(-(10**12) % 2**64)
        assert machine.vcpu.get_tsc_offset() == -(10**12) % 2**64


def test_cpuid_comes_back(machine):
    shown = machine.vcpu.get_cpuid2()
    assert shown.nent > 5
    assert {0, 1, 7} <= {shown.entries[i].function for i in range(shown.nent)}


def test_whole_state_comes_back(machine):
    machine.spin_in_ring_3()
    state = vcpu_state.read(machine.vcpu)
    other = Machine()
    try:
        vcpu_state.write(other.vcpu, state)
        for name in ("regs", "sregs", "debugregs", "xcrs", "vcpu_events"):
            left = getattr(machine.vcpu, f"get_{name}")()
            assert same(left, getattr(other.vcpu, f"get_{name}")()), name
        assert machine.vcpu.get_xsave() == other.vcpu.get_xsave()
    finally:
        other.close()


def test_errors_name_the_ioctl(machine):
    with pytest.raises(KvmError, match="KVM_CREATE_VCPU"):
        machine.vm.create_vcpu(0)
    with pytest.raises(KvmError, match="KVM_CREATE_IRQCHIP"):
        machine.vm.create_irqchip()
    regs = machine.vcpu.get_regs()
    machine.vcpu.close()
    with pytest.raises(KvmError, match="KVM_SET_REGS"):
        machine.vcpu.set_regs(regs)
    machine.vcpus.clear()


def test_vm_does_not_survive_an_exec():
    """The reason why a live update makes a new VM: every ioctl on the old one fails."""
    program = (
        "import os, sys\n"
        "from pyvmm.errors import KvmError\n"
        "from pyvmm.kvm.system import System\n"
        "from pyvmm.kvm.vm import Vm\n"
        "if len(sys.argv) == 1:\n"
        "    system = System.open(); vm = system.create_vm()\n"
        "    fds = [system.fd, vm.fd]\n"
        "    [os.set_inheritable(fd, True) for fd in fds]\n"
        "    os.execv(sys.executable, [sys.executable, sys.orig_argv[1], sys.orig_argv[2], "
        "*map(str, fds)])\n"
        "system = System(int(sys.argv[1]))\n"
        "assert system.get_api_version() == 12\n"
        "try:\n"
        "    Vm(int(sys.argv[2]), system).get_clock()\n"
        "except KvmError as error:\n"
        "    print(error.errno)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("5\n", "")  # EIO


# ---- exits and their completion --------------------------------------------------------------


def finish(vcpu):
    """Run until nothing is half done; what came on the way."""
    vcpu.set_immediate_exit(True)
    on_the_way = []
    while not isinstance(exit := vcpu.run(), exits.Interrupted):
        on_the_way.append(exit)
        if not exit.is_write:
            exit.data[:] = b"\xbb" * len(exit.data)
    vcpu.set_immediate_exit(False)
    return on_the_way


def test_input_is_completed_by_immediate_exit(machine):
    machine.load(b"\xba\x34\x12\xec")  # mov $0x1234, %dx; in %dx, %al
    exit = machine.vcpu.run()
    assert (exit.port, exit.size, exit.count, exit.is_write) == (0x1234, 1, 1, False)
    assert machine.vcpu.get_regs().rip == 0x1003
    exit.data[0] = b"\x5a"
    assert finish(machine.vcpu) == []
    regs = machine.vcpu.get_regs()
    assert (regs.rip, regs.rax & 0xFF) == (0x1004, 0x5A)


def test_output(machine):
    machine.load(b"\xba\x34\x12\xb8\xcd\xab\xef")  # mov $0x1234, %dx; mov $0xabcd, %ax; out %ax
    exit = machine.vcpu.run()
    assert (exit.port, exit.size, exit.is_write) == (0x1234, 2, True)
    assert exit.data[:] == b"\xcd\xab"
    assert finish(machine.vcpu) == []
    assert machine.vcpu.get_regs().rip == 0x1007


def test_string_output_comes_in_pieces(machine):
    machine.ram[0x2000:0x2064] = bytes(range(100))
    # mov $0x1234, %dx; mov $0x2000, %si; mov $100, %cx; cld; rep outsb; out %al (the end)
    machine.load(b"\xba\x34\x12\xbe\x00\x20\xb9\x64\x00\xfc\xf3\x6e\xba\x35\x12\xee")
    data = b""
    while (exit := machine.vcpu.run()).port == 0x1234:
        data += exit.data[:]
    assert data == bytes(range(100))


# Into what is no memory in a machine of 640 KiB.
PAGE_CROSSING = [
    ("read", b"\xb8\x00\xb0\x8e\xd8\x66\xa1\xfe\x0f", False),  # mov %ds:0xffe, %eax; ds 0xb000
    ("write", b"\xb8\x00\xb0\x8e\xd8\x66\xa3\xfe\x0f", True),
]


@pytest.mark.parametrize(("way", "code", "is_write"), PAGE_CROSSING)
def test_access_across_a_page_is_completed(way, code, is_write):
    machine = Machine(ram=0xA0000)
    try:
        machine.load(code)
        exit = machine.vcpu.run()
        assert isinstance(exit, exits.Mmio)
        assert (exit.gpa, exit.size, exit.is_write) == (0xB0FFE, 2, is_write)
        if not is_write:
            exit.data[:] = b"\xaa\xaa"
        (rest,) = finish(machine.vcpu)
        assert (rest.gpa, rest.size, rest.is_write) == (0xB1000, 2, is_write)
        regs = machine.vcpu.get_regs()
        assert regs.rip == 0x1000 + len(code)
        if not is_write:
            assert regs.rax & 0xFFFFFFFF == 0xBBBBAAAA
    finally:
        machine.close()


def test_triple_fault(machine):
    machine.spin_in_ring_3()
    machine.ram[CODE3 : CODE3 + 2] = b"\x0f\x0b"  # ud2, and no handler for that or what follows
    sregs = machine.vcpu.get_sregs()
    sregs.idt.base = sregs.idt.limit = 0
    machine.vcpu.set_sregs(sregs)
    assert isinstance(machine.vcpu.run(), exits.Shutdown)


def test_code_where_there_is_no_memory():
    machine = Machine(ram=0xA0000)
    machine.load(guests.TO_UNMAPPED)
    exit = machine.vcpu.run()
    assert isinstance(exit, exits.InternalError)
    assert "emulation failure" in str(exit)
    machine.close()


# ---- the thread ------------------------------------------------------------------------------


def count(cpu):
    return cpu.call(lambda vcpu: vcpu.get_regs().rax)


def test_no_kick_is_lost(threaded):
    """A spinning ring-3 guest is stopped and resumed 2000 times; one lost kick would hang."""
    threaded.spin_in_ring_3()
    for _ in range(2000):
        threaded.cpu.resume()
        threaded.cpu.request_stop()
        assert threaded.cpu.wait_stopped()
    before = count(threaded.cpu)
    threaded.cpu.resume()
    wait_until(lambda: count(threaded.cpu) > before, "a higher count")


def test_call_while_it_runs(threaded):
    threaded.spin_in_ring_3()
    threaded.cpu.resume()
    values = [count(threaded.cpu) for _ in range(200)]
    assert values == sorted(values)
    wait_until(lambda: count(threaded.cpu) > values[-1], "a higher count")
    with pytest.raises(ZeroDivisionError):
        threaded.cpu.call(lambda vcpu: 1 // 0)
    threaded.cpu.request_stop()
    assert threaded.cpu.wait_stopped()
    assert count(threaded.cpu) == count(threaded.cpu)


def test_calls_and_stops_from_many_threads(threaded):
    threaded.spin_in_ring_3()
    threaded.cpu.resume()
    results = []

    def work():
        results.extend(count(threaded.cpu) for _ in range(50))

    workers = [threading.Thread(target=work) for _ in range(4)]
    for worker in workers:
        worker.start()
    for _ in range(50):
        threaded.cpu.request_stop()
        assert threaded.cpu.wait_stopped()
        threaded.cpu.resume()
    for worker in workers:
        worker.join(DEADLINE_S)
        assert not worker.is_alive()
    assert len(results) == 200


def watched(vcpu):
    """An event that is set while the vCPU is in KVM_RUN."""
    real, inside = vcpu.run, threading.Event()

    def run():
        inside.set()
        try:
            return real()
        finally:
            inside.clear()

    vcpu.run = run
    return inside


def test_resumed_before_its_thread_got_to_wait(machine):
    """As a new image may do it on a loaded host. The next stop would not kick it, and reading
    its registers would wait for ever."""
    late = threading.Event()

    class Late(Cpu):
        def _wait(self):
            assert late.wait(DEADLINE_S)
            super()._wait()

    machine.spin_in_ring_3()
    inside = watched(machine.vcpu)
    cpu = Late(machine.vcpu, Bus("I/O", 1 << 16), Bus("memory", 1 << 64), Events())
    cpu.start()
    cpu.resume()
    late.set()
    assert inside.wait(DEADLINE_S)
    cpu.request_stop()
    assert cpu.wait_stopped()
    assert not inside.is_set()
    cpu.close()


def pause_in(cpu, name):
    """Have the vCPU's thread wait on its way into the method ``name``; two events: that it is
    there, and to let it go on."""
    there, go_on = threading.Event(), threading.Event()

    def trace(frame, event, _argument):
        if frame.f_code.co_name == name:
            sys.settrace(None)
            there.set()
            assert go_on.wait(DEADLINE_S)

    cpu.call(lambda vcpu: sys.settrace(trace))
    return there, go_on


def test_resumed_on_the_way_to_the_waiting_place(threaded):
    """A vCPU in the guest is never taken for stopped: its state would be read while it runs."""
    cpu, vcpu = threaded.cpu, threaded.vcpu
    threaded.spin_in_ring_3()
    inside = watched(vcpu)
    assert cpu.wait_stopped()
    there, go_on = pause_in(cpu, "_wait")
    assert there.wait(DEADLINE_S)
    cpu.resume()
    go_on.set()
    assert inside.wait(DEADLINE_S)
    cpu.request_stop()
    assert cpu.wait_stopped()
    assert not inside.is_set()


def test_kick_that_comes_after_its_work_was_done(threaded):
    """The flag that it leaves must not keep the vCPU out of the guest for good."""
    cpu, vcpu = threaded.cpu, threaded.vcpu
    threaded.spin_in_ring_3()
    cpu.resume()
    count(cpu)
    kick = cpu._kick

    def late():
        signal.pthread_kill(cpu._ident, signal.SIGURG)
        wait_until(lambda: not cpu._work, "the work")
        kick()

    cpu._kick = late
    count(cpu)
    cpu._kick = kick
    wait_until(lambda: not vcpu._run.immediate_exit, "the vCPU in the guest")


def test_stop_while_it_is_halted(threaded):
    threaded.load(guests.HALT)
    for _ in range(100):
        threaded.cpu.resume()
        threaded.cpu.request_stop()
        assert threaded.cpu.wait_stopped()


def test_device_that_fails_stops_the_vcpu_with_a_verdict(machine):
    class Broken(Bus):
        def write(self, address, size, value):
            raise RuntimeError("a bug")

    events = Events()
    cpu = Cpu(machine.vcpu, Broken("I/O", 1 << 16), Bus("memory", 1 << 64), events)
    cpu.start()
    machine.load(b"\xba\x34\x12\xee")
    cpu.resume()
    assert events.happened.wait(DEADLINE_S)
    assert "a bug" in events.errors[0]
    assert cpu.wait_stopped()
    # Its registers can be looked at, and after a reset it runs again.
    assert cpu.call(lambda vcpu: vcpu.get_regs().rdx) == 0x1234
    machine.load(guests.HALT)
    cpu.resume()
    cpu.request_stop()
    assert cpu.wait_stopped()
    cpu.close()
    assert len(events.errors) == 1


def test_guest_runs_on_if_one_vcpu_cannot_be_stopped(monkeypatch):
    monkeypatch.setattr(cpu_module, "STOP_TIMEOUT_S", 0.05)
    machine = Machine(cpus=2)
    whole = WholeMachine(MachineConfig(), EventLoop(), FdStore())
    hanging, go_on = threading.Event(), threading.Event()

    class Hanging(Bus):
        def write(self, address, size, value):
            hanging.set()
            assert go_on.wait(DEADLINE_S)

    ports = Hanging("I/O", 1 << 16)
    second, first = (Cpu(vcpu, ports, ports, whole) for vcpu in machine.vcpus)
    whole.cpus = [first, second]
    machine.load(b"\xba\x34\x12\xee\xeb\xfd")  # mov $0x1234, %dx; 1: out %al, %dx; jmp 1b
    for cpu in whole.cpus:
        cpu.start()
    whole.resume_cpus()
    assert hanging.wait(DEADLINE_S)
    with pytest.raises(InternalError, match="does not leave KVM_RUN"):
        whole.pause_cpus()
    assert not first._stop
    with pytest.raises(InternalError, match="vCPU 0 does not leave"):
        count(second)
    go_on.set()
    hanging.clear()
    assert hanging.wait(DEADLINE_S)
    monkeypatch.undo()
    whole.pause_cpus()
    whole.close()
    machine.close()


def test_no_vcpu_goes_while_another_may_still_kick_it():
    """The guest may ask for its end on one vCPU while the machine is closed."""
    machine = Machine(cpus=2)
    whole = WholeMachine(MachineConfig(), EventLoop(), FdStore())
    gone, reached = [], threading.Event()

    class Exit(Bus):
        def write(self, address, size, value):
            reached.set()
            wait_until(lambda: second._quit or first.vcpu.fd < 0, "the end")
            gone.append(first.vcpu.fd < 0)

    ports = Exit("I/O", 1 << 16)
    first, second = (Cpu(vcpu, ports, ports, whole) for vcpu in reversed(machine.vcpus))
    whole.cpus = [first, second]
    for cpu in whole.cpus:
        cpu.start()
    machine.load(b"\xba\x34\x12\xee\xf4")  # mov $0x1234, %dx; out %al, %dx; hlt
    second.resume()
    assert reached.wait(DEADLINE_S)
    whole.close()
    assert gone == [False]
    assert [vcpu.fd for vcpu in machine.vcpus] == [-1, -1]
    machine.close()


def test_descriptors_are_close_on_exec(machine):
    for fd in (machine.system.fd, machine.vm.fd, machine.vcpu.fd):
        assert not os.get_inheritable(fd)
