"""What a vCPU's state has in it, and what giving it to another vCPU does besides."""

import pytest
from harness.kvm_machine import RAM, Machine

from pyvmm.vmstate.fields import Record
from pyvmm.x86 import msrs, vcpu_state

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
    known = {msr.index for msr in state.msrs}
    assert not known & {0x11, 0x4B564D00, 0x40000000, 0x480}
    more = {0x11: 0x2000, 0x4B564D00: 0x2100, 0x4B564D07: 1, 0x40000000: 7, 0x480: 1 << 50}
    state.msrs += [Record(index=index, data=data) for index, data in more.items()]
    other.ram[:] = PATTERN
    vcpu_state.write(other.vcpu, state)
    assert touched(other) == set()


def test_reset_takes_all_of_them_back(machine):
    start = vcpu_state.power_on(machine.vcpu)
    machine.vcpu.set_msrs({index: at | 1 for index, at in PAGES.items()})
    machine.ram[:] = PATTERN
    vcpu_state.reset(machine.vcpu, start)
    assert machine.vcpu.get_msrs(PAGES) == dict.fromkeys(PAGES, 0)
    assert touched(machine) == set()


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
    machine.vcpu.state_msrs = msrs.carried([])
    carry(machine, other)
    assert other.vcpu.get_msrs(values) == values


def test_long_lists_are_read_and_written_in_parts(machine):
    many = {0x400 + bank: bank << 8 for bank in range(1, 128) if bank % 4 in (2, 3)}
    wanted = [*many, 0xDEAD, *many, *([0x277] * 600), 0xBEEF, *many]
    machine.vcpu.set_msrs(many)
    found = machine.vcpu.get_msrs(wanted)
    assert found == many | machine.vcpu.get_msrs([0x277])
