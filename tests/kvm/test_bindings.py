"""The KVM bindings on a machine made by hand: every get/set pair."""

import os
import signal
import subprocess
import sys

import pytest
from harness import wait_until
from harness.kvm_machine import TSC_AND_TIMER, Machine, same

from pyvmm.errors import KvmError
from pyvmm.kvm.stats import VmStats
from pyvmm.kvm.vm import Vm
from pyvmm.x86 import cpuid, irqchip, vcpu_state

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
            Vm.create(machine.system).close()
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
    offered = cpuid.host_cpuid(machine.system, cpuid.Topology(1, 1, 1), {})
    entries = [offered.entries[index] for index in range(offered.nent)]
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
    start = vcpu_state.power_on([machine.vcpu])[0]
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
        "    system = System.open(); vm = Vm.create(system)\n"
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


def test_descriptors_are_close_on_exec(machine):
    for fd in (machine.system.fd, machine.vm.fd, machine.vcpu.fd):
        assert not os.get_inheritable(fd)


def test_counters_of_a_vm(machine):
    stats = VmStats(machine.vm.fd)
    try:
        assert stats.read("pages_4k") == 0
        # In ring 3: KVM's emulator, which runs ring 0 on some hosts, maps no page.
        machine.spin_in_ring_3()
        before = signal.signal(signal.SIGALRM, lambda *_: None)
        signal.setitimer(signal.ITIMER_REAL, 0.05, 0.05)
        try:
            machine.vcpu.run()
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
        assert stats.read("pages_4k") > 0
        assert stats.read("no such counter") == 0
    finally:
        stats.close()
