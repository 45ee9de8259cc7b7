import calendar
import datetime
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyvmm.devices.rtc import REG_A, REG_B, Rtc
from pyvmm.errors import VmStateError
from pyvmm.vmstate.fields import Cursor

# Thursday 2026-11-19 21:58:07.25 UTC
START = calendar.timegm((2026, 11, 19, 21, 58, 7)) + 0.25
TIME = {"s": 0, "m": 2, "h": 4, "wday": 6, "day": 7, "month": 8, "year": 9, "century": 0x32}


class Clock:
    """A host clock that stands until it is moved."""

    def __init__(self, now=START):
        self.now = now

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def rtc(clock):
    return Rtc(clock)


def read(rtc, index):
    rtc.on_write(0, 1, index)
    return rtc.on_read(1, 1)


def write(rtc, index, value):
    rtc.on_write(0, 1, index)
    rtc.on_write(1, 1, value)


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
    rtc = Rtc()
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
    rtc = Rtc(clock)
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
    rtc = Rtc(clock)
    for index, value in writes:
        write(rtc, index, value)
        assert all(0 <= read(rtc, at) <= 255 for at in TIME.values())
        assert len(rtc.cmos_data) == 128
    data = bytearray()
    rtc.vmstate.save(data, rtc.save())
    other = Rtc(clock)
    other.load(other.vmstate.load(Cursor(bytes(data)), 1))
    assert shown(other) == shown(rtc)


def test_state_goes_over_while_being_set(rtc, clock, carry):
    write(rtc, TIME["year"], 0x30)
    write(rtc, REG_B, 0x82)
    write(rtc, TIME["m"], 0x01)
    rtc.on_write(0, 1, TIME["m"])
    new = Rtc(clock)
    assert len(carry(rtc, new)) == 128 + 1 + 8
    clock.now += 5
    assert new.on_read(1, 1) == 0x01
    write(new, REG_B, 0x02)
    assert (read(new, TIME["m"]), read(new, TIME["year"])) == (0x01, 0x30)
    # What was loaded can be written.
    write(new, 0x40, 1)


def test_clock_goes_on_over_a_carry(rtc, clock, carry):
    write(rtc, TIME["h"], 0x01)
    new = Rtc(clock)
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
