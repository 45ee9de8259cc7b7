"""pci-testdev, as kvm-unit-tests' programs use it."""

import os
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyvmm.core.bus import Bus
from pyvmm.devices.pci import function as pci
from pyvmm.devices.pci.testdev import KINDS, SIZES, PciTestdev
from pyvmm.errors import VmStateError
from pyvmm.testing.virtio_pci_driver import HIGH, IO, LOW, FakeBus
from pyvmm.vmstate.cursor import Cursor

HEADER = struct.Struct("<BBxxIII")


class Card:
    """The device, enabled, with its two BARs."""

    def __init__(self, membar=0):
        self.bus = FakeBus(Bus("memory", 1 << 64))
        self.fd = os.eventfd(0)
        self.device = PciTestdev(self.bus.host, self.fd, membar)
        self.bus.host.add(self.device.function, (1, 0))
        self.enable()

    def enable(self):
        self.bus.write(1, pci.COMMAND, 2, pci.COMMAND_IO | pci.COMMAND_MEMORY)

    def bar(self, number):
        bus, start = ((self.bus.mmio, LOW[0]), (self.bus.ports, IO[0]))[number]
        return (
            lambda at, size=1: bus.read(start + at, size),
            lambda at, value, size=1: bus.write(start + at, size, value),
        )

    def header(self, number):
        read, _ = self.bar(number)
        name = bytes(read(at) for at in range(16, 60)).split(b"\0")[0]
        return *HEADER.unpack(bytes(read(at) for at in range(16))), name.decode()

    def close(self):
        self.device.close()


@pytest.fixture
def card():
    card = Card()
    yield card
    card.close()


def test_function(card):
    assert card.bus.read(1, 0, 4) == 0x0005_1B36
    assert card.bus.read(1, pci.CLASS, 2) == 0xFF00
    assert card.bus.read(1, pci.INTERRUPT_PIN, 1) == 0
    assert [bar.size for bar in card.device.function.bars] == [*SIZES]


@pytest.mark.parametrize("number", [0, 1])
def test_tests_are_found_by_number(card, number):
    read, write = card.bar(number)
    found = []
    for test in range(len(KINDS)):
        write(0, test)
        found.append(card.header(number))
    first, at = number * 3, SIZES[number] // 2 + number * 3
    kind = ("mmio", "portio")[number]
    assert found == [
        (first, 1, at, 0xFA, 0, f"{kind}-no-eventfd"),
        (first + 1, 1, at + 1, 0xCE, 0, f"{kind}-wildcard-eventfd"),
        (first + 2, 1, at + 2, 0xFA, 0, f"{kind}-datamatch-eventfd"),
    ]
    write(0, len(KINDS))
    assert read(1) == 0  # no width: there is no such test


def test_writes_are_counted(card):
    for number in (0, 1):
        _, write = card.bar(number)
        write(0, 0)
        _, _, offset, data, *_ = card.header(number)
        for value in (data, data, data ^ 1):
            write(offset, value)
        write(offset + 1, data)
        assert card.header(number)[4] == 2
        write(0, 1)
        write(offset + 1, 77)  # any value
        assert card.header(number)[4] == 1


def test_kvm_signals_what_a_test_writes(card):
    kicks = card.bus.kicks.assigned
    card.bar(0)[1](0, 0)
    assert kicks == {}
    card.bar(0)[1](0, 1)
    assert kicks == {LOW[0] + 2049: (card.fd, 1)}
    card.bar(1)[1](0, 2)
    assert kicks == {IO[0] + 128 + 5: (card.fd, 1)}
    card.bus.write(1, pci.BAR0 + 4, 4, IO[0] + 0x400)
    assert kicks == {IO[0] + 0x400 + 128 + 5: (card.fd, 1)}
    card.device.reset()
    assert kicks == {}


def test_empty_bar():
    card = Card(1 << 30)
    card.bus.write(1, pci.BAR0 + 8, 4, 0xFFFFFFFF)
    assert card.bus.read(1, pci.BAR0 + 8, 4) == 0xC000000C
    card.bus.write(1, pci.BAR0 + 8, 4, HIGH[0] & 0xFFFFFFFF)
    assert card.bus.mmio.read(HIGH[0], 8) == (1 << 64) - 1
    card.close()


def test_state(card):
    card.bar(0)[1](0, 1)
    card.bar(0)[1](2049, 5)
    out = bytearray()
    card.device.vmstate.save(out, card.device.save())
    other = Card()
    other.device.load(other.device.vmstate.load(Cursor(bytes(out)), 1))
    assert other.header(0) == card.header(0)
    assert other.bus.kicks.assigned == {LOW[0] + 2049: (other.fd, 1)}
    out[-8:-4] = struct.pack(">i", 6)
    with pytest.raises(VmStateError, match="test 6 does not exist"):
        other.device.vmstate.load(Cursor(bytes(out)), 1)
    other.close()


@given(
    st.lists(
        st.tuples(
            st.integers(0, 2), st.integers(0, 4095) | st.just(0), st.sampled_from([1, 2, 4, 8]),
            st.integers(0, 255),
        )
    )
)  # fmt: skip
def test_any_accesses_leave_one_kick_at_most(accesses):
    card = Card()
    for number, offset, size, value in accesses:
        if number == 2:
            card.bus.write(1, pci.BAR0 + offset % 8 // 4 * 4, 4, LOW[0] + value * 4096)
        else:
            read, write = card.bar(number)
            write(offset % SIZES[number], value, size)
            read(offset % SIZES[number], size)
        assert len(card.bus.kicks.assigned) <= 1
    card.close()
