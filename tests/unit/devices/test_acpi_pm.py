import pytest
from harness.native import NativeBuses
from hypothesis import given
from hypothesis import strategies as st

from pyvmm.core.bus import Bus
from pyvmm.devices import acpi_pm
from pyvmm.devices.acpi_pm import AcpiPm
from pyvmm.errors import VmStateError
from pyvmm.testing.fake_irq import FakeIrq
from pyvmm.vmstate.cursor import Cursor

STATUS, ENABLE, CONTROL, TIMER = 0x600, 0x602, 0x604, 0x608
TMR, PWRBTN = 0x1, 0x100
HALF_NS = (1 << 23) * 10**9 // acpi_pm.TIMER_HZ + 1


class Machine:
    """The device on a bus, with what it asked for; a loop that only remembers."""

    def __init__(self):
        self.sci = FakeIrq(acpi_pm.SCI)
        self.offs = 0
        self.calls = []
        self.pm = AcpiPm(self.sci, self.power_off, self)
        self.bus = Bus("I/O", 1 << 16)
        self.bus.add(acpi_pm.IOBASE, acpi_pm.PORTS, self.pm, self.pm.name, width=acpi_pm.WIDTH)

    def power_off(self):
        self.offs += 1

    def call_soon(self, function):
        self.call_later(0, function)

    def call_later(self, delay_s, function):
        assert 0 <= delay_s < 2.4
        self.calls.append((delay_s, function))

    def run(self):
        """Do what the loop was asked to; how soon that was to be."""
        calls, self.calls = self.calls, []
        for _, function in calls:
            function()
        return [delay_s for delay_s, _ in calls]

    def status(self):
        return self.bus.read(STATUS, 2)


class Clock:
    """The host's boot clock, which stands; it has 40 bits more than the timer."""

    def __init__(self):
        self.now = 1 << 60

    def __call__(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(acpi_pm, "boottime", clock)
    return clock


@pytest.fixture
def machine():
    return Machine()


def test_registers_after_power_on(machine):
    values = [machine.bus.read(port, 2) for port in (STATUS, ENABLE, CONTROL)]
    assert values == [TMR, 0, 1]
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
    assert machine.bus.read(STATUS, 2) == PWRBTN | TMR
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
    assert [machine.bus.read(port, 2) for port in (STATUS, ENABLE, CONTROL)] == [TMR, 0, 1]
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
    st.booleans(), st.integers(0x5FE, 0x60D), st.sampled_from([1, 2, 4, 8]), st.binary(min_size=8)
)


@given(st.lists(accesses, max_size=40))
def test_any_accesses_leave_a_state_that_loads(sequence):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(acpi_pm, "boottime", Clock())
        _access_and_load(Machine(), sequence)


def _access_and_load(machine, sequence):
    for is_write, port, size, data in sequence:
        value = int.from_bytes(data[:size], "little")
        if is_write:
            machine.bus.write(port, size, value)
            machine.pm.handle_power_button()
        else:
            assert 0 <= machine.bus.read(port, size) < 1 << 8 * size
        assert machine.sci.level == bool(machine.status() & machine.pm.en)
        machine.run()
    data = bytearray()
    machine.pm.vmstate.save(data, machine.pm.save())
    machine.pm.vmstate.load(Cursor(bytes(data)), 1)


def test_timer_counts_24_bits_of_any_width(machine, clock):
    ticks = (clock.now * 3579545 // 10**9) & 0xFFFFFF
    assert machine.bus.read(TIMER, 4) == ticks
    assert machine.bus.read(TIMER, 2) == ticks & 0xFFFF
    assert machine.bus.read(TIMER + 1, 1) == ticks >> 8 & 0xFF
    assert machine.bus.read(CONTROL + 2, 2) == 0xFFFF
    clock.now += 10**9
    assert machine.bus.read(TIMER, 4) in ((ticks + 3579545 + more) & 0xFFFFFF for more in (0, 1))
    machine.bus.write(TIMER, 4, 0)
    assert machine.bus.read(TIMER, 4) in ((ticks + 3579545 + more) & 0xFFFFFF for more in (0, 1))


def test_status_tells_that_the_highest_bit_changed(machine, clock):
    machine.bus.write(STATUS, 2, TMR)
    assert machine.status() == 0
    highest = machine.bus.read(TIMER, 4) & 0x800000
    while not machine.status() & TMR:
        assert machine.bus.read(TIMER, 4) & 0x800000 == highest
        clock.now += HALF_NS // 1000
    assert machine.bus.read(TIMER, 4) & 0x800000 == highest ^ 0x800000
    machine.bus.write(STATUS, 2, 0xFFFF & ~TMR)
    assert machine.status() == TMR
    machine.bus.write(STATUS, 1, TMR)
    assert machine.status() == 0
    assert machine.sci.changes == machine.calls == []


def test_timer_interrupts_who_waits_for_it(machine, clock):
    machine.bus.write(STATUS, 2, TMR)
    machine.bus.write(ENABLE, 2, TMR)
    machine.bus.write(ENABLE, 2, TMR)
    assert machine.run() == [0]
    ((delay_s, _),) = machine.calls
    clock.now += int(delay_s * 10**9) - 1000
    machine.run()
    assert machine.sci.changes == []
    clock.now += 2000
    machine.run()
    assert machine.sci.changes == [True]
    assert machine.calls == []
    machine.bus.write(STATUS, 2, TMR)
    assert machine.sci.changes == [True, False]
    machine.run()
    clock.now += HALF_NS
    machine.run()
    assert machine.sci.changes == [True, False, True]


def test_timer_goes_on_over_an_update(machine, clock, carry):
    machine.bus.write(STATUS, 2, TMR)
    machine.bus.write(ENABLE, 2, TMR)
    clock.now += HALF_NS
    before = machine.bus.read(TIMER, 4)
    machine.run()
    assert machine.sci.level
    new = Machine()
    carry(machine.pm, new.pm)
    assert new.bus.read(TIMER, 4) == before
    assert new.sci.changes == []
    # When the guest is here: not before, since its irqchip may not be.
    new.pm.start()
    assert new.sci.changes == [True]
    new.bus.write(STATUS, 2, TMR)
    assert new.sci.changes == [True, False]


def test_guest_that_only_took_the_status_back_has_the_state_of_before(machine, clock, carry):
    """As kernels do when they start: it can go to versions without the timer."""
    machine.bus.write(STATUS, 2, 0xFFFF)
    new = Machine()
    assert len(carry(machine.pm, new.pm)) == 6
    assert new.status() == TMR


def test_timer_of_a_closed_machine_waits_for_nothing(machine, clock):
    machine.bus.write(STATUS, 2, TMR)
    machine.bus.write(ENABLE, 2, TMR)
    machine.pm.close()
    machine.run()
    assert machine.calls == []


@given(st.integers(-(1 << 63), (1 << 63) - 1) | st.integers(-(10**12), 10**12))
def test_native_code_reads_the_timer_as_python_does(offset):
    machine = Machine()
    buses = NativeBuses(machine.bus)
    machine.pm.offset = offset
    before, found, after = (bus.read(TIMER, 4) for bus in (machine.bus, buses, machine.bus))
    assert buses.answered == 1
    assert (found - before) % (1 << 24) <= (after - before) % (1 << 24) < 1 << 22


def test_all_else_comes_to_python(machine):
    buses = NativeBuses(machine.bus)
    for port in range(STATUS, TIMER + 4):
        for size in (1, 2, 4):
            if (port, size) != (TIMER, 4):
                buses.read(port, size)
            buses.write(port, size, 0)
    assert buses.answered == 0
