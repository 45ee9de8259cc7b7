import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyvmm.core.bus import Bus
from pyvmm.devices import acpi_pm
from pyvmm.devices.acpi_pm import AcpiPm
from pyvmm.errors import VmStateError
from pyvmm.testing.fake_irq import FakeIrq
from pyvmm.vmstate.cursor import Cursor

STATUS, ENABLE, CONTROL = 0x600, 0x602, 0x604
PWRBTN = 0x100


class Machine:
    """The device on a bus, with what it asked for."""

    def __init__(self):
        self.sci = FakeIrq(acpi_pm.SCI)
        self.offs = 0
        self.pm = AcpiPm(self.sci, self.power_off)
        self.bus = Bus("I/O", 1 << 16)
        self.bus.add(acpi_pm.IOBASE, acpi_pm.PORTS, self.pm, self.pm.name, width=acpi_pm.WIDTH)

    def power_off(self):
        self.offs += 1


@pytest.fixture
def machine():
    return Machine()


def test_registers_after_power_on(machine):
    values = [machine.bus.read(port, 2) for port in (STATUS, ENABLE, CONTROL)]
    assert values == [0, 0, 1]
    assert machine.sci.changes == []


def test_power_off(machine):
    machine.bus.write(CONTROL, 2, 0x2000)
    assert machine.offs == 1
    assert machine.bus.read(CONTROL, 2) == 1


@pytest.mark.parametrize("value", [0x0000, 0x2400, 0x2800, 0x3C00, 0x0020])
def test_other_writes_to_control_do_not_switch_off(machine, value):
    machine.bus.write(CONTROL, 2, value)
    assert machine.offs == 0
    assert machine.bus.read(CONTROL, 2) == value & 0x1C00 | 1


def test_power_off_by_bytes_and_across_registers(machine):
    machine.bus.write(CONTROL + 1, 1, 0x20)
    assert machine.offs == 1
    machine.bus.write(STATUS, 4, 0x20000000)
    assert machine.offs == 1
    machine.bus.write(ENABLE, 4, 0x20000100)
    assert machine.offs == 2
    assert machine.bus.read(ENABLE, 2) == PWRBTN
    # The half of the register that is not written counts as it is.
    machine.bus.write(CONTROL, 2, 0x1400)
    machine.bus.write(CONTROL, 1, 0x20)
    assert machine.offs == 2
    assert machine.bus.read(CONTROL, 2) == 0x1401
    machine.bus.write(ENABLE, 1, 0x21)
    assert machine.bus.read(ENABLE, 2) == PWRBTN | 0x21


def test_power_button(machine):
    machine.bus.write(ENABLE, 2, PWRBTN)
    assert machine.sci.changes == []
    machine.pm.handle_power_button()
    machine.pm.handle_power_button()
    assert machine.bus.read(STATUS, 2) == PWRBTN
    assert machine.sci.changes == [True]
    machine.bus.write(STATUS, 2, 0xFFFF & ~PWRBTN)
    assert machine.sci.level
    machine.bus.write(STATUS, 2, PWRBTN)
    assert machine.bus.read(STATUS, 2) == 0
    assert machine.sci.changes == [True, False]


def test_button_without_enable_raises_nothing_until_enabled(machine):
    machine.pm.handle_power_button()
    assert machine.sci.changes == []
    machine.bus.write(ENABLE + 1, 1, 0x01)
    assert machine.sci.changes == [True]


def test_reset(machine):
    machine.bus.write(ENABLE, 2, PWRBTN)
    machine.bus.write(CONTROL, 2, 0x0400)
    machine.pm.handle_power_button()
    machine.pm.reset()
    assert [machine.bus.read(port, 2) for port in (STATUS, ENABLE, CONTROL)] == [0, 0, 1]
    assert machine.sci.changes == [True, False]


def test_state_goes_over_with_the_button_pressed(machine, carry):
    machine.bus.write(ENABLE, 2, PWRBTN)
    machine.pm.handle_power_button()
    new = Machine()
    assert carry(machine.pm, new.pm) == bytes.fromhex("0100 0100 0001")
    # The irqchip has the level already; taking it back is a change.
    assert new.sci.changes == []
    new.bus.write(STATUS, 2, PWRBTN)
    assert new.sci.changes == [False]


@pytest.mark.parametrize(("at", "value"), [(0, 0x80), (2, 0x80), (4, 0x20), (1, 0x01)])
def test_impossible_state_is_refused(machine, encode, at, value):
    data = bytearray(encode(machine.pm))
    data[at] |= value
    with pytest.raises(VmStateError, match="bits that do not exist"):
        machine.pm.vmstate.load(Cursor(bytes(data)), 1)


accesses = st.tuples(
    st.booleans(), st.integers(0x5FE, 0x607), st.sampled_from([1, 2, 4, 8]), st.binary(min_size=8)
)


@given(st.lists(accesses, max_size=40))
def test_any_accesses_leave_a_state_that_loads(sequence):
    machine = Machine()
    for is_write, port, size, data in sequence:
        value = int.from_bytes(data[:size], "little")
        if is_write:
            machine.bus.write(port, size, value)
            machine.pm.handle_power_button()
        else:
            assert 0 <= machine.bus.read(port, size) < 1 << 8 * size
        assert machine.sci.level == bool(machine.pm.sts & machine.pm.en)
    data = bytearray()
    machine.pm.vmstate.save(data, machine.pm.save())
    machine.pm.vmstate.load(Cursor(bytes(data)), 1)
