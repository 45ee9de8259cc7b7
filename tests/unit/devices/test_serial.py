import contextlib
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyvmm.chardev.base import BREAK, CLOSED, MUX_IN, MUX_OUT, OPENED
from pyvmm.core.bus import Bus
from pyvmm.core.threads import Event, spawn
from pyvmm.devices import serial as uart
from pyvmm.devices.serial import FCR, IER, IIR, LCR, LSR, MCR, MSR, RBR, SCR, THR, Serial
from pyvmm.errors import VmStateError
from pyvmm.testing.fake_irq import FakeIrq
from pyvmm.testing.memory_chardev import MemoryChardev
from pyvmm.vmstate.fields import Cursor

NONE, MODEM, THRE, DATA, LINE, TIMEOUT = 1, 0, 2, 4, 6, 12
RECEIVE, TRANSMIT, STATUS, MODEM_STATUS = 1, 2, 4, 8  # IER
TRIGGER_14 = 0xC1
IDLE = 0x60


class Port:
    """A serial port on a bus, as a guest and the host see it."""

    def __init__(self, chardev):
        self.chardev = chardev
        self.irq = FakeIrq()
        self.uart = Serial(self.irq, chardev)
        self.bus = Bus("I/O", 8)
        self.bus.add(0, uart.PORTS, self.uart, "serial")
        chardev.attach(self.uart)
        chardev.loop.run_once(0)  # attaching asked for input

    def read(self, register):
        return self.bus.read(register, 1)

    def write(self, register, value):
        self.bus.write(register, 1, value)

    def send(self, data):
        for byte in data:
            self.write(THR, byte)

    def drain(self):
        """Read for as long as there is data, as a driver does."""
        data = bytearray()
        while self.read(LSR) & 1:
            data.append(self.read(RBR))
        return bytes(data)

    def sent(self):
        return self.chardev.take_output()

    def cause(self):
        return self.read(IIR) & 15


@pytest.fixture
def make_port(memory_chardev):
    return lambda **options: Port(memory_chardev(**options))


@pytest.fixture
def port(make_port):
    return make_port()


@contextlib.contextmanager
def fresh_port(**options):
    """A port for one example of a property."""
    chardev = MemoryChardev(**options)
    try:
        yield Port(chardev)
    finally:
        chardev.close()


def test_registers_after_power_on(port):
    assert [port.read(register) for register in range(8)] == [0, 0, 1, 0, 0, IDLE, 0xB0, 0]
    port.write(LCR, 0x80)
    assert [port.read(register) for register in (0, 1)] == [12, 0]
    assert port.irq.changes == []


def test_reset_forgets_everything_and_lowers_the_line(make_port):
    port = make_port(room=0)
    port.write(FCR, 1)
    port.chardev.feed(b"lost")
    for register in (IER, MCR, SCR, LCR):
        port.write(register, 0x0F)
    port.send(b"lost")
    assert port.irq.level
    port.uart.reset()
    assert not port.irq.level
    assert [port.read(register) for register in range(8)] == [0, 0, 1, 0, 0, IDLE, 0xB0, 0]
    port.chardev.make_room(None)
    assert port.sent() == b""


def test_reset_lets_waiting_input_come(port):
    port.chardev.feed(b"ab")
    port.uart.reset()
    port.chardev.loop.run_once(0)
    assert port.read(RBR) == ord("b")


@pytest.mark.parametrize(
    ("register", "kept"), [(IER, 0x0F), (LCR, 0xFF), (MCR, 0x1F), (SCR, 0xFF), (LSR, 0), (MSR, 0)]
)
def test_bits_that_a_register_keeps(port, register, kept):
    before = port.read(register)
    port.write(register, 0xFF)
    after = port.read(register)
    assert after == (kept if kept else before)


def test_divisor_latch_hides_data_and_ier(port):
    port.write(IER, RECEIVE)
    port.write(LCR, 0x83)
    port.write(0, 0x34)
    port.write(1, 0x12)
    assert (port.read(0), port.read(1)) == (0x34, 0x12)
    assert port.sent() == b""
    port.write(LCR, 0x03)
    assert (port.read(0), port.read(1)) == (0, RECEIVE)
    assert port.uart.divider == 0x1234


def test_wide_access_is_split_into_registers(port):
    port.bus.write(LCR, 2, 0x0B03)
    assert (port.read(LCR), port.read(MCR)) == (0x03, 0x0B)
    assert port.bus.read(LSR, 2) == 0xB060


# Sending


def test_bytes_go_out_at_once(port):
    port.send(b"hello")
    assert port.sent() == b"hello"
    assert port.read(LSR) == IDLE
    assert port.irq.changes == []


@pytest.mark.parametrize(("fcr", "depth"), [(0, 1), (1, 16)])
def test_what_is_not_taken_waits_in_the_fifo(make_port, fcr, depth):
    port = make_port(room=0)
    port.write(FCR, fcr)
    text = bytes(range(65, 65 + depth))
    port.send(text)
    assert port.read(LSR) == 0
    assert port.sent() == b""
    port.chardev.make_room(1)
    assert port.read(LSR) == (IDLE if depth == 1 else 0)
    port.chardev.make_room(None)
    assert port.read(LSR) == IDLE
    assert port.sent() == text


def test_writing_on_top_of_a_full_fifo_loses_what_was_written_last(make_port):
    port = make_port(room=0)
    port.write(FCR, 1)
    port.send(bytes(range(20)))
    port.chardev.make_room(None)
    assert port.sent() == bytes(range(16))


def test_order_is_kept_when_room_comes_between(make_port):
    port = make_port(room=2)
    port.write(FCR, 1)
    port.send(b"abcd")
    port.chardev.make_room(1)
    port.send(b"ef")
    port.chardev.make_room(None)
    assert port.sent() == b"abcdef"


@pytest.mark.parametrize("event", [CLOSED, OPENED])
def test_nothing_stays_behind_when_the_peer_changes(make_port, event):
    port = make_port(room=0)
    port.write(IER, TRANSMIT)
    port.send(b"x")
    assert not port.irq.level
    port.chardev.room = None
    port.uart.handle_event(event)
    assert port.irq.level
    assert port.read(LSR) == IDLE


@pytest.mark.parametrize("event", [MUX_IN, MUX_OUT])
def test_the_mux_changes_nothing(port, event):
    port.write(IER, 0x0F)
    before = port.irq.changes[:]
    port.uart.handle_event(event)
    assert port.irq.changes == before


# The transmitter's interrupt


def test_enabling_it_with_nothing_to_send_raises_it(port):
    port.write(IER, TRANSMIT)
    assert port.irq.level
    assert port.cause() == THRE
    # Reading IIR took it back.
    assert not port.irq.level
    assert port.cause() == NONE
    port.write(IER, TRANSMIT)
    assert not port.irq.level
    port.write(IER, 0)
    port.write(IER, TRANSMIT)
    assert port.irq.changes == [True, False, True]


def test_enabling_it_while_a_byte_waits_does_not_raise_it(make_port):
    port = make_port(room=0)
    port.send(b"x")
    port.write(IER, TRANSMIT)
    assert port.cause() == NONE
    assert port.irq.changes == []
    port.chardev.make_room(None)
    assert port.irq.changes == [True]
    assert port.cause() == THRE


def test_each_byte_that_is_sent_gives_an_edge(port):
    port.write(IER, TRANSMIT)
    port.send(b"abc")
    assert port.irq.edges == 4
    assert port.irq.level


def test_no_interrupt_unless_enabled(port):
    port.send(b"abc")
    port.chardev.feed(b"abc")
    port.uart.handle_event(BREAK)
    port.write(MCR, 0x10)
    assert port.cause() == NONE
    assert port.irq.changes == []


# Receiving


def test_without_fifo_one_byte_at_a_time(port):
    port.write(IER, RECEIVE)
    port.chardev.feed(b"abc")
    seen = []
    while port.irq.level:
        assert port.cause() == DATA
        seen.append(port.read(RBR))
        assert port.read(LSR) == IDLE
        port.chardev.loop.run_once(0)
    assert bytes(seen) == b"abc"
    assert port.irq.edges == 3


def test_last_byte_is_read_again_when_there_is_none(port):
    port.chardev.feed(b"a")
    assert [port.read(RBR), port.read(RBR)] == [97, 97]


def test_input_never_overruns(port):
    port.write(FCR, 1)
    text = bytes(range(256)) * 4
    port.chardev.feed(text)
    assert len(port.chardev.unread) == len(text) - 16
    got = b""
    while len(got) < len(text):
        got += port.drain()
        port.chardev.loop.run_once(0)
    assert got == text


@pytest.mark.parametrize(("fcr", "trigger"), [(0x01, 1), (0x41, 4), (0x81, 8), (0xC1, 14)])
def test_trigger_level_tells_data_from_time_out(port, fcr, trigger):
    port.write(FCR, fcr)
    port.write(IER, RECEIVE)
    assert port.read(IIR) == 0xC1
    for count in range(1, 17):
        port.chardev.feed(b"x")
        assert port.read(IIR) & 0xF0 == 0xC0
        assert port.cause() == (DATA if count >= trigger else TIMEOUT)
        assert port.irq.level
    for count in range(15, 0, -1):
        port.read(RBR)
        assert port.cause() == (DATA if count >= trigger else TIMEOUT)
    port.read(RBR)
    assert port.cause() == NONE
    assert not port.irq.level


def test_handler_that_takes_one_byte_each_time_sees_them_all(port):
    port.write(FCR, TRIGGER_14)
    port.write(IER, RECEIVE)
    port.chardev.feed(b"abcde")
    got = b""
    for edge in range(1, 6):
        assert port.irq.edges == edge
        got += bytes([port.read(RBR)])
    assert got == b"abcde"
    assert not port.irq.level


def test_clearing_the_receive_fifo(port):
    port.write(FCR, 1)
    port.write(IER, RECEIVE)
    port.chardev.feed(b"abc")
    port.chardev.feed(b"0123456789ABCDEF")
    port.write(FCR, 0x03)
    assert port.read(LSR) == IDLE
    assert not port.irq.level
    port.chardev.loop.run_once(0)
    assert port.drain() == b"DEF"


def test_clearing_the_transmit_fifo(make_port):
    port = make_port(room=0)
    port.write(FCR, 1)
    port.write(IER, TRANSMIT)
    port.send(b"abc")
    assert not port.irq.level
    port.write(FCR, 0x05)
    assert port.read(LSR) == IDLE
    assert port.cause() == THRE
    port.chardev.make_room(None)
    assert port.sent() == b""


@pytest.mark.parametrize(("before", "after"), [(0, 1), (1, 0)])
def test_switching_the_fifo_empties_it(port, before, after):
    port.write(FCR, before)
    port.chardev.feed(b"a")
    port.write(FCR, after)
    assert port.read(LSR) == IDLE
    assert port.read(IIR) & 0xC0 == 0xC0 * after


def test_fifo_bits_count_only_with_the_enable_bit(port):
    port.chardev.feed(b"a")
    port.write(FCR, 0xC6)
    assert port.read(LSR) == IDLE | 1
    assert port.uart.fcr == 0


def test_surplus_after_the_fifo_was_switched_off_is_an_overrun(port):
    # The chardev had asked while there was room for 16.
    port.uart.receive(b"abc")
    assert port.read(LSR) == IDLE | 3
    assert port.read(LSR) == IDLE | 1
    assert port.read(RBR) == ord("a")


# Line status, break, priorities


def test_break(port):
    port.write(IER, STATUS)
    port.uart.handle_event(BREAK)
    assert port.irq.level
    assert port.cause() == LINE
    assert port.read(LSR) == IDLE | 0x11
    assert not port.irq.level
    assert port.read(RBR) == 0
    assert port.read(LSR) == IDLE


def test_break_on_a_full_receiver_drops_only_its_nul(port):
    port.chardev.feed(b"a")
    port.uart.handle_event(BREAK)
    assert port.read(LSR) == IDLE | 0x11
    assert port.drain() == b"a"


def test_priorities(port):
    port.write(MCR, 0x13)
    port.write(FCR, TRIGGER_14)
    port.write(IER, RECEIVE | TRANSMIT | STATUS | MODEM_STATUS)
    port.send(b"abc")
    port.uart.handle_event(BREAK)
    assert port.cause() == LINE
    port.read(LSR)
    assert port.cause() == TIMEOUT
    port.send(b"0123456789")
    assert port.cause() == DATA
    assert port.drain() == b"abc\x000123456789"
    assert port.cause() == THRE
    assert port.cause() == MODEM
    assert port.irq.level
    assert port.read(MSR) == 0x38
    assert port.cause() == NONE
    assert not port.irq.level


# Loopback and modem lines


def test_loopback_turns_output_into_input(port):
    port.write(MCR, 0x10)
    port.write(IER, RECEIVE | TRANSMIT)
    port.send(b"z")
    assert port.sent() == b""
    assert port.cause() == DATA
    assert port.read(RBR) == ord("z")
    assert port.cause() == THRE


def test_loopback_overruns(port):
    port.write(FCR, 1)
    port.write(MCR, 0x10)
    port.send(bytes(range(20)))
    assert port.read(LSR) == IDLE | 3
    assert port.drain() == bytes(range(16))


def test_loopback_keeps_host_input_waiting(port):
    port.write(MCR, 0x10)
    port.chardev.feed(b"host")
    assert port.read(LSR) == IDLE
    port.write(MCR, 0)
    port.chardev.loop.run_once(0)
    assert port.read(RBR) == ord("h")


@pytest.mark.parametrize("outputs", range(16))
def test_loopback_modem_lines(port, outputs):
    port.write(MCR, 0x10 | outputs)
    dtr, rts, out1, out2 = (outputs >> bit & 1 for bit in range(4))
    lines = port.read(MSR)
    assert lines >> 4 == rts | dtr << 1 | out1 << 2 | out2 << 3
    # From CTS, DSR and DCD on and RI off; RI counts on its way down only.
    assert lines & 15 == (not rts) | (not dtr) << 1 | (not out2) << 3
    assert port.read(MSR) == lines & 0xF0


def test_ring_counts_when_it_ends(port):
    port.write(MCR, 0x1F)
    assert port.read(MSR) == 0xF0
    port.write(MCR, 0x1B)
    assert port.read(MSR) == 0xB4


def test_modem_interrupt(port):
    port.write(IER, MODEM_STATUS)
    port.write(MCR, 0x10)
    assert port.irq.level
    assert port.cause() == MODEM
    assert port.irq.level
    port.read(MSR)
    assert not port.irq.level


def test_properties(port):
    assert port.uart.properties() == {
        "index": 0,
        "iobase": 0x3F8,
        "irq": 4,
        "chardev": "memory0",
    }


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
    new.uart.resume()
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
    new.uart.resume()
    new.chardev.loop.run_once(0)
    assert new.read(RBR) == ord("x")


def test_edge_while_resuming_is_delivered(make_port, carry):
    old, new = make_port(room=0), make_port()
    old.write(IER, TRANSMIT)
    old.send(b"x")
    assert not old.irq.level
    carry(old.uart, new.uart)
    assert new.irq.changes == []
    new.uart.resume()
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
    new.uart.resume()
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


def invariants(port):
    device = port.uart
    depth = 16 if device.fcr & 1 else 1
    assert len(device.received) <= depth
    assert len(device.to_send) <= depth
    assert device.can_receive() <= depth - len(device.received)
    lsr = device._lsr()
    assert bool(lsr & 1) == bool(device.received)
    assert lsr & 0x60 == (0 if device.to_send else 0x60)
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


def act(port, action, *arguments):
    if action == "read":
        value = port.read(*arguments)
        assert 0 <= value <= 255
        return value
    if action == "write":
        port.write(*arguments)
    elif action == "feed":
        port.chardev.feed(*arguments)
    elif action == "room":
        port.chardev.make_room(*arguments)
    elif action == "event":
        port.uart.handle_event(*arguments)
    else:
        port.chardev.loop.run_once(0)
    return None


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
        old.uart.resume()
        new.uart.resume()
        invariants(new)
        for action in [("loop",), *after]:
            # Without data RBR shows what was read last, which no state carries in full.
            if action != ("read", RBR) or old.uart.received:
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
        port.uart.resume()
        port.drain()
        assert len(port.uart.to_send) <= 17


def test_flood_of_input_stays_in_the_kernel(port):
    port.write(FCR, 1)
    for _ in range(100):
        port.chardev.feed(bytes(10000))
    assert len(port.uart.received) == 16
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
