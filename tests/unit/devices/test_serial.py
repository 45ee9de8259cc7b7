import pytest
from harness.uart import (
    DATA,
    IDLE,
    LINE,
    MODEM,
    MODEM_STATUS,
    NONE,
    RECEIVE,
    STATUS,
    THRE,
    TIMEOUT,
    TRANSMIT,
    TRIGGER_14,
)

from pyvmm.chardev.base import BREAK, CLOSED, MUX_IN, MUX_OUT, OPENED
from pyvmm.devices.serial import FCR, IER, IIR, LCR, LSR, MCR, MSR, RBR, SCR


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
    assert port.uart.regs.divider == 0x1234


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
    assert port.uart.regs.fcr == 0


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
