import calendar
import datetime
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyvmm.devices.rtc import HOURS_ALARM, MINUTES_ALARM, REG_A, REG_B, REG_C, SECONDS_ALARM, Rtc
from pyvmm.errors import VmStateError
from pyvmm.testing.fake_irq import FakeIrq
from pyvmm.vmstate.cursor import Cursor
from pyvmm.vmstate.fields import Record

# Thursday 2026-11-19 21:58:07.25 UTC
START = calendar.timegm((2026, 11, 19, 21, 58, 7)) + 0.25
TIME = {"s": 0, "m": 2, "h": 4, "wday": 6, "day": 7, "month": 8, "year": 9, "century": 0x32}


class Clock:
    """A host clock that stands until it is moved."""

    def __init__(self, now=START):
        self.now = now

    def __call__(self):
        return self.now


class Loop:
    """A main loop whose turns and timers come when a test wants them."""

    def __init__(self):
        self.calls = []
        self.timers = []

    def call_soon(self, callback):
        self.calls.append(callback)

    def call_later(self, delay_s, callback):
        self.timers.append((delay_s, callback))

    def settle(self):
        while self.calls:
            self.calls.pop(0)()

    def fire(self):
        """Let the only timer come; its delay."""
        ((delay_s, callback),) = self.timers
        del self.timers[:]
        callback()
        return delay_s


def make(clock=time.time):
    rtc = Rtc(FakeIrq(8), Loop(), clock)
    rtc.irq, rtc.loop = rtc._irq, rtc._loop
    return rtc


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def rtc(clock):
    return make(clock)


def read(rtc, index):
    with rtc.lock:
        rtc.on_write(0, 1, index)
        value = rtc.on_read(1, 1)
    rtc.loop.settle()
    return value


def write(rtc, index, value):
    with rtc.lock:
        rtc.on_write(0, 1, index)
        rtc.on_write(1, 1, value)
    rtc.loop.settle()


def shown(rtc):
    return {name: read(rtc, index) for name, index in TIME.items()}


def test_time_after_power_on_is_bcd_and_24_hours(rtc):
    assert shown(rtc) == {
        "s": 0x07,
        "m": 0x58,
        "h": 0x21,
        "wday": 5,
        "day": 0x19,
        "month": 0x11,
        "year": 0x26,
        "century": 0x20,
    }


def test_host_clock_is_the_default():
    rtc = make()
    before = time.time()
    write(rtc, REG_B, 0x06)
    now = shown(rtc)
    after = time.time()
    seconds = calendar.timegm(
        (
            now["century"] * 100 + now["year"],
            now["month"],
            now["day"],
            now["h"],
            now["m"],
            now["s"],
        )
    )
    assert before - 2 <= seconds <= after + 1


@pytest.mark.parametrize(
    ("mode", "hour", "expected"),
    [
        (0x02, 21, 0x21),
        (0x06, 21, 21),
        (0x00, 21, 0x89),
        (0x04, 21, 0x89),
        (0x00, 23, 0x91),
        (0x04, 23, 0x8B),
        (0x00, 0, 0x12),
        (0x00, 12, 0x92),
        (0x00, 11, 0x11),
    ],
)
def test_formats_of_the_hour(rtc, clock, mode, hour, expected):
    clock.now = calendar.timegm((2026, 11, 19, hour, 0, 0))
    write(rtc, REG_B, mode)
    assert read(rtc, TIME["h"]) == expected
    # Written back, it is the same hour.
    write(rtc, TIME["h"], expected)
    write(rtc, REG_B, 0x06)
    assert read(rtc, TIME["h"]) == hour


def test_clock_runs(rtc, clock):
    clock.now += 115
    assert (read(rtc, TIME["h"]), read(rtc, TIME["m"]), read(rtc, TIME["s"])) == (0x22, 0, 2)


def test_setting_with_the_set_bit(rtc, clock):
    write(rtc, REG_B, 0x82)
    new = {"s": 0, "m": 0x59, "h": 0x23, "day": 0x28, "month": 2, "year": 0x24, "century": 0x20}
    for name, value in new.items():
        write(rtc, TIME[name], value)
    clock.now += 100
    assert {name: read(rtc, TIME[name]) for name in new} == new
    write(rtc, REG_B, 0x02)
    clock.now += 60
    expected = {"s": 0, "m": 0, "h": 0, "day": 0x29, "wday": 5}
    assert {name: read(rtc, TIME[name]) for name in expected} == expected


def test_set_bit_holds_the_time_that_it_found(rtc, clock):
    write(rtc, REG_B, 0x82)
    clock.now += 30
    assert read(rtc, TIME["s"]) == 0x07
    write(rtc, REG_B, 0x02)
    clock.now += 1
    assert read(rtc, TIME["s"]) == 0x08


def test_setting_one_register_at_once(rtc, clock):
    write(rtc, TIME["h"], 0x03)
    clock.now += 1
    assert (read(rtc, TIME["h"]), read(rtc, TIME["m"]), read(rtc, TIME["s"])) == (3, 0x58, 8)


def test_changing_the_format_keeps_the_time(rtc):
    for mode in (0x06, 0x00, 0x04, 0x02):
        write(rtc, REG_B, mode)
    assert read(rtc, TIME["h"]) == 0x21
    assert rtc.offset == 0


def test_update_in_progress_just_before_the_second(rtc, clock):
    second = int(START) + 1
    for before, up in ((0.9, 0), (0.0003, 0), (0.0002, 0x80), (0.00001, 0x80), (0, 0)):
        clock.now = second - before
        assert read(rtc, REG_A) == 0x26 | up
    clock.now = second - 0.0002
    write(rtc, REG_B, 0x82)
    assert read(rtc, REG_A) == 0x26


def test_status_registers(rtc):
    write(rtc, REG_A, 0xFF)
    assert read(rtc, REG_A) == 0x7F
    for index, value in ((12, 0), (13, 0x80)):
        write(rtc, index, 0x55)
        assert read(rtc, index) == value
    write(rtc, REG_B, 0x7E)
    rtc.reset()
    assert read(rtc, REG_B) == 0x06


def test_index_port(rtc):
    assert rtc.on_read(0, 1) == 0xFF
    write(rtc, 0x80 | 0x0F, 0x5A)
    assert read(rtc, 0x0F) == 0x5A


def test_ram_keeps_what_is_written(rtc):
    free = [index for index in range(14, 128) if index != TIME["century"]]
    for index in free:
        write(rtc, index, index ^ 0xFF)
    rtc.reset()
    assert [read(rtc, index) for index in free] == [index ^ 0xFF for index in free]


@pytest.mark.parametrize(
    ("low", "high", "base", "extended", "above_16m", "above_4g"),
    [
        (512 << 10, 0, 512, 0, 0, 0),
        (16 << 20, 0, 640, 15 << 10, 0, 0),
        (256 << 20, 0, 640, 0xFFFF, 240 << 4, 0),
        (3 << 30, 5 << 30, 640, 0xFFFF, (3072 - 16) << 4, 5 << 14),
        (4 << 30, 1 << 44, 640, 0xFFFF, 65280, 0xFFFFFF),
    ],
)
def test_memory_size(rtc, low, high, base, extended, above_16m, above_4g):
    rtc.set_memory_size(low, high)

    def number(start, count):
        return sum(read(rtc, start + at) << 8 * at for at in range(count))

    assert number(0x15, 2) == base
    assert number(0x17, 2) == number(0x30, 2) == extended
    assert number(0x34, 2) == above_16m
    assert number(0x5B, 3) == above_4g


@given(
    st.datetimes(datetime.datetime(1, 1, 1), datetime.datetime(9999, 12, 31)),
    st.sampled_from([0, 2, 4, 6]),
)
def test_any_date_that_is_set_is_shown(when, mode):
    clock = Clock()
    rtc = make(clock)
    write(rtc, REG_B, 0x86)
    values = {
        "s": when.second,
        "m": when.minute,
        "h": when.hour,
        "day": when.day,
        "month": when.month,
        "year": when.year % 100,
        "century": when.year // 100,
    }
    for name, value in values.items():
        write(rtc, TIME[name], value)
    for format in (0x06, mode, 0x06):
        write(rtc, REG_B, format)
    values["wday"] = when.isoweekday() % 7 + 1
    assert shown(rtc) == values


@given(st.lists(st.tuples(st.integers(0, 255), st.integers(0, 255)), max_size=60))
def test_no_write_makes_it_fail(writes):
    clock = Clock()
    rtc = make(clock)
    for index, value in writes:
        write(rtc, index, value)
        assert all(0 <= read(rtc, at) <= 255 for at in TIME.values())
        assert len(rtc.cmos_data) == 128
    data = bytearray()
    rtc.vmstate.save(data, rtc.save())
    other = make(clock)
    other.load(other.vmstate.load(Cursor(bytes(data)), 1))
    assert shown(other) == shown(rtc)


def test_state_goes_over_while_being_set(rtc, clock, carry):
    write(rtc, TIME["year"], 0x30)
    write(rtc, REG_B, 0x82)
    write(rtc, TIME["m"], 0x01)
    rtc.on_write(0, 1, TIME["m"])
    new = make(clock)
    assert len(carry(rtc, new)) == 128 + 1 + 8
    clock.now += 5
    assert new.on_read(1, 1) == 0x01
    write(new, REG_B, 0x02)
    assert (read(new, TIME["m"]), read(new, TIME["year"])) == (0x01, 0x30)
    # What was loaded can be written.
    write(new, 0x40, 1)


def test_clock_goes_on_over_a_carry(rtc, clock, carry):
    write(rtc, TIME["h"], 0x01)
    new = make(clock)
    carry(rtc, new)
    clock.now += 3600
    assert read(new, TIME["h"]) == 0x02


@pytest.mark.parametrize(
    ("at", "value", "problem"),
    [(128, b"\x80", "cmos_index 128"), (129, b"\x7f", "offset"), (129, b"\x80", "offset")],
)
def test_impossible_state_is_refused(rtc, encode, at, value, problem):
    data = bytearray(encode(rtc))
    data[at : at + 1] = value
    with pytest.raises(VmStateError, match=problem):
        rtc.vmstate.load(Cursor(bytes(data)), 1)


@pytest.mark.parametrize("offset", [1 << 41, -(1 << 41)])
def test_furthest_offset_that_loads_can_be_shown(rtc, encode, decode, offset):
    data = encode(rtc)[:-8] + offset.to_bytes(8, "big", signed=True)
    assert all(0 <= value <= 255 for value in shown(decode(rtc, data)).values())


# ---- interrupts ----------------------------------------------------------------------------

UIE, AIE, PIE, H24 = 0x10, 0x20, 0x40, 0x02


def set_alarm(rtc, hour, minute, second):
    for index, value in ((HOURS_ALARM, hour), (MINUTES_ALARM, minute), (SECONDS_ALARM, second)):
        write(rtc, index, value)


def test_update_ended_interrupt(rtc, clock):
    write(rtc, REG_B, UIE | H24)
    for expected in (0.75, 1.0, 1.0):
        assert not rtc.irq.level
        clock.now += expected
        assert rtc.loop.fire() == pytest.approx(expected)
        assert rtc.irq.level
        assert rtc.loop.timers == []  # nothing to wait for until register C is read
        assert read(rtc, REG_C) & 0xB0 == 0x90
    assert rtc.irq.changes == [True, False] * 3


def test_no_timer_without_interrupts(rtc, clock):
    rtc.attach()
    clock.now += 10
    assert read(rtc, REG_C) == 0x50  # what could have come, had it been enabled
    assert read(rtc, REG_C) == 0
    set_alarm(rtc, 0x21, 0x58, 0x30)
    assert (rtc.loop.timers, rtc.irq.changes) == ([], [])


def test_flag_from_before_interrupts_at_once(rtc, clock):
    clock.now += 1
    write(rtc, REG_B, UIE | H24)
    assert rtc.irq.level
    write(rtc, REG_B, H24)
    assert not rtc.irq.level
    assert read(rtc, REG_C) & 0x90 == 0x10


def test_alarm(rtc, clock):
    set_alarm(rtc, 0x21, 0x58, 0x09)
    write(rtc, REG_B, AIE | H24)
    for expected in (1.0, 0.75):
        assert not rtc.irq.level
        clock.now += expected
        assert rtc.loop.fire() == pytest.approx(expected)
    assert rtc.irq.level
    assert read(rtc, REG_C) & 0xA0 == 0xA0
    clock.now += 24 * 3600 - 1
    rtc.loop.fire()
    assert not rtc.irq.level
    clock.now += 1
    rtc.loop.fire()
    assert rtc.irq.level


def test_host_clock_that_is_set(rtc, clock):
    set_alarm(rtc, 0x22, 0x00, 0x00)
    write(rtc, REG_B, AIE | UIE | H24)
    clock.now -= 1000
    rtc.loop.fire()
    assert not rtc.irq.level
    clock.now += 3600
    rtc.loop.fire()
    assert read(rtc, REG_C) & 0xB0 == 0xB0


def any_or(most):
    return st.one_of(st.none(), st.integers(0, most))


@given(
    st.integers(0, 1 << 33),
    st.integers(1, 3000),
    st.sampled_from([0, 2, 4, 6]),
    st.tuples(any_or(23), any_or(59), any_or(59)),
)
def test_alarm_comes_when_all_registers_match(start, passed, mode, alarm):
    clock = Clock(start)
    rtc = make(clock)
    write(rtc, REG_B, mode)
    values = [0xFF if number is None else number for number in alarm]
    if alarm[0] is not None and not mode & 2:
        values[0] = alarm[0] % 12 or 12
    if not mode & 4:
        values = [value if value == 0xFF else value // 10 << 4 | value % 10 for value in values]
    if alarm[0] is not None and not mode & 2 and alarm[0] >= 12:
        values[0] |= 0x80
    set_alarm(rtc, *values)
    expected = any(
        all(a is None or a == b for a, b in zip(alarm, time.gmtime(now)[3:6], strict=True))
        for now in range(start + 1, start + passed + 1)
    )
    clock.now = start + passed
    assert bool(read(rtc, REG_C) & 0x20) == expected


@pytest.mark.parametrize(
    "alarm", [(0x24, 0xFF, 0xFF), (0xFF, 0x60, 0xFF), (0xFF, 0xFF, 0x60), (0xBF, 0, 0)]
)
def test_alarm_that_never_comes(rtc, clock, alarm):
    set_alarm(rtc, *alarm)
    write(rtc, REG_B, AIE | H24)
    clock.now += 100_000
    assert rtc.loop.timers == []
    assert read(rtc, REG_C) & 0x20 == 0


@pytest.mark.parametrize(
    ("rate", "wait"),
    [(6, 1e-3), (3, 1e-3), (1, 3.906e-3), (2, 7.8125e-3), (9, 7.8125e-3), (15, 0.5)],
)
def test_periodic_interrupt(rtc, clock, rate, wait):
    clock.now = START - 0.25
    rtc.seen = int(clock.now * 32768)
    write(rtc, REG_A, 0x20 | rate)
    write(rtc, REG_B, PIE | H24)
    clock.now += wait
    assert rtc.loop.fire() == pytest.approx(wait, rel=1e-3)
    if not rtc.irq.level:  # a float's last bit: a moment too early, so once more
        clock.now += 0.001
        rtc.loop.fire()
    assert rtc.irq.level
    assert read(rtc, REG_C) & 0xC0 == 0xC0


def test_no_rate_is_no_periodic_interrupt(rtc, clock):
    write(rtc, REG_A, 0x20)
    write(rtc, REG_B, PIE | H24)
    clock.now += 100
    assert rtc.loop.timers == []
    assert read(rtc, REG_C) == 0x10


def test_setting_the_clock_ends_update_interrupts(rtc):
    write(rtc, REG_B, 0x80 | UIE | H24)
    assert read(rtc, REG_B) == 0x80 | H24
    assert rtc.loop.timers == []


def test_a_guest_cannot_pile_up_timers(rtc):
    for value in (UIE, PIE, AIE, 0, UIE | PIE) * 100:
        write(rtc, REG_B, value)
        read(rtc, REG_C)
    assert len(rtc.loop.timers) < 5


def test_timers_that_sooner_ones_came_before_are_not_followed_by_others(rtc):
    write(rtc, REG_B, UIE | H24)
    for _ in range(100):
        write(rtc, REG_B, UIE | PIE | H24)
        write(rtc, REG_B, UIE | H24)
        rtc.loop.timers.pop()[1]()
    timers, rtc.loop.timers = rtc.loop.timers, []
    for _, callback in timers:
        callback()
    assert len(rtc.loop.timers) == 1


def test_reset_lets_the_line_go(rtc, clock):
    write(rtc, REG_B, UIE | H24)
    clock.now += 1
    rtc.loop.fire()
    rtc.reset()
    assert not rtc.irq.level
    assert (read(rtc, REG_B), read(rtc, REG_C)) == (H24, 0)


def test_alarm_during_an_update_comes_after_it(rtc, clock, carry):
    set_alarm(rtc, 0x21, 0x58, 0x08)
    write(rtc, REG_B, AIE | H24)
    new = make(clock)
    carry(rtc, new)
    clock.now += 5
    new.attach()
    assert new.irq.changes == [True]


def test_furthest_date_with_interrupts_goes_over(rtc, clock, carry):
    for index, value in ((0x32, 0xFF), (9, 0xFF), (8, 0xFF), (7, 0xFF)):
        write(rtc, index, value)
    write(rtc, REG_B, AIE | UIE | H24)
    new = make(clock)
    carry(rtc, new)
    clock.now += 1
    assert read(new, REG_C) & 0x10


def test_line_that_is_high_stays_so_over_an_update(rtc, clock, carry):
    write(rtc, REG_B, UIE | H24)
    clock.now += 1
    rtc.loop.fire()
    new = make(clock)
    carry(rtc, new)
    new.attach()
    assert (new.irq.level, new.irq.changes, new.loop.timers) == (True, [], [])
    read(new, REG_C)
    assert new.irq.changes == [False]
    assert len(new.loop.timers) == 1


def test_state_of_a_version_without_interrupts(rtc, clock, encode, decode):
    data = encode(rtc)
    clock.now += 5
    assert read(decode(make(clock), data), REG_C) & 0x80 == 0


@pytest.mark.parametrize(("at", "value"), [(12, 0x01), (137 + 2 + 22 + 4, 0x7F)])
def test_impossible_interrupt_state_is_refused(rtc, encode, at, value):
    write(rtc, REG_B, AIE | H24)
    data = bytearray(encode(rtc))
    assert len(data) == 137 + 2 + len("mc146818rtc/interrupts") + 4 + 8
    data[at] = value
    with pytest.raises(VmStateError, match=r"register C 0x1|seen"):
        rtc.vmstate.load(Cursor(bytes(data)), 1)


@given(
    st.binary(min_size=128, max_size=128),
    st.integers(0, 127),
    st.integers(-(1 << 63), (1 << 63) - 1) | st.integers(-(1 << 41), 1 << 41),
    st.integers(-(1 << 63), (1 << 63) - 1) | st.integers(-(1 << 57), 1 << 57),
)
def test_any_time_in_a_state_is_taken_or_refused(cmos, index, offset, seen):
    """Whatever it says, and whenever it is loaded, the clock shows some time and goes on."""
    new = make(Clock())
    out = bytearray()
    cmos = bytearray(cmos)
    cmos[REG_B] |= AIE  # so that the time up to which flags were seen is there
    new.vmstate.save(out, Record(cmos_data=bytes(cmos), cmos_index=index, offset=offset, seen=seen))
    try:
        record = new.vmstate.load(Cursor(bytes(out)), 1)
    except VmStateError:
        return
    new.load(record)
    new.attach()
    new.loop.settle()
    for register in (*TIME.values(), REG_A, REG_B, REG_C):
        assert 0 <= read(new, register) < 256
    for register, value in ((SECONDS_ALARM, 0xC0), (REG_A, 0x26), (0x32, 0x99), (REG_B, 0x70)):
        write(new, register, value)
    new.loop.settle()
    assert all(0 < wait <= 1 for wait, _ in new.loop.timers)
