"""The one-port devices: debug exit, debug console, pvpanic, POST codes."""

import pytest
from harness.native import NativeBuses
from hypothesis import given
from hypothesis import strategies as st

from pyvmm.core.bus import Bus, Nobody
from pyvmm.devices.debugcon import DebugConsole
from pyvmm.devices.debugexit import DebugExit
from pyvmm.devices.output import SIZE
from pyvmm.devices.pvpanic import PvPanic
from pyvmm.testing.memory_chardev import MemoryChardev


@pytest.fixture
def bus():
    return Bus("I/O", 1 << 16)


@pytest.mark.parametrize(
    ("size", "value", "code"), [(1, 0, 1), (1, 0x31, 0x63), (2, 0xFFFF, 0xFF), (4, 0x10, 0x21)]
)
def test_debug_exit_tells_the_code_once(bus, size, value, code):
    codes = []
    device = DebugExit(codes.append, iobase=0xF4, iosize=4)
    bus.add(0xF4, 4, device, device.name, width=device.width)
    assert bus.read(0xF4, size) == 0
    assert codes == []
    bus.write(0xF4, size, value)
    assert codes == [code]
    assert device.properties() == {"iobase": 0xF4, "iosize": 4}


def test_debug_exit_is_where_qemu_has_it():
    assert DebugExit(print).properties() == {"iobase": 0x501, "iosize": 2}


def test_debug_console_writes_to_its_chardev(bus, memory_chardev):
    chardev = memory_chardev(room=5)
    device = DebugConsole(chardev)
    bus.add(device.iobase, 1, device, device.name)
    assert bus.read(0xE9, 1) == 0xE9
    for byte in b"hello, world":
        bus.write(0xE9, 1, byte)
    assert chardev.take_output() == b"hello"
    assert device.dropped == 7
    assert device.properties() == {"iobase": 0xE9, "chardev": "memory0", "readback": 0xE9}


def test_debug_console_without_chardev(bus):
    device = DebugConsole()
    bus.add(device.iobase, 1, device, device.name)
    bus.write(0xE9, 1, 65)
    assert bus.read(0xE9, 1) == 0xE9
    assert device.properties()["chardev"] == ""


def console(chardev):
    """A debug console on buses whose accesses native code is asked for first."""
    device = DebugConsole(chardev)
    device.prepare()
    device.attach()
    if chardev is not None:
        chardev.loop.run_once(0)
    bus = Bus("I/O", 1 << 16)
    bus.add(device.iobase, 1, device, device.name)
    return device, NativeBuses(bus)


steps = st.one_of(
    st.tuples(st.just("write"), st.sampled_from([1, 2, 4]), st.integers(0, 0xFFFFFFFF)),
    st.tuples(st.just("read"), st.sampled_from([1, 2, 4])),
    st.tuples(st.just("flush")),
)


@given(st.lists(steps, max_size=40))
def test_debug_console_is_the_same_natively(sequence):
    chardevs = MemoryChardev(), MemoryChardev()
    (native, buses), (python, _) = map(console, chardevs)
    bus = Bus("I/O", 1 << 16)
    bus.add(python.iobase, 1, python, python.name)
    try:
        for action, *arguments in sequence:
            if action == "write":
                size, value = arguments
                for each in (buses, bus):
                    each.write(0xE9, size, value & (1 << 8 * size) - 1)
            elif action == "read":
                assert buses.read(0xE9, *arguments) == bus.read(0xE9, *arguments)
            else:
                native.drain()
        native.drain()
        assert chardevs[0].take_output() == chardevs[1].take_output()
    finally:
        for device, chardev in ((native, chardevs[0]), (python, chardevs[1])):
            device.close()
            chardev.close()


def test_debug_console_writes_in_batches_and_drops_what_is_not_taken(memory_chardev):
    chardev = memory_chardev(room=SIZE + 2)
    device, buses = console(chardev)
    for _ in range(SIZE + 5):
        buses.write(0xE9, 1, 65)
    assert buses.answered >= SIZE
    assert chardev.output
    device.drain()
    assert chardev.take_output() == b"A" * (SIZE + 2)
    assert device.dropped == 3
    buses.write(0xE9, 1, 66)
    chardev.make_room(None)
    chardev.loop.run_once(0)
    assert chardev.take_output() == b"B"
    buses.write(0xE9, 1, 67)
    device.close()
    assert chardev.take_output() == b"C"


def test_debug_console_without_chardev_needs_no_interpreter():
    _, buses = console(None)
    buses.write(0xE9, 1, 65)
    assert buses.read(0xE9, 1) == 0xE9
    assert buses.answered == 2


@pytest.mark.parametrize("size", [1, 2, 4])
def test_nobody_is_at_the_port_of_post_codes(bus, size):
    before = bus.read(0x80, size)
    bus.add(0x80, 1, Nobody(), "post-code")
    buses = NativeBuses(bus)
    buses.write(0x80, size, 0x5A)
    assert buses.read(0x80, size) == bus.read(0x80, size) == before == (1 << 8 * size) - 1
    assert buses.answered == (2 if size == 1 else 0)


@pytest.mark.parametrize(
    ("value", "events"), [(1, [1]), (2, [2]), (4, [4]), (7, [1]), (0, []), (0xF8, []), (0xFA, [2])]
)
def test_pvpanic_reports_the_gravest_known_event(bus, value, events):
    seen = []
    device = PvPanic(seen.append)
    bus.add(0x505, 1, device, device.name)
    assert bus.read(0x505, 1) == 7
    bus.write(0x505, 1, value)
    assert seen == events
    assert device.properties() == {"ioport": 0x505, "events": 7}
    assert PvPanic(seen.append, ioport=0x510).properties()["ioport"] == 0x510
