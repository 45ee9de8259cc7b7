import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyvmm.core.bus import Bus
from pyvmm.devices.pc_testdev import PcTestdev

PORT, FLUSH, BYTES, LINES, MEMORY = 0xE0, 0xE4, 0xE8, 0x2000, 0xFF000000


class Machine:
    """The device on its buses."""

    def __init__(self):
        self.lines, self.flushed = [], []
        self.device = PcTestdev(lambda *line: self.lines.append(line), self.flushed.append)
        self.ports, self.mmio = Bus("I/O", 1 << 16), Bus("memory", 1 << 64)
        for start, count, width, part in self.device.ports:
            self.ports.add(start, count, part, "pc-testdev", width=width)
        start, count, width, part = self.device.memory
        self.mmio.add(start, count, part, "pc-testdev", width=width)


@pytest.fixture
def machine():
    return Machine()


def test_register_of_every_width(machine):
    machine.ports.write(PORT, 4, 0x12345678)
    assert machine.ports.read(PORT, 4) == machine.ports.read(BYTES, 4) == 0x12345678
    machine.ports.write(PORT + 2, 2, 0xABCD)
    machine.ports.write(BYTES, 2, 0x1122)
    machine.ports.write(PORT + 1, 1, 0x99)
    assert machine.ports.read(PORT, 4) == 0xABCD9922
    assert machine.ports.read(PORT + 3, 1) == 0xAB


def test_interrupt_lines(machine):
    machine.ports.write(LINES + 5, 1, 0x80)
    machine.ports.write(LINES + 5, 1, 0)
    machine.ports.write(LINES + 22, 2, 0x0001)
    assert machine.lines == [(5, True), (5, False), (22, True), (23, False)]
    assert machine.ports.read(LINES, 1) == 0


def test_page_is_flushed(machine):
    machine.ports.write(FLUSH, 4, 0x12345678)
    machine.ports.write(FLUSH, 2, 0x1000)
    assert machine.flushed == [0x12345000]
    assert machine.ports.read(FLUSH, 4) == 0


@given(st.integers(0, 0xFFF8), st.sampled_from([1, 2, 4, 8]), st.binary(min_size=8, max_size=8))
def test_memory_keeps_what_is_written(offset, size, data):
    machine = Machine()
    machine.mmio.write(MEMORY + offset, size, int.from_bytes(data[:size], "little"))
    assert machine.mmio.read(MEMORY + offset, 8).to_bytes(8, "little")[:size] == data[:size]
    assert sum(machine.device.iomem) == sum(data[:size])


def test_state_goes_over(machine, carry):
    machine.ports.write(PORT, 4, 0x12345678)
    machine.mmio.write(MEMORY + 0xFFF8, 8, 1 << 63)
    new = Machine()
    carry(machine.device, new.device)
    assert new.ports.read(PORT, 4) == 0x12345678
    assert new.mmio.read(MEMORY + 0xFFF8, 8) == 1 << 63
    machine.device.reset()
    assert machine.ports.read(PORT, 4) == machine.mmio.read(MEMORY + 0xFFF8, 8) == 0
