"""The state of a serial port, hostile ones too, and any sequence of actions."""

import time

import pytest
from harness.uart import (
    IDLE,
    MODEM_STATUS,
    NONE,
    RECEIVE,
    THRE,
    TRANSMIT,
    TRIGGER_14,
    act,
    fresh_port,
)
from hypothesis import given
from hypothesis import strategies as st

from pyvmm.chardev.base import BREAK, CLOSED, MUX_IN, MUX_OUT, OPENED
from pyvmm.core.threads import Event, spawn
from pyvmm.devices.serial import FCR, IER, LCR, LSR, RBR, SCR, THR
from pyvmm.errors import VmStateError
from pyvmm.vmstate.cursor import Cursor

# State


def busy(make_port, fcr):
    """A port with something everywhere."""
    port = make_port(room=0)
    port.write(LCR, 0x80)
    port.write(0, 0x34)
    port.write(1, 0x12)
    port.write(LCR, 0x03)
    port.write(FCR, fcr)
    port.write(SCR, 0x5A)
    port.write(IER, RECEIVE | MODEM_STATUS)
    port.send(b"out")
    port.chardev.feed(b"input")
    port.uart.handle_event(BREAK)
    return port


@pytest.mark.parametrize("fcr", [0, 0x01, TRIGGER_14])
def test_state_goes_over_in_mid_activity(make_port, carry, fcr):
    old, new = busy(make_port, fcr), make_port(room=0)
    new.write(FCR, 1)
    new.send(b"own")
    new.chardev.feed(b"own")
    carry(old.uart, new.uart)
    # The line is up in the irqchip's state already: no second edge, and it can come down.
    assert new.irq.level
    assert new.irq.changes == []
    new.chardev.unread += old.chardev.unread
    new.uart.attach()
    new.chardev.loop.run_once(0)
    new.chardev.make_room(None)
    assert new.sent() == (b"out" if fcr else b"o")
    assert new.read(LSR) == IDLE | 0x11
    got = b""
    while new.read(LSR) & 1:
        got += new.drain()
        new.chardev.loop.run_once(0)
    assert got == (b"input\0" if fcr else b"input")
    assert new.irq.changes[-1] is False
    assert new.read(SCR) == 0x5A


@pytest.mark.parametrize("enabled", [0, TRANSMIT])
@pytest.mark.parametrize("pending", [False, True])
def test_transmitter_interrupt_goes_over(make_port, carry, pending, enabled):
    old, new = make_port(), make_port()
    old.write(IER, TRANSMIT)
    if not pending:
        assert old.cause() == THRE
    old.write(IER, TRANSMIT | RECEIVE)
    old.chardev.feed(b"x")  # hides it in IIR
    carry(old.uart, new.uart)
    assert new.read(RBR) == ord("x")
    assert new.cause() == (THRE if pending else NONE)


def test_input_that_came_meanwhile_is_taken_on_resuming(make_port, carry):
    old, new = make_port(), make_port()
    new.chardev.unread += b"x"
    carry(old.uart, new.uart)
    new.chardev.loop.run_once(0)
    assert new.read(LSR) == IDLE
    new.uart.attach()
    new.chardev.loop.run_once(0)
    assert new.read(RBR) == ord("x")


def test_edge_while_resuming_is_delivered(make_port, carry):
    old, new = make_port(room=0), make_port()
    old.write(IER, TRANSMIT)
    old.send(b"x")
    assert not old.irq.level
    carry(old.uart, new.uart)
    assert new.irq.changes == []
    new.uart.attach()
    assert new.irq.changes == [True]
    assert new.sent() == b"x"


def test_idle_state_is_the_plain_eleven_bytes(port, encode):
    assert encode(port.uart) == bytes.fromhex("000c 00 00 01 00 00 60 b0 00 00")


def test_layout_of_a_busy_port(make_port, encode):
    data = encode(busy(make_port, 1).uart)
    assert data == (
        bytes.fromhex("1234 00 09 c4 03 00 11 b0 5a 01")
        + b"\x05\x10serial/recv_fifo\0\0\0\1input\0"
        + bytes(10 + 4)
        + b"\0\0\0\6"
        + b"\x05\x10serial/xmit_fifo\0\0\0\1out"
        + bytes(13 + 4)
        + b"\0\0\0\3"
    )


def load(port, data):
    port.uart.load(port.uart.vmstate.load(Cursor(data), 3))


def test_shift_register_of_another_writer_is_sent_first(make_port, encode):
    new = make_port()
    data = encode(busy(make_port, 1).uart)
    load(new, add_tsr(bytearray(data), b"?!"))
    new.uart.attach()
    assert new.sent() == b"!out"


def test_fifo_that_wraps_around(make_port, encode):
    new = make_port()
    data = bytearray(encode(busy(make_port, 1).uart))
    at = data.index(b"input")
    data[at : at + 16] = b"ut\0" + bytes(10) + b"inp"
    data[at + 16 : at + 20] = (13).to_bytes(4, "big")
    load(new, bytes(data))
    assert new.drain() == b"input\0"


def add_tsr(data, registers):
    """The state with serial/tsr, whose place is before the FIFOs."""
    at = data.index(b"\x05\x10serial/recv_fifo")
    data[at:at] = b"\x05\x0aserial/tsr" + b"\0\0\0\1" * 2 + registers
    return bytes(data)


def recv(data, num, head=0):
    at = data.index(b"input") + 16
    data[at : at + 8] = head.to_bytes(4, "big") + num.to_bytes(4, "big")


def poke(at, value):
    return lambda data: data.__setitem__(at, value)


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (lambda data: recv(data, 17), "17 bytes from 0 do not fit"),
        (lambda data: recv(data, 0xFFFFFFFF), "do not fit"),
        (lambda data: recv(data, 1, 16), "1 bytes from 16 do not fit"),
        (poke(3, 0x10), "ier 0x10"),
        (poke(6, 0x20), "mcr 0x20"),
        (poke(10, 0x03), "fcr_vmstate 0x3"),
        (poke(10, 0x00), "the FIFO is off"),
        (poke(7, 0x10), "said to be empty"),
        (poke(7, 0x31), "said to be empty"),
        (lambda data: data.extend(b"\x05\x0bserial/poll\0\0\0\1"), "unknown"),
        (lambda data: add_tsr(data, b"??"), None),
    ],
)
def test_impossible_state_is_refused(make_port, encode, damage, problem):
    new = make_port()
    data = bytearray(encode(busy(make_port, 1).uart))
    damage(data)
    if problem is None:
        load(new, bytes(data))
        data[7] |= 0x40
        problem = "shift register is said to be empty"
    with pytest.raises(VmStateError, match=problem):
        new.uart.vmstate.load(Cursor(bytes(data)), 3)


# Whatever a guest and a host do


def unsent(port):
    output = port.uart.regs.output
    return output.tail - output.head


def invariants(port):
    device, regs = port.uart, port.uart.regs
    depth = 16 if regs.fcr & 1 else 1
    assert regs.received_count <= depth
    # All of it: native code, which has the guest go on before it is taken, is not here.
    assert regs.held == unsent(port) <= depth
    assert device.can_receive() <= depth - regs.received_count
    lsr = device._lsr()
    assert bool(lsr & 1) == bool(regs.received_count)
    assert lsr & 0x60 == (0 if regs.held else 0x60)
    assert port.irq.level == (device._cause() != NONE)
    assert all(a != b for a, b in zip(port.irq.changes, port.irq.changes[1:], strict=False))


actions = st.one_of(
    st.tuples(st.just("read"), st.integers(0, 7)),
    st.tuples(st.just("write"), st.integers(0, 7), st.integers(0, 255)),
    st.tuples(st.just("feed"), st.binary(max_size=40)),
    st.tuples(st.just("room"), st.none() | st.integers(0, 20)),
    st.tuples(st.just("event"), st.sampled_from([BREAK, CLOSED, OPENED, MUX_IN, MUX_OUT])),
    st.tuples(st.just("loop")),
)


@given(st.lists(actions, max_size=60))
def test_any_sequence_keeps_the_invariants(sequence):
    with fresh_port(room=3) as port:
        for action in sequence:
            act(port, *action)
            invariants(port)


@given(st.lists(actions, max_size=30), st.lists(actions, max_size=30))
def test_a_port_that_was_carried_over_goes_on_like_the_old_one(before, after):
    with fresh_port(room=3) as old, fresh_port(room=3) as new:
        for action in before:
            act(old, *action)
        old.chardev.loop.run_once(0)
        old.chardev.take_output()
        data = bytearray()
        old.uart.vmstate.save(data, old.uart.save())
        load(new, bytes(data))
        new.chardev.unread += old.chardev.unread
        new.chardev.room = old.chardev.room
        old.irq.changes.clear()
        old.uart.attach()
        new.uart.attach()
        invariants(new)
        for action in [("loop",), *after]:
            # Without data RBR shows what was read last, which no state carries in full.
            if action != ("read", RBR) or old.uart.regs.received_count:
                assert act(old, *action) == act(new, *action)
            assert old.irq.changes == new.irq.changes
        assert old.chardev.take_output() == new.chardev.take_output()


@given(st.binary(max_size=120))
def test_any_state_loads_or_is_refused(data):
    with fresh_port(room=3) as port:
        try:
            load(port, data)
        except VmStateError:
            return
        port.uart.attach()
        port.drain()
        assert unsent(port) <= 17 + 4096 - 32


def test_flood_of_input_stays_in_the_kernel(port):
    port.write(FCR, 1)
    for _ in range(100):
        port.chardev.feed(bytes(10000))
    assert port.uart.regs.received_count == 16
    assert len(port.chardev.unread) == 100 * 10000 - 16


def test_a_vcpu_and_the_main_loop_at_once(make_port):
    port = make_port(room=0)
    port.write(FCR, 1)
    text = bytes(range(256)) * 8
    done, crashes, echoed = Event(), [], bytearray()

    def guest():
        # Echoes its input, waiting for the transmitter as a driver does.
        while len(echoed) < len(text):
            if port.read(LSR) & 1:
                echoed.append(port.read(RBR))
                while not port.read(LSR) & 0x20:
                    pass
                port.write(THR, echoed[-1])
        done.set()

    def crashed(error):
        crashes.append(error)
        done.set()

    spawn(guest, crashed)
    port.chardev.unread += text
    port.chardev.accept_input()
    deadline = time.monotonic() + 30
    while not done.is_set() and time.monotonic() < deadline:
        port.chardev.loop.run_once(0.001)
        port.chardev.make_room(5)
    port.chardev.make_room(None)
    assert not crashes
    assert bytes(echoed) == port.sent() == text
