"""Clocks in a state: of this boot of the host, of another one, and of an enemy."""

import time

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from pyvmm.errors import KvmError, MigrationError, VmStateError
from pyvmm.vmstate.cursor import Cursor
from pyvmm.vmstate.fields import Record
from pyvmm.x86 import irqchip, vcpu_state

WORDS = st.integers(0, (1 << 64) - 1)


def boottime():
    return time.clock_gettime_ns(time.CLOCK_BOOTTIME)


class Vm:
    """A kvmclock, which takes what the ioctl takes."""

    def __init__(self):
        self.set = []
        self.ahead = 0

    def set_clock(self, clock_ns):
        assert 0 <= clock_ns < 1 << 64
        self.set.append(clock_ns)
        self.ahead = clock_ns - boottime()

    def get_clock(self):
        return (boottime() + self.ahead) % (1 << 64)


def load(clock, saved):
    """What a VM's kvmclock was set to in the end, from the bytes of a state."""
    out = bytearray()
    irqchip.KVMCLOCK.save(out, Record(clock=clock, boottime=saved))
    vm = Vm()
    irqchip.load_clock(vm, irqchip.KVMCLOCK.load(Cursor(bytes(out)), 1))
    return vm.set[-1]


@given(WORDS, WORDS)
@example(0, 1)
@example((1 << 62) - 1, (1 << 62) - 1)
@example(5, boottime() + (1 << 50))
def test_any_clock_is_taken_or_refused(clock, saved):
    try:
        shown = load(clock, saved)
    except VmStateError:
        assert max(clock, saved) > irqchip.MAX_CLOCK_NS
        return
    # What a call takes that the host interrupts is made up for.
    assert clock - 10**9 <= shown <= clock + boottime() + 10**9 < 1 << 63


def test_on_the_same_boot_it_goes_on_meanwhile():
    hours = 7 * 3600 * 10**9
    gone = boottime() // 2
    shown = load(hours, boottime() - gone)
    assert hours + gone <= shown < hours + gone + 10**10


def test_of_a_boot_that_was_longer_it_goes_on_from_what_it_showed():
    hour = 3600 * 10**9
    assert load(7 * hour, boottime() + hour) == 7 * hour
    state = Record(clock=7 * hour, boottime=boottime() - 1)
    irqchip.forget_boottime(state)
    vm = Vm()
    irqchip.load_clock(vm, state)
    assert vm.set == [7 * hour]


class Vcpu:
    """A TSC."""

    index = 0

    def __init__(self, tsc=None, offset=None, khz=2_000_000, refuses=False):
        self.tsc, self.offset, self.khz, self.refuses = tsc, offset, khz, refuses

    def get_msrs(self, indices):
        return {} if self.tsc is None else {0x10: self.tsc}

    def get_tsc_offset(self):
        return self.offset

    def get_tsc_khz(self):
        return self.khz

    def set_tsc_khz(self, khz):
        if self.refuses:
            raise KvmError("KVM_SET_TSC_KHZ", 22)
        self.khz = khz


def tsc_state(tsc, offset):
    msrs = [] if tsc is None else [0x10, tsc]
    return Record(
        msrs=msrs, has_tsc_offset=offset is not None, tsc_offset=offset or 0, tsc_khz=2_000_000
    )


@given(WORDS, WORDS, WORDS, WORDS, WORDS)
def test_tscs_go_on_from_what_they_showed(host_then, host_now, first, second, fresh):
    """By the same step, so that they stay as far from each other as they were."""
    limit = 1 << 64
    states = [tsc_state((host_then + each) % limit, each) for each in (first, second)]
    states[1].msrs[1] += 12345  # it was read later
    vcpu_state.move_tsc_offsets(Vcpu((host_now + fresh) % limit, fresh), states)
    shown = [(host_now + state.tsc_offset) % limit for state in states]
    assert shown == [(host_then + first) % limit, (host_then + second) % limit]
    assert all(0 <= state.tsc_offset < limit for state in states)


@pytest.mark.parametrize(
    ("tsc", "offset", "now", "present"),
    [(None, 5, 7, 9), (3, None, 7, 9), (3, 5, None, 9), (3, 5, 7, None)],
)
def test_without_an_offset_there_is_nothing_to_move(tsc, offset, now, present):
    state = tsc_state(tsc, offset)
    vcpu_state.move_tsc_offsets(Vcpu(now, present), [state])
    assert state.tsc_offset == (offset or 0)


@pytest.mark.parametrize(
    ("khz", "can_scale", "becomes"),
    [
        (2_000_000, False, 2_000_000),
        (2_000_499, False, 2_000_000),
        (1_999_501, False, 2_000_000),
        (0, False, 2_000_000),
        (2_600_000, True, 2_600_000),
    ],
)
def test_frequency(khz, can_scale, becomes):
    vcpu = Vcpu()
    vcpu_state.set_tsc_frequency(vcpu, Record(tsc_khz=khz), can_scale)
    assert vcpu.khz == becomes


@pytest.mark.parametrize(("can_scale", "why"), [(False, "it cannot be scaled"), (True, "KVM_SET")])
def test_frequency_that_cannot_be_had(can_scale, why):
    with pytest.raises(MigrationError, match=f"^vCPU 0: its TSC counts 2600000 kHz, .*{why}"):
        vcpu_state.set_tsc_frequency(Vcpu(refuses=True), Record(tsc_khz=2_600_000), can_scale)
