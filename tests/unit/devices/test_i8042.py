import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyvmm.devices.i8042 import COMMAND, DATA, I8042, Port92
from pyvmm.errors import VmStateError
from pyvmm.vmstate.cursor import Cursor


@pytest.fixture
def resets():
    return []


@pytest.fixture
def keyboard(resets):
    return I8042(lambda: resets.append("reset"))


def command(device, value, data=None):
    device.on_write(COMMAND, 1, value)
    if data is not None:
        device.on_write(DATA, 1, data)


def answer(device):
    """The byte that the controller has to give, if any."""
    if not device.on_read(COMMAND, 1) & 1:
        return None
    value = device.on_read(DATA, 1)
    assert not device.on_read(COMMAND, 1) & 1
    return value


def test_never_busy(keyboard):
    assert keyboard.on_read(COMMAND, 1) == 0x18
    for value in range(256):
        command(keyboard, value)
        assert not keyboard.on_read(COMMAND, 1) & 2


@pytest.mark.parametrize("value", range(0xF0, 0x100))
def test_pulse_resets_if_it_pulls_the_reset_line(keyboard, resets, value):
    command(keyboard, value)
    assert len(resets) == (not value & 1)


def test_no_other_command_resets(keyboard, resets):
    for value in range(0xF0):
        command(keyboard, value, 0xFF)
    assert resets == []


def test_reset_by_the_output_port(keyboard, resets):
    command(keyboard, 0xD1, 0xDF)
    assert resets == []
    command(keyboard, 0xD1, 0xDE)
    assert resets == ["reset"]


def test_a20(keyboard):
    command(keyboard, 0xD0)
    assert answer(keyboard) == 0xCF
    command(keyboard, 0xD1, 0xDD)
    command(keyboard, 0xD0)
    assert answer(keyboard) == 0xDD
    command(keyboard, 0xDF)
    command(keyboard, 0xD0)
    assert answer(keyboard) == 0xDF
    command(keyboard, 0xDD)
    command(keyboard, 0xD0)
    assert answer(keyboard) == 0xDD


def test_what_a_driver_asks_at_start(keyboard):
    command(keyboard, 0xAA)
    assert keyboard.on_read(COMMAND, 1) == 0x1D
    assert answer(keyboard) == 0x55
    command(keyboard, 0xAB)
    assert answer(keyboard) == 0
    command(keyboard, 0x60, 0x65)
    assert keyboard.on_read(COMMAND, 1) & 8 == 0
    command(keyboard, 0x20)
    assert answer(keyboard) == 0x65


def test_there_is_no_port_for_a_mouse(keyboard):
    # As Linux looks for one: an echo that carries the mouse's status bit, or a port that works.
    command(keyboard, 0xD3, 0x5A)
    assert keyboard.on_read(COMMAND, 1) & 0x21 == 0x01
    assert answer(keyboard) == 0x5A
    command(keyboard, 0xA9)
    assert answer(keyboard) not in (0, 0xFA, 0xFF)


def test_no_keyboard_answers(keyboard):
    for value in range(256):
        keyboard.on_write(DATA, 1, value)
        assert answer(keyboard) is None


def test_command_takes_one_byte_of_data(keyboard):
    command(keyboard, 0x60, 0x65)
    keyboard.on_write(DATA, 1, 0xED)
    command(keyboard, 0x60)
    command(keyboard, 0xAD)
    keyboard.on_write(DATA, 1, 0x11)
    command(keyboard, 0x20)
    assert answer(keyboard) == 0x65


def test_ports_between(keyboard):
    keyboard.on_write(1, 1, 0xFE)
    assert [keyboard.on_read(port, 1) for port in (1, 2, 3)] == [0xFF] * 3
    assert answer(keyboard) is None


def test_reset_state(keyboard):
    command(keyboard, 0x60, 0x65)
    command(keyboard, 0xAA)
    command(keyboard, 0xD1)
    keyboard.reset()
    assert keyboard.on_read(COMMAND, 1) == 0x18
    keyboard.on_write(DATA, 1, 0xDE)
    command(keyboard, 0x20)
    assert answer(keyboard) == 0


def test_state_goes_over_between_a_command_and_its_data(keyboard, resets, carry):
    command(keyboard, 0x60, 0x65)
    command(keyboard, 0xAA)
    command(keyboard, 0xD1)
    new = I8042(lambda: resets.append("new"))
    assert carry(keyboard, new) == bytes([0xD1, 0x1D, 0x65, 0xCF, 0x55])
    assert resets == []
    assert answer(new) == 0x55
    new.on_write(DATA, 1, 0xDE)
    assert resets == ["new"]


@pytest.mark.parametrize(("at", "value"), [(0, 1), (0, 0xD0), (1, 0x02), (1, 0xE0)])
def test_impossible_state_is_refused(keyboard, encode, at, value):
    data = bytearray(encode(keyboard))
    data[at] = value
    with pytest.raises(VmStateError):
        keyboard.vmstate.load(Cursor(bytes(data)), 1)


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 4), st.integers(0, 255)), max_size=50))
def test_any_sequence_leaves_a_state_that_loads(accesses):
    device = I8042(lambda: None)
    for is_write, port, value in accesses:
        if is_write:
            device.on_write(port, 1, value)
        else:
            assert 0 <= device.on_read(port, 1) <= 255
    data = bytearray()
    device.vmstate.save(data, device.save())
    device.vmstate.load(Cursor(bytes(data)), 1)


def test_port92_resets_on_the_rising_bit(resets, carry):
    port = Port92(lambda: resets.append("reset"))
    assert port.on_read(0, 1) == 2
    port.on_write(0, 1, 0)
    assert (port.on_read(0, 1), resets) == (0, [])
    port.on_write(0, 1, 3)
    port.on_write(0, 1, 3)
    assert (port.on_read(0, 1), resets) == (3, ["reset"])
    new = Port92(lambda: resets.append("new"))
    carry(port, new)
    new.on_write(0, 1, 1)
    assert resets == ["reset"]
    new.reset()
    new.on_write(0, 1, 1)
    assert resets == ["reset", "new"]
