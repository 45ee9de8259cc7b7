"""The mux: keys wherever a read happens to cut them, focus, and input that waits."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyvmm.chardev import mux as mux_module
from pyvmm.chardev.base import BREAK, CLOSED, MUX_IN, MUX_OUT, OPENED, RESIZED, Frontend
from pyvmm.chardev.mux import INPUT_LIMIT, LARGEST_COUNT, MuxChardev
from pyvmm.errors import ConfigError, VmStateError
from pyvmm.testing.memory_chardev import MemoryChardev


class Machine:
    """A mux on a chardev in memory, with two front ends as a machine has them."""

    def __init__(self, front_end, *, room=None):
        self.base = MemoryChardev("m-base", room=room)
        self.quits = 0
        self.mux = MuxChardev("m", self.base, self._quit)
        self.serial, self.monitor = front_end(), front_end()
        self.serial_chardev = self.mux.frontend_chardev(0)
        self.monitor_chardev = self.mux.frontend_chardev(1)

    def _quit(self):
        self.quits += 1

    def attach(self):
        self.serial_chardev.attach(self.serial)
        self.monitor_chardev.attach(self.monitor)
        return self

    def close(self):
        self.mux.close()
        self.base.close()


@pytest.fixture
def machine(recorder):
    machine = Machine(recorder).attach()
    yield machine
    machine.close()


def test_first_front_end_has_the_focus(machine):
    assert machine.serial.events == [MUX_IN, OPENED]
    assert machine.monitor.events == [MUX_OUT, OPENED]
    machine.base.feed(b"for the guest")
    assert (machine.serial.data, machine.monitor.data) == (b"for the guest", b"")
    assert machine.serial_chardev.focused
    assert not machine.monitor_chardev.focused


def test_switch(machine):
    machine.base.feed(b"guest\x01cmonitor\x01cguest")
    assert (machine.serial.data, machine.monitor.data) == (b"guestguest", b"monitor")
    assert machine.serial.events == [MUX_IN, OPENED, MUX_OUT, MUX_IN]
    assert machine.monitor.events == [MUX_OUT, OPENED, MUX_IN, MUX_OUT]


def test_quit(machine):
    machine.base.feed(b"\x01")
    assert machine.quits == 0
    machine.base.feed(b"x")
    assert machine.quits == 1
    assert machine.serial.data == b""


@pytest.mark.parametrize("keys", [b"\x01\x01", b"\x01a"])
def test_send_the_escape_itself(machine, keys):
    machine.base.feed(b"<" + keys + b">")
    assert machine.serial.data == b"<\x01>"


def test_break_goes_to_the_focus(machine):
    machine.base.feed(b"\x01b")
    assert BREAK in machine.serial.events
    assert BREAK not in machine.monitor.events


def test_unknown_key_is_dropped(machine):
    machine.base.feed(b"a\x01\xffb")
    assert machine.serial.data == b"ab"


def test_help_names_every_key(machine):
    machine.base.feed(b"\x01h")
    text = machine.base.take_output().decode()
    assert all(f"Ctrl-a {key} " in text for key in "hxcbt")
    assert text.count("\n") == text.count("\r\n")


def test_output_of_all_is_shared(machine):
    machine.serial_chardev.write(b"from the guest")
    machine.monitor_chardev.write(b", from the monitor")
    assert machine.base.take_output() == b"from the guest, from the monitor"


def test_events_of_the_base_reach_all(machine):
    machine.base.disconnect()
    machine.base.connect()
    machine.mux.handle_event(RESIZED)
    for frontend in (machine.serial, machine.monitor):
        assert frontend.events[-3:] == [CLOSED, OPENED, RESIZED]


def test_half_a_key_does_not_go_to_the_next_peer(machine):
    machine.base.feed(b"\x01")
    machine.base.disconnect()
    machine.base.connect()
    machine.base.feed(b"x")
    assert machine.quits == 0
    assert machine.serial.data == b"x"


def test_keys_work_under_a_guest_that_reads_nothing(machine):
    machine.serial.room = 0
    machine.base.feed(b"typed in vain" + b"\x01c" + b"info status\n")
    assert machine.monitor.data == b"info status\n"
    machine.serial.room = 100
    machine.serial_chardev.accept_input()
    machine.mux.loop.run_once(0)
    assert machine.serial.data == b"typed in vain"


def test_more_input_than_waits_here_waits_in_the_kernel(machine):
    machine.serial.room = 0
    data = bytes(range(2, 252)) * 20
    machine.base.feed(data)
    assert len(machine.base.unread) == len(data) - INPUT_LIMIT
    while machine.serial.data != data:
        machine.serial.room = 100
        machine.serial_chardev.accept_input()
        for _ in range(3):
            machine.mux.loop.run_once(0)


def test_other_front_end_is_not_held_up_by_a_full_one(machine):
    machine.serial.room = 0
    machine.base.feed(b"x" * INPUT_LIMIT)
    assert machine.mux.can_receive() == 0
    machine.mux.set_focus(1)
    machine.mux.loop.run_once(0)
    machine.base.feed(b"help")
    assert machine.monitor.data == b"help"


def test_short_write_wakes_only_who_waits(recorder):
    machine = Machine(recorder, room=4).attach()
    assert machine.serial_chardev.write(b"abcdef") == 4
    machine.base.make_room(None)
    assert (machine.serial.writable, machine.monitor.writable) == (1, 0)
    machine.base.make_room(None)
    assert machine.serial.writable == 1
    machine.close()


def test_too_many_front_ends(machine):
    machine.mux.frontend_chardev(LARGEST_COUNT - 1)
    with pytest.raises(ConfigError, match="chardev m has 4 users already"):
        machine.mux.frontend_chardev(LARGEST_COUNT)


def test_what_the_base_is_shows_through(machine):
    machine.base.window_size = lambda: (50, 132)
    assert machine.monitor_chardev.window_size() == (50, 132)
    assert machine.monitor_chardev.filename == machine.mux.filename == "mux"
    machine.base.disconnect()
    assert not machine.monitor_chardev.connected


# Time stamps.


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands until it is set."""
    now = [1000.0]
    monkeypatch.setattr(mux_module.time, "monotonic", lambda: now[0])
    return now


def test_time_stamps(machine, clock):
    machine.serial_chardev.write(b"before\n")
    machine.base.feed(b"\x01t")
    machine.base.take_output()
    clock[0] += 3723.456
    for chunk in (b"one\ntw", b"o\n", b"\n", b"three"):
        assert machine.serial_chardev.write(chunk) == len(chunk)
    stamp = b"[01:02:03.456] "
    assert machine.base.take_output() == b"%bone\n%btwo\n%b\n%bthree" % ((stamp,) * 4)
    machine.base.feed(b"\x01t")
    machine.serial_chardev.write(b" and on\nfour")
    assert machine.base.take_output() == b" and on\nfour"


@pytest.mark.parametrize("step", range(1, 20))
def test_time_stamps_cut_by_a_slow_peer(machine, clock, step):
    machine.base.feed(b"\x01t")
    data = b"one\ntwo\n"
    sent = 0
    machine.base.make_room(0)
    while sent < len(data):
        sent += machine.serial_chardev.write(data[sent:])
        machine.base.make_room(step)
    stamp = b"[00:00:00.000] "
    assert machine.base.take_output() == b"%bone\n%btwo\n" % (stamp, stamp)


# Streams of keys.


class Sink(Frontend):
    """Takes a few bytes at a time, or all."""

    def __init__(self):
        self.data = bytearray()
        self.room = 1 << 20

    def can_receive(self):
        return self.room

    def receive(self, data):
        assert 0 < len(data) <= self.room
        self.data += data


KEYS = st.lists(
    st.sampled_from([b"\x01", b"c", b"a", b"b", b"h", b"q", b"\r", b"\xff"]), max_size=60
).map(b"".join)


def expected(keys):
    """What the front ends get, by the book: one key after the other."""
    got = [bytearray(), bytearray()]
    focus = 0
    escaped = False
    for key in keys:
        if escaped:
            escaped = False
            if key in b"\x01a":
                got[focus].append(1)
            elif key == ord("c"):
                focus ^= 1
        elif key == 1:
            escaped = True
        else:
            got[focus].append(key)
    return got


@given(KEYS, st.data())
def test_cuts_make_no_difference(keys, data):
    machine = Machine(Sink).attach()
    rest = keys
    while rest:
        cut = data.draw(st.integers(1, len(rest)))
        machine.serial.room = data.draw(st.sampled_from([0, 1, 100]))
        machine.base.feed(rest[:cut])
        rest = rest[cut:]
    machine.serial.room = 1 << 20
    machine.serial_chardev.accept_input()
    machine.mux.loop.run_once(0)
    assert [machine.serial.data, machine.monitor.data] == expected(keys)
    machine.close()


@given(KEYS, st.data())
def test_an_exec_makes_no_difference(keys, data):
    cut = data.draw(st.integers(0, len(keys)))
    old = Machine(Sink).attach()
    old.serial.room = data.draw(st.sampled_from([0, 3, 1 << 20]))
    old.base.feed(keys[:cut])
    new = Machine(Sink)
    new.mux.load_state(old.mux.save_state())
    new.attach()
    new.base.feed(keys[cut:])
    new.mux.loop.run_once(0)
    got = [old.serial.data + new.serial.data, old.monitor.data + new.monitor.data]
    assert got == expected(keys)
    old.close()
    new.close()


def test_time_stamps_go_on_over_an_exec(recorder, clock):
    old = Machine(recorder).attach()
    old.base.feed(b"\x01t")
    clock[0] += 5
    old.serial_chardev.write(b"half")
    new = Machine(recorder)
    new.mux.load_state(old.mux.save_state())
    new.attach()
    clock[0] += 1
    new.serial_chardev.write(b" a line\nnext")
    assert new.base.take_output() == b" a line\n[00:00:06.000] next"
    old.close()
    new.close()


def test_focus_is_known_when_the_front_end_comes(recorder):
    old = Machine(recorder).attach()
    old.base.feed(b"\x01c")
    new = Machine(recorder)
    new.mux.load_state(old.mux.save_state())
    new.attach()
    assert new.serial.events == [MUX_OUT, OPENED]
    assert new.monitor.events == [MUX_IN, OPENED]
    old.close()
    new.close()


def full_state(recorder):
    machine = Machine(recorder).attach()
    machine.serial.room = 0
    machine.base.feed(b"waiting\x01c\x01t\x01")
    state = machine.mux.save_state()
    machine.close()
    return state


def test_state_cut_short(recorder):
    state = full_state(recorder)
    whole = state.index(b"waiting") + len(b"waiting")  # the second front end may be missing
    machine = Machine(recorder)
    for length in set(range(len(state))) - {whole, whole - 9}:
        with pytest.raises(VmStateError, match=r"^chardev/m: "):
            machine.mux.load_state(state[:length])
    machine.close()


@given(st.binary(max_size=40))
def test_state_of_random_bytes(state):
    machine = Machine(Sink)
    try:
        machine.mux.load_state(state)
    except VmStateError:
        assert machine.mux.focus == 0
    machine.attach()
    machine.base.feed(b"\x01h\x01c\x01t")
    machine.serial_chardev.write(b"x\n")
    machine.close()


@pytest.mark.parametrize(
    "state",
    [
        b"\x04" + bytes(11),  # focus
        b"\x00\x08" + bytes(10),  # flags
        bytes(12) + b"\0\0" * 5,  # front ends
        bytes(12) + (2 * INPUT_LIMIT + 1).to_bytes(2, "little") + bytes(2 * INPUT_LIMIT + 1),
        bytes(10) + (8193).to_bytes(2, "little") + bytes(8193),  # own output
    ],
)
def test_state_that_no_mux_has(machine, state):
    with pytest.raises(VmStateError, match="no mux can have"):
        machine.mux.load_state(state)
