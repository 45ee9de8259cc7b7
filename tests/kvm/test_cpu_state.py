"""What a vCPU's state has in it, and what giving it to another vCPU does besides."""

import re
from pathlib import Path

import pytest
from harness import needs
from harness.kvm_machine import RAM, Machine

from pyvmm._native import ffi, lib
from pyvmm.errors import KvmError, MigrationError
from pyvmm.kvm import exits
from pyvmm.kvm import vcpu as vcpu_module
from pyvmm.kvm.vcpu import REG_GUEST_SSP, MsrBlock
from pyvmm.vmstate.cursor import Cursor
from pyvmm.x86 import msrs, vcpu_state
from pyvmm.x86.cpu_limits import SHSTK

ROOT = Path(__file__).parents[2]
CODE = 0x1000
PATTERN = b"\x5a" * RAM
#: KVM's registers that hold the address of guest memory, and a page for each.
PAGES = {
    index: 0x2000 + 0x100 * number
    for number, index in enumerate(
        (0x11, 0x12, 0x4B564D00, 0x4B564D01, 0x4B564D02, 0x4B564D03, 0x4B564D04)
    )
}


@pytest.fixture
def other():
    machine = Machine()
    yield machine
    machine.close()


def touched(machine):
    """The pages that KVM has written to when the machine, whose RAM is a pattern, has run."""
    machine.load(b"\xe6\x80\xe6\x80", CODE)  # out %al, $0x80, twice
    machine.vcpu.run()
    machine.vcpu.run()
    return {
        at
        for at in range(0, RAM, 0x100)
        if machine.ram[at : at + 0x100] != PATTERN[:0x100] and at != CODE
    }


def carry(machine, other):
    """Give the state of a vCPU to one of a machine whose RAM is a pattern."""
    other.ram[:] = PATTERN
    vcpu_state.write(other.vcpu, vcpu_state.read(machine.vcpu))


def through_a_stream(state):
    """A state as another image gets it, and its bytes."""
    out = bytearray()
    vcpu_state.VCPU.save(out, state)
    return vcpu_state.VCPU.load(Cursor(bytes(out)), vcpu_state.VCPU.version), out


def test_memory_that_the_guest_gave_back_is_left_alone(machine, other):
    # What is on is taken back by the same address without bit 0; the time was asked for once.
    assert machine.vcpu.set_msrs({index: at | 1 for index, at in PAGES.items()}) == []
    assert machine.vcpu.set_msrs(PAGES) == []
    carry(machine, other)
    assert touched(other) == set()


def test_memory_that_kvm_was_given_is_used_at_the_same_address(machine, other):
    system_time, steal_time = 0x4B564D01, 0x4B564D03
    given = {index: PAGES[index] | 1 for index in (system_time, steal_time)}
    machine.vcpu.set_msrs(given)
    carry(machine, other)
    assert touched(other) == {PAGES[system_time], PAGES[steal_time]}
    # struct pvclock_vcpu_time_info: an even version, the TSC, and how to convert it.
    at = PAGES[system_time]
    version = int.from_bytes(other.ram[at : at + 4], "little")
    assert version % 2 == 0
    assert other.ram[at + 8 : at + 16] != PATTERN[:8]


def test_state_of_an_older_image_does_no_harm_either(machine, other):
    state = vcpu_state.read(machine.vcpu)
    known = set(state.msrs[::2])
    assert not known & {0x11, 0x4B564D00, 0x40000000, 0x480}
    more = {0x11: 0x2000, 0x4B564D00: 0x2100, 0x4B564D07: 1, 0x40000000: 7, 0x480: 1 << 50}
    state.msrs += tuple(word for pair in more.items() for word in pair)
    other.ram[:] = PATTERN
    vcpu_state.write(other.vcpu, state)
    assert touched(other) == set()


def test_reset_takes_all_of_them_back(machine):
    start = vcpu_state.power_on([machine.vcpu])[0]
    machine.vcpu.set_msrs({index: at | 1 for index, at in PAGES.items()})
    machine.ram[:] = PATTERN
    vcpu_state.reset(machine.vcpu, start)
    assert machine.vcpu.get_msrs(PAGES) == dict.fromkeys(PAGES, 0)
    assert touched(machine) == set()


def test_all_application_processors_are_reset_to_what_the_second_was():
    """But for the number, so that not each of them has to be read."""
    machine = Machine(cpus=5)
    try:
        states = vcpu_state.power_on(machine.vcpus)
        apart = [vcpu_state.power_on([vcpu])[0] for vcpu in machine.vcpus]
        assert [through_a_stream(state)[1] for state in states] == [
            through_a_stream(state)[1] for state in apart
        ]
        assert len({state.lapic for state in states}) == 5
    finally:
        machine.close()


def test_register_that_a_vcpu_lacks_does_not_cost_the_others(machine):
    block = MsrBlock([0x277, 0xDEAD, 0x2FF])
    assert dict(machine.vcpu.get_msr_block(block)) == machine.vcpu.get_msrs([0x277, 0x2FF])
    many = MsrBlock([*range(0x400, 0x480)] * 3)
    found = list(machine.vcpu.get_msr_block(many))
    assert [index for index, _ in found] == many.indices
    assert dict(found) == machine.vcpu.get_msrs(many.indices)


def test_all_that_a_guest_can_write_comes_over(machine, other):
    """With KVM's list as short as it can be: what is on it differs from release to release."""
    values = {
        0x401: 1 << 63,
        0x402: 0x1234,
        0x403: 0x5678,
        0x47F: 0x9ABC,
        0x1D9: 1,
        0xC0010114: 0x10,
        0xC0010140: 5,
        0xC0010141: 6,
        0xC0011029: 2,
    }
    machine.vcpu.set_msrs(values)
    # Of AMD's not all are there on each host.
    values = {i: data for i, data in machine.vcpu.get_msrs(values).items() if data}
    assert {0x401, 0x402, 0x403, 0x47F} <= values.keys()
    machine.vcpu.state_msrs = MsrBlock(list(machine.vcpu.get_msrs(msrs.carried([]))))
    carry(machine, other)
    assert other.vcpu.get_msrs(values) == values


def test_long_lists_are_read_and_written_in_parts(machine):
    many = {0x400 + bank: bank << 8 for bank in range(1, 128) if bank % 4 in (2, 3)}
    wanted = [*many, 0xDEAD, *many, *([0x277] * 600), 0xBEEF, *many]
    machine.vcpu.set_msrs(many)
    found = machine.vcpu.get_msrs(wanted)
    assert found == many | machine.vcpu.get_msrs([0x277])


# ---- what is neither register nor memory -------------------------------------------------------

#: The flags that images of old know.
OLD_FLAGS = (
    lib.KVM_VCPUEVENT_VALID_NMI_PENDING
    | lib.KVM_VCPUEVENT_VALID_SIPI_VECTOR
    | lib.KVM_VCPUEVENT_VALID_SHADOW
    | lib.KVM_VCPUEVENT_VALID_SMM
)


def wait_with(machine, **waiting):
    """Have an event of the vCPU wait: ``triple_fault`` or ``exception`` (its vector)."""
    events = machine.vcpu.get_vcpu_events()
    events.flags |= machine.vm.event_flags
    events.triple_fault.pending = waiting.get("triple_fault", False)
    if "exception" in waiting:
        events.exception.pending, events.exception.nr = 1, waiting["exception"]
    machine.vcpu.set_vcpu_events(events)


def test_triple_fault_that_waits_comes_over(machine, other):
    machine.load(b"\xe6\x80", CODE)
    wait_with(machine, triple_fault=True)
    state, _ = through_a_stream(vcpu_state.read(machine.vcpu))
    assert not state.events.flags & ~OLD_FLAGS
    other.load(b"\xe6\x80", CODE)
    vcpu_state.write(other.vcpu, state)
    assert isinstance(other.vcpu.run(), exits.Shutdown)


def test_reset_forgets_a_triple_fault(machine):
    start = vcpu_state.power_on([machine.vcpu])[0]
    wait_with(machine, triple_fault=True)
    vcpu_state.reset(machine.vcpu, start)
    machine.load(b"\xe6\x80", CODE)
    assert isinstance(machine.vcpu.run(), exits.Io)


def test_exception_that_waits_is_none_that_is_delivered(machine, other):
    wait_with(machine, exception=6)
    state, _ = through_a_stream(vcpu_state.read(machine.vcpu))
    # As older images say it, which take it for one that is being delivered.
    assert not state.events.flags & ~OLD_FLAGS
    assert (state.events.exception.injected, state.events.exception.pending) == (1, 1)
    vcpu_state.write(other.vcpu, state)
    found = other.vcpu.get_vcpu_events().exception
    assert (found.injected, found.pending, found.nr) == (0, 1, 6)


# PAE paging: four registers, each for a gigabyte.
PDPT, PD, OTHER_PD = 0x20000, 0x21000, 0x22000
THIRD = 2 << 30  # addresses of the third gigabyte
# invlpg 0x80300000; mov 0x80300000, %eax; out %al, $0x80
READ_THIRD = b"\x0f\x01\x3d\x00\x00\x30\x80\xa1\x00\x00\x30\x80\xe6\x80"


def enter_pae(machine):
    """Let the vCPU read the third gigabyte, which is RAM from 2 MiB on, with PAE paging."""
    for at, entry in (
        (PDPT, PD | 1),
        (PD, 0x83),
        (PDPT + 16, OTHER_PD | 1),
        (OTHER_PD + 8, 0x200083),  # its second 2 MiB
    ):
        machine.ram[at : at + 8] = entry.to_bytes(8, "little")
    machine.ram[0x300000] = 0x77
    machine.ram[CODE : CODE + 2 * len(READ_THIRD)] = READ_THIRD * 2
    sregs = machine.vcpu.get_sregs()
    for segment, kind, selector in ((sregs.cs, 11, 8), (sregs.ds, 3, 16), (sregs.ss, 3, 16)):
        segment.base, segment.limit, segment.selector = 0, 0xFFFFFFFF, selector
        segment.type, segment.present, segment.dpl, segment.s = kind, 1, 0, 1
        segment.g, segment.db, segment.l = 1, 1, 0
    sregs.idt.limit = 0  # any exception is the end
    sregs.cr0, sregs.cr3, sregs.cr4, sregs.efer = 0x80050033, PDPT, 0x20, 0
    machine.vcpu.set_sregs(sregs)
    regs = machine.vcpu.get_regs()
    regs.rip, regs.rflags, regs.rsp = CODE, 2, 0x9000
    machine.vcpu.set_regs(regs)
    exit = machine.vcpu.run()
    if isinstance(exit, exits.Shutdown):
        needs.another_host("this KVM has no paging outside of long mode")
    assert exit.data[0] == 0x77


def test_registers_of_pae_paging_come_over(machine, other):
    """What the CPU has read, not what memory says by now: a guest may change it as it likes, and
    load CR3 when it likes."""
    enter_pae(other)
    other.ram[PDPT + 16 : PDPT + 24] = bytes(8)
    if isinstance(other.vcpu.run(), exits.Shutdown):
        needs.another_host("this CPU reads them from memory whenever it needs them, as AMD's do")
    enter_pae(machine)
    assert machine.vcpu.get_pdptrs() == [PD | 1, 0, OTHER_PD | 1, 0]
    machine.ram[PDPT + 16 : PDPT + 24] = bytes(8)
    state, data = through_a_stream(vcpu_state.read(machine.vcpu))
    assert data.count(b"kvm-vcpu/pdptrs") == 1
    new = Machine()
    new.ram[:] = machine.ram[:]
    vcpu_state.write(new.vcpu, state)
    exit = new.vcpu.run()
    new.close()
    assert isinstance(exit, exits.Io)
    assert exit.data[0] == 0x77


def test_state_of_an_older_image_reads_them_from_memory(machine, other):
    enter_pae(machine)
    state = vcpu_state.read(machine.vcpu)
    del state.pdptrs
    state, data = through_a_stream(state)
    assert b"pdptrs" not in data
    other.ram[:] = machine.ram[:]
    vcpu_state.write(other.vcpu, state)
    assert other.vcpu.run().data[0] == 0x77


def test_registers_of_pae_paging_are_asked_for_and_given_back(machine, other, monkeypatch):
    """What KVM is told, also where it has no paging outside of long mode."""
    pdptrs = [0x1001, 0, 0x7FFF_FFFF_2001, 0]
    real = vcpu_module.ioctl
    told = []

    def ioctl(fd, name, argument, detail=""):
        if name == "KVM_SET_SREGS2":
            told.append((argument.cr3, argument.ds.base, argument.flags, list(argument.pdptrs)))
            return 0
        if name == "KVM_GET_SREGS2":
            argument.flags, argument.pdptrs = lib.KVM_SREGS2_FLAGS_PDPTRS_VALID, pdptrs
            return 0
        result = real(fd, name, argument, detail)
        if name == "KVM_GET_SREGS":
            argument.cr0, argument.cr4, argument.efer = 0x80000011, 0x20, 0
            argument.cr3, argument.ds.base = 0x20000, 0x1234
        return result

    monkeypatch.setattr(vcpu_module, "ioctl", ioctl)
    state, data = through_a_stream(vcpu_state.read(machine.vcpu))
    assert data.count(b"kvm-vcpu/pdptrs") == 1
    vcpu_state.write(other.vcpu, state)
    assert told == [(0x20000, 0x1234, 1, pdptrs)]


def test_registers_of_pae_paging_without_it_are_refused(machine, other):
    machine.spin_in_ring_3()
    state = vcpu_state.read(machine.vcpu)
    assert not hasattr(state, "pdptrs")
    state.pdptrs = [1, 0, 0, 0]
    with pytest.raises(MigrationError, match=r"vCPU 0 .*KVM_SET_SREGS2"):
        vcpu_state.write(other.vcpu, state)


def test_one_register(machine):
    page_attributes = 0x2030_0002_0000_0000 | 0x277  # as an MSR
    try:
        value = machine.vcpu.get_one_reg(page_attributes)
    except KvmError:
        needs.another_host("this host's KVM lacks KVM_GET_ONE_REG, which Linux has since 6.18")
    assert value == machine.vcpu.get_msrs([0x277])[0x277]
    machine.vcpu.set_one_reg(page_attributes, 0x0007_0406_0007_0406)
    assert machine.vcpu.get_msrs([0x277]) == {0x277: 0x0007_0406_0007_0406}


def test_shadow_stack_pointer_comes_over(machine, other, monkeypatch):
    """Where it is offered; it is not on every host, so this one is made to say so."""
    given = {}

    def offers(vcpu, pointer):
        real = vcpu.get_cpuid2

        def get_cpuid2():
            found = real()
            for entry in (found.entries[i] for i in range(found.nent)):
                if entry.function == 7:
                    entry.ecx |= SHSTK
            return found

        monkeypatch.setattr(vcpu, "get_cpuid2", get_cpuid2)
        monkeypatch.setattr(vcpu, "get_one_reg", {REG_GUEST_SSP: pointer}.__getitem__)
        monkeypatch.setattr(vcpu, "set_one_reg", given.__setitem__)

    offers(machine.vcpu, 0)
    start = vcpu_state.power_on([machine.vcpu])[0]
    assert b"kvm-vcpu/ssp" not in through_a_stream(vcpu_state.read(machine.vcpu))[1]
    offers(machine.vcpu, 0x7FFF_FFFF_F000)
    offers(other.vcpu, 0)
    vcpu_state.write(other.vcpu, through_a_stream(vcpu_state.read(machine.vcpu))[0])
    assert given == {REG_GUEST_SSP: 0x7FFF_FFFF_F000}
    vcpu_state.reset(other.vcpu, start)
    assert given == {REG_GUEST_SSP: 0}


def test_a_vcpu_without_a_shadow_stack_refuses_its_pointer(machine):
    state = vcpu_state.read(machine.vcpu)
    if hasattr(state, "ssp"):
        needs.another_host("this host's KVM offers shadow stacks")
    state.ssp = 8
    with pytest.raises(MigrationError, match=r"vCPU 0 .*KVM_SET_ONE_REG"):
        vcpu_state.write(machine.vcpu, state)


def test_ordinary_machine_has_no_subsections(machine):
    """Or an image that does not know them could not take it over."""
    machine.spin_in_ring_3()
    _, data = through_a_stream(vcpu_state.read(machine.vcpu))
    assert b"kvm-vcpu/" not in data
    assert ffi.sizeof("struct kvm_sregs2") > ffi.sizeof("struct kvm_sregs")


def test_somebody_has_looked_at_every_register_that_kvm_lists(machine):
    """A KVM that lists more than docs/cpu-state.md knows: what does it do when it is written?"""
    rows = (ROOT / "docs" / "cpu-state.md").read_text().partition("## Model-specific")[2]
    known = set()
    for numbers in re.findall(r"^\|[^|]*\| (0x[0-9a-fx, -]+) \|", rows, re.MULTILINE):
        for part in numbers.split(","):
            first, _, last = part.strip().partition("-")
            known.update(range(int(first, 16), int(last or first, 16) + 1))
    assert {hex(index) for index in set(machine.vcpu.listed_msrs) - known} == set()
