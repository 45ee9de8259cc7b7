"""The serial port whose accesses native code answers, beside one that Python has alone."""

import time

import pytest
from harness import DEADLINE_S, wait_until
from harness.native import NativeBuses
from harness.uart import (
    IDLE,
    NONE,
    RECEIVE,
    STATUS,
    THRE,
    TRANSMIT,
    NativePort,
    Port,
    act,
    fresh_port,
)
from hypothesis import given
from hypothesis import strategies as st

from pyvmm.chardev.base import BREAK, CLOSED, OPENED
from pyvmm.core.threads import Event, spawn
from pyvmm.devices import output
from pyvmm.devices.output import PATIENCE_S, SIZE
from pyvmm.devices.serial import FCR, IER, IIR, LCR, LSR, MCR, PORTS, RBR, THR
from pyvmm.vmstate.cursor import Cursor

OFTEN = st.sampled_from([THR, IER, IIR, LSR])
actions = st.one_of(
    st.tuples(st.just("read"), OFTEN | st.integers(0, PORTS - 1)),
    st.tuples(st.just("write"), OFTEN | st.integers(0, PORTS - 1), st.integers(0, 255)),
    st.tuples(st.just("feed"), st.binary(max_size=20)),
    st.tuples(st.just("event"), st.sampled_from([BREAK, CLOSED, OPENED])),
    st.tuples(st.just("loop")),
)


@pytest.fixture
def native(memory_chardev):
    """Makes ports that native code answers."""
    made = []

    def make(**options):
        made.append(NativePort(memory_chardev(**options)))
        return made[-1]

    yield make
    for port in made:
        port.chardev.make_room(None)
        port.uart.close()


def test_a_driver_that_sends_needs_no_interpreter(native):
    port = native()
    port.write(FCR, 1)
    before = port.buses.answered
    port.write(IER, TRANSMIT)
    for byte in b"hello":
        assert port.irq.level
        assert port.cause() == THRE
        assert not port.irq.level
        assert port.read(LSR) == IDLE
        port.write(THR, byte)
    port.write(IER, 0)
    assert port.buses.answered - before == 2 + 3 * 5
    assert port.sent() == b""
    port.chardev.loop.run_once(0)
    assert port.sent() == b"hello"


@given(st.lists(actions, max_size=80))
def test_both_ways_are_one_device(sequence):
    with fresh_port(NativePort) as native, fresh_port() as python:
        for action in sequence:
            assert act(native, *action) == act(python, *action), action
            assert native.irq.level == python.irq.level, action
        native.uart.drain()
        saved = [bytearray(), bytearray()]
        for out, port in zip(saved, (native, python), strict=True):
            port.uart.vmstate.save(out, port.uart.save())
        assert saved[0] == saved[1]
        assert native.sent() == python.sent()


sends = st.one_of(
    st.tuples(st.just("send"), st.binary(min_size=1, max_size=40)),
    st.tuples(st.just("room"), st.none() | st.integers(0, 60)),
    st.tuples(st.just("loop")),
    st.tuples(st.just("update")),
)


@given(st.booleans(), st.lists(sends, max_size=40))
def test_a_driver_that_heeds_its_registers_loses_nothing(fifo, sequence):
    """Whatever the reader does, and with updates between any two bytes."""
    with fresh_port(NativePort, room=0) as port, fresh_port(NativePort, room=0) as other:
        for each in (port, other):
            each.write(FCR, int(fifo))
        expected, got = b"", b""
        for action, *arguments in sequence:
            if action == "send":
                (data,) = arguments
                burst = 16 if fifo else 1
                # As many at once as the FIFO has room for, like Linux's driver.
                for at in range(0, len(data), burst):
                    if not port.read(LSR) & 0x20:
                        break
                    port.send(data[at : at + burst])
                    expected += data[at : at + burst]
            elif action == "room":
                port.chardev.make_room(*arguments)
            elif action == "loop":
                port.chardev.loop.run_once(0)
            else:
                got += carry_over(port, other)
                port, other = other, port
        port.chardev.make_room(None)
        port.flush()
        assert got + port.sent() == expected
        assert port.read(LSR) == IDLE


def carry_over(old, new):
    """An update from one to the other, whose reader is the same; what came out before."""
    old.uart.drain()
    data = bytearray()
    old.uart.vmstate.save(data, old.uart.save())
    new.chardev.room = old.chardev.room
    new.uart.load(new.uart.vmstate.load(Cursor(bytes(data)), 3))
    new.uart.attach()
    old.uart.reset()
    old.uart._output.clear()
    old.chardev.make_room(0)
    return old.sent()


def test_bytes_that_were_taken_for_sent_wait_before_the_fifo(native, encode, decode):
    port = native(room=0)
    port.write(FCR, 1)
    port.send(bytes(range(100)))
    assert port.read(LSR) == IDLE
    port.uart.drain()
    assert port.read(LSR) == 0
    port.send(bytes(range(100, 120)))  # the driver may not have looked
    data = encode(port.uart)
    assert b"\x0dserial/output\0\0\0\1" + (100).to_bytes(4, "big") in data
    assert data[7] == 0
    new = native(room=30)
    decode(new.uart, data)
    assert encode(new.uart) == data
    assert new.read(LSR) == 0
    new.uart.attach()
    assert new.read(LSR) == 0
    new.chardev.make_room(None)
    assert new.sent() == bytes(range(116))
    assert new.read(LSR) == IDLE


def test_clearing_the_fifo_forgets_what_is_in_the_fifo(native):
    port = native(room=0)
    port.write(FCR, 1)
    port.send(b"sent")
    port.uart.drain()
    port.send(b"held")
    port.write(FCR, 5)
    port.chardev.make_room(None)
    assert port.sent() == b"sent"
    assert port.read(LSR) == IDLE


def test_a_reset_forgets_no_more_than_the_fifo(native):
    port = native(room=0)
    port.send(b"sent")
    port.uart.drain()
    port.send(b"h")
    port.uart.reset()
    port.chardev.make_room(None)
    assert port.sent() == b"sent"


def test_interrupt_comes_when_all_that_waited_is_written(native):
    port = native(room=0)
    port.write(IER, TRANSMIT)
    port.send(b"ab")
    assert port.cause() == THRE
    port.uart.drain()
    assert port.cause() == NONE
    port.chardev.make_room(1)
    assert port.cause() == NONE
    port.chardev.make_room(None)
    assert port.irq.level
    assert port.cause() == THRE


def test_flushing_is_no_interrupt(native):
    port = native()
    port.write(IER, TRANSMIT)
    port.send(b"ab")
    assert port.cause() == THRE
    port.flush()
    assert port.cause() == NONE


def test_a_ring_that_is_full_is_written_at_once(native):
    port = native()
    data = bytes(range(256)) * (2 * SIZE // 256)
    port.send(data)
    assert port.buses.answered > SIZE
    taken = port.sent()
    assert len(taken) >= SIZE
    port.flush()
    assert taken + port.sent() == data


def test_a_ring_that_is_full_and_a_reader_that_is_slow(native):
    port = native(room=0)
    port.write(FCR, 1)
    data = bytes(range(256)) * (2 * SIZE // 256)
    port.send(data)
    assert port.read(LSR) == 0
    assert port.uart.regs.held == 16
    port.chardev.make_room(None)
    assert port.sent() == data[:SIZE]


def test_the_end_waits_for_a_slow_reader_of_what_was_promised(native):
    port = native(room=0)
    port.send(b"promised")
    began, done = Event(), Event()
    take = port.chardev.write

    def write(data):
        began.set()
        return take(data)

    def read():
        began.wait()
        port.chardev.room = None
        done.set()

    port.chardev.write = write
    spawn(read, lambda error: None)
    port.uart.close()
    assert done.wait(DEADLINE_S)
    assert port.sent() == b"promised"


def test_the_end_waits_for_no_reader_that_the_guest_waits_for(native):
    port = native(room=0)
    port.send(b"promised")
    port.uart.drain()
    begun = time.monotonic()
    port.uart.close()
    assert time.monotonic() - begun < PATIENCE_S
    assert port.sent() == b""


def test_a_write_that_failed_by_a_bug_is_made_again(native, monkeypatch):
    port = native()
    loop, write = port.chardev.loop, port.chardev.write
    monkeypatch.setattr(output, "_RECOVER_S", 0)
    failures = []

    def fail(data):
        raise ValueError("injected")

    def recover(error, function):
        failures.append(error)
        port.chardev.write = write
        function.__self__.recover()

    loop.on_error = recover
    port.chardev.write = fail
    port.send(b"a")
    loop.run_once(0)
    assert len(failures) == 1
    port.send(b"b")
    wait_until(lambda: loop.run_once(0) or port.chardev.output == b"ab", "the output")
    port.send(b"c")
    wait_until(lambda: loop.run_once(0) or port.chardev.output == b"abc", "the output")


def test_input_reaches_the_registers_that_native_code_reads(native):
    port = native()
    port.write(FCR, 0xC1)
    port.write(IER, RECEIVE | STATUS)
    port.chardev.feed(b"x" * 3)
    before = port.buses.answered
    assert port.read(IIR) == 0xCC
    assert port.read(LSR) == IDLE | 1
    port.chardev.loop.run_once(0)
    port.uart.handle_event(BREAK)
    assert port.read(IIR) == 0xC6
    assert port.read(LSR) == IDLE | 0x11
    assert port.read(IIR) == 0xCC
    assert port.buses.answered - before == 5
    assert port.read(RBR) == ord("x")


@pytest.mark.parametrize("register", [LCR, MCR])
def test_divisor_latch_and_loopback_are_pythons(native, register):
    port = native()
    port.write(register, 0x90)
    before = port.buses.answered
    port.write(THR, 65)
    if register == LCR:
        port.write(IER, 1)
    assert port.buses.answered == before
    port.write(register, 0)
    port.flush()
    assert port.sent() == b""


def test_nothing_is_promised_before_there_is_a_writer(memory_chardev):
    port = Port(memory_chardev())
    buses = NativeBuses(port.bus)
    buses.write(THR, 1, ord("x"))
    assert port.sent() == b"x"
    assert not buses.answered


hostile = st.tuples(
    st.booleans(),
    st.sampled_from([0, 1, 2, 5, 7, 8, 0xFFFF]) | st.integers(0, 0xFFFF),
    st.sampled_from([1, 2, 4]),
    st.none() | st.integers(0, 0xFFFFFFFF),
    st.sampled_from([1, 1, 2, 16, 1024]),
)


@given(st.lists(hostile, max_size=60))
def test_other_accesses_are_left_alone(sequence):
    """Wide, repeated, beyond the ports: native code answers one byte at a time, or nothing."""
    with fresh_port(NativePort) as port:
        for is_memory, address, size, value, count in sequence:
            value = None if value is None else value & (1 << 8 * size) - 1
            if is_memory:
                port.buses.set_mmio(address, size, value)
            else:
                data = port.buses.set_port(address, size, value, count)
                before = data[:]
            answered = port.buses.ask()
            if is_memory or size != 1 or count != 1 or address >= PORTS:
                assert not answered
                assert is_memory or data[:] == before


def test_a_lock_that_is_taken_sends_the_access_to_python(native):
    port = native()
    with port.uart.lock:
        port.buses.set_port(LSR, 1)
        assert not port.buses.ask()
    port.buses.set_port(LSR, 1)
    assert port.buses.ask()


def test_a_vcpu_and_python_at_once(native):
    """Each finds its own bytes in order, and none is lost, whoever has the lock."""
    port = native()
    port.write(FCR, 1)
    count = 20_000
    buses = [NativeBuses(port.bus), NativeBuses(port.bus)]
    ends, crashes = [Event(), Event()], []

    def vcpu(number):
        for at in range(count):
            buses[number].write(THR, 1, 128 * number | at % 128)
        ends[number].set()

    def crashed(error):
        crashes.append(error)
        for end in ends:
            end.set()

    out = bytearray()
    for number in range(2):
        spawn(lambda number=number: vcpu(number), crashed)
    deadline = time.monotonic() + DEADLINE_S
    while not all(end.is_set() for end in ends):
        assert time.monotonic() < deadline
        port.chardev.loop.run_once(0.001)
        out += port.sent()
    port.flush()
    out += port.sent()
    assert not crashes
    assert all(each.answered for each in buses)
    for number in range(2):
        own = [byte & 127 for byte in out if byte >> 7 == number]
        assert own == [at % 128 for at in range(count)]
