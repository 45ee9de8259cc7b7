"""The one-port devices: debug exit, debug console, pvpanic."""

import pytest

from pyvmm.core.bus import Bus
from pyvmm.devices.debugcon import DebugConsole
from pyvmm.devices.debugexit import DebugExit
from pyvmm.devices.pvpanic import PvPanic


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
