"""Locks and words that native code shares, and the table of what it answers."""

import pytest
from harness import DEADLINE_S, wait_until
from harness.native import NativeBuses
from hypothesis import given
from hypothesis import strategies as st

from pyvmm._native import SharedLock, clear_bits, ffi, lib, set_bits
from pyvmm.core.bus import BusDevice
from pyvmm.core.irq import IrqLine
from pyvmm.core.native import NativeAnswers, address, shared_lock
from pyvmm.core.threads import Event, Lock, spawn
from pyvmm.devices.serial import FCR, IIR, LSR, THR


class Uart(BusDevice):
    """Registers that only native code answers."""

    def __init__(self):
        self.lock = Lock()
        self.line = IrqLine(4, print)
        self.regs = ffi.new("struct pyvmm_uart *", {"line": self.line.wire})
        self.answers = NativeAnswers(lib.PYVMM_UART, self.regs, (LSR,), (THR,))


@pytest.fixture
def word():
    return ffi.new("uint32_t *")


def test_bits_of_a_word(word):
    set_bits(address(word), 0x80000005)
    assert word[0] == 0x80000005
    clear_bits(address(word), 0xFFFFFFFF80000001)
    assert word[0] == 4


def test_arguments_are_looked_at():
    for function in (set_bits, clear_bits):
        with pytest.raises(TypeError):
            function(1)
    with pytest.raises(TypeError):
        set_bits("x", 1)


def test_a_shared_lock_is_one_word(word):
    lock = shared_lock(word)
    with lock:
        assert lock.locked()
        assert word[0]
    assert not lock.locked()
    assert not word[0]
    with pytest.raises(ValueError, match="one"), lock:
        raise ValueError("one")
    assert not word[0]


def test_who_waits_for_a_lock_gets_it(word):
    lock, got = shared_lock(word), Event()

    def wait():
        with lock:
            got.set()

    with lock:
        spawn(wait, lambda error: None)
        wait_until(lambda: word[0] == 2, "a thread that waits")
        assert not got.is_set()
    assert got.wait(DEADLINE_S)
    wait_until(lambda: not lock.locked(), "the end of it")


@pytest.mark.parametrize("argument", ["x", 0, 1 << 70])
def test_a_lock_is_at_an_address(argument):
    with pytest.raises((TypeError, ValueError, OverflowError)):
        SharedLock(argument)


def test_what_is_not_declared_is_not_answered():
    buses = NativeBuses()
    uart = Uart()
    buses.ports.add(0x3F8, 8, uart, "uart")
    for register, is_answered in ((LSR, True), (IIR, False), (FCR, False)):
        buses.set_port(0x3F8 + register, 1)
        assert buses.ask() == is_answered
    buses.set_port(0x3F8 + LSR, 1, 0)
    assert not buses.ask()


def test_a_region_that_moves_is_answered_where_it_is():
    buses = NativeBuses()
    region = buses.ports.add(0x100, 8, Uart(), "uart")
    other = buses.ports.add(0x200, 8, Uart(), "uart")
    for base in (0x100, 0x200):
        buses.set_port(base + LSR, 1)
        assert buses.ask()
    region = buses.ports.move(region, 0x300)
    buses.ports.remove(other)
    found = []
    for base in (0x100, 0x200, 0x300):
        buses.set_port(base + LSR, 1)
        found.append(buses.ask())
    assert found == [False, False, True]


def test_a_table_stays_for_as_long_as_it_is_in_use():
    buses = NativeBuses()
    buses.gate.used = first = buses.gate.answers
    for start in (0x100, 0x200, 0x300):
        buses.ports.add(start, 8, Uart(), "uart")
    assert [table for table, _ in buses.table._tables] == [first, buses.gate.answers]
    buses.gate.used = ffi.NULL
    buses.ports.add(0x400, 8, Uart(), "uart")
    assert [table for table, _ in buses.table._tables] == [buses.gate.answers]


@given(
    st.integers(0, 0xFFFF) | st.integers(0xF8, 0x108),
    st.sampled_from([1, 2, 4]),
    st.booleans(),
    st.booleans(),
)
def test_an_access_that_leaves_its_region_is_not_answered(address, size, is_port, is_write):
    buses = NativeBuses()
    buses.ports.add(0x100, 8, Uart(), "uart")
    value = 0 if is_write else None
    (buses.set_port if is_port else buses.set_mmio)(address, size, value)
    expected = is_port and size == 1 and address == 0x100 + (THR if is_write else LSR)
    assert buses.ask() == expected
