"""The host bridge and functions' configuration space, as a guest writes to it."""

import errno
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyvmm.core.bus import Bus, BusDevice
from pyvmm.core.threads import Lock
from pyvmm.devices.pci import function as pci
from pyvmm.devices.pci.function import Function, Kick
from pyvmm.devices.pci.host import ECAM_SIZE, PciHost
from pyvmm.errors import ConfigError, KvmError
from pyvmm.testing.virtio_pci_driver import ECAM, HIGH, IO, LINES, LOW, FakeBus
from pyvmm.vmstate.fields import Record

BOTH = pci.COMMAND_IO | pci.COMMAND_MEMORY
ONES = 0xFFFFFFFF


class Memory(BusDevice):
    """What is behind a BAR: answers with its number."""

    def __init__(self, number=0):
        self.lock = Lock()
        self.number = number

    def on_read(self, offset, size):
        return self.number


class Bench:
    """A bus with functions that have a BAR of each kind."""

    def __init__(self, count=2):
        self.mmio = Bus("memory", 1 << 64)
        self.bus = FakeBus(self.mmio)
        self.functions = [self.add(slot) for slot in range(1, count + 1)]

    def add(self, slot, number=0, multifunction=False):
        function = Function(
            f"f{slot}",
            vendor=0x1234,
            device=0x5678 + slot,
            class_code=0x020000,
            subsystem=(0x1AF4, 0x1100),
            has_interrupt=True,
        )
        memory = Memory(slot)
        function.add_bar(0, 256, memory, flags=pci.BAR_IO)
        function.add_bar(1, 0x1000, memory)
        function.add_bar(2, 0x4000, memory, flags=pci.BAR_64 | pci.BAR_PREFETCHABLE)
        self.bus.host.add(function, (slot, number), multifunction=multifunction)
        return function

    def read(self, slot, offset, size=4):
        return self.bus.read(slot, offset, size)

    def write(self, slot, offset, value, size=4):
        self.bus.write(slot, offset, size, value)

    def regions(self):
        found = [*self.bus.ports.regions, *self.mmio.regions]
        return {one.name: one.start for one in found if "BAR" in one.name}


@pytest.fixture
def bench():
    return Bench()


def test_registers_are_the_same_by_ports_and_in_memory(bench):
    assert bench.read(1, 0) == 0x5679_1234
    assert bench.mmio.read(ECAM + (1 << 15), 4) == 0x5679_1234
    for offset in range(0, 256, 4):
        assert bench.read(1, offset) == bench.mmio.read(ECAM + (1 << 15) + offset, 4)
        for size in (1, 2):
            for at in range(offset, offset + 4, size):
                assert bench.read(1, at, size) == bench.mmio.read(ECAM + (1 << 15) + at, size)
    bench.mmio.write(ECAM + (1 << 15) + pci.INTERRUPT_LINE, 1, 9)
    assert bench.read(1, pci.INTERRUPT_LINE, 1) == 9


def test_where_there_is_nothing_all_bits_are_ones(bench):
    assert bench.read(9, 0) == ONES
    assert bench.read(0, 0) == 0x0008_1B36
    # Beyond 256 bytes there are no registers; the bus has one function a slot here.
    for offset in (1 << 15 | 256, 1 << 15 | 0xFFC, 1 << 15 | 1 << 12, ECAM_SIZE - 4):
        assert bench.mmio.read(ECAM + offset, 4) == ONES
        bench.mmio.write(ECAM + offset, 4, 0)
    # Another bus, and the address register switched off.
    for address in (1 << 31 | 1 << 16 | 1 << 11, 1 << 11):
        bench.bus.ports.write(0xCF8, 4, address)
        assert bench.bus.ports.read(0xCFC, 4) == ONES


def test_address_register_takes_32_bits_alone(bench):
    ports = bench.bus.ports
    ports.write(0xCF8, 4, ONES)
    assert ports.read(0xCF8, 4) == 0x80FFFFFC
    for at, size in ((0xCF8, 1), (0xCF8, 2), (0xCF9, 1), (0xCFA, 2)):
        ports.write(at, size, 0)
        assert ports.read(at, size) == (1 << 8 * size) - 1
    assert ports.read(0xCF8, 4) == 0x80FFFFFC


def test_what_is_fixed_stays(bench):
    fixed = (0, 0x02, 0x06, 0x08, 0x0E, 0x2C, 0x30, 0x34, 0x3D, 0x3E)
    before = [bench.read(1, at, 2) for at in fixed]
    for offset in range(0, 256, 4):
        bench.write(1, offset, ONES)
        bench.write(1, offset, 0)
    assert [bench.read(1, at, 2) for at in fixed] == before


@pytest.mark.parametrize(
    ("index", "mask", "flags"), [(0, 0xFFFFFF00, 1), (1, 0xFFFFF000, 0), (2, 0xFFFFC000, 0xC)]
)
def test_size_of_a_bar_is_read_back(bench, index, mask, flags):
    at = pci.BAR0 + 4 * index
    bench.write(1, at, ONES)
    assert bench.read(1, at) == mask | flags
    if flags & pci.BAR_64:
        bench.write(1, at + 4, ONES)
        assert bench.read(1, at + 4) == ONES
    assert bench.read(1, pci.BAR0 + 16) == 0  # there is no such BAR


def test_bars_have_places_and_are_decoded_when_the_guest_says_so(bench):
    assert bench.regions() == {}
    bench.write(1, pci.COMMAND, pci.COMMAND_MEMORY, 2)
    assert bench.regions() == {"f1 BAR 1": LOW[0], "f1 BAR 2": HIGH[0]}
    bench.write(2, pci.COMMAND, pci.COMMAND_IO, 2)
    assert bench.regions()["f2 BAR 0"] == IO[0] + 256
    assert bench.bus.ports.read(IO[0] + 256, 1) == 2
    bench.write(1, pci.COMMAND, 0, 2)
    assert bench.regions() == {"f2 BAR 0": IO[0] + 256}


def test_bar_that_lies_in_the_way_is_nowhere_until_it_moves(bench):
    for slot in (1, 2):
        bench.write(slot, pci.COMMAND, pci.COMMAND_MEMORY, 2)
    bench.write(2, pci.BAR0 + 4, LOW[0])  # where that of slot 1 is
    assert bench.regions()["f1 BAR 1"] == LOW[0]
    assert "f2 BAR 1" not in bench.regions()
    assert bench.mmio.read(LOW[0], 1) == 1
    bench.write(1, pci.BAR0 + 4, LOW[0] + 0x10000)
    assert bench.regions()["f2 BAR 1"] == LOW[0]
    assert bench.mmio.read(LOW[0], 1) == 2


@pytest.mark.parametrize(
    "place", [0, 0x100000, LOW[0] - 0x1000, LOW[1], ECAM, 0xFEC00000, 0xFEE00000, 0xFFFFF000]
)
def test_bar_outside_of_the_windows_is_nowhere(bench, place):
    bench.write(1, pci.COMMAND, BOTH, 2)
    bench.write(1, pci.BAR0 + 4, place)
    assert "f1 BAR 1" not in bench.regions()
    bench.write(1, pci.BAR0, 0x3F8)
    assert "f1 BAR 0" not in bench.regions()
    bench.write(1, pci.BAR0 + 4, LOW[0] + 0x1000)
    assert bench.regions()["f1 BAR 1"] == LOW[0] + 0x1000


def test_kicks_move_with_their_bar(bench):
    kicks = bench.bus.kicks.assigned
    bench.functions[0].bars[1].kicks = [Kick(0x10, 2, 77), Kick(0x14, 2, 78)]
    bench.write(1, pci.COMMAND, pci.COMMAND_MEMORY, 2)
    assert kicks == {LOW[0] + 0x10: (77, 2), LOW[0] + 0x14: (78, 2)}
    bench.write(1, pci.BAR0 + 4, LOW[0] + 0x8000)
    assert kicks == {LOW[0] + 0x8010: (77, 2), LOW[0] + 0x8014: (78, 2)}
    bench.write(1, pci.COMMAND, 0, 2)
    assert kicks == {}


def test_host_that_has_no_room_for_a_kick_costs_nothing(bench, monkeypatch):
    def refuse(*_, **__):
        raise KvmError("KVM_IOEVENTFD", errno.ENOSPC)

    monkeypatch.setattr(bench.bus.kicks, "kick", refuse)
    monkeypatch.setattr(bench.bus.kicks, "unkick", refuse)
    bench.functions[0].bars[1].kicks = [Kick(0x10, 2, 77)]
    bench.write(1, pci.COMMAND, pci.COMMAND_MEMORY, 2)
    assert bench.mmio.read(LOW[0], 1) == 1
    bench.write(1, pci.COMMAND, 0, 2)
    assert bench.regions() == {}


# ---- interrupt lines -----------------------------------------------------------------------


def test_line_is_shared(bench):
    bus = bench.bus
    one, other = bench.functions[0], bench.add(5)  # the same line
    assert bench.read(5, pci.INTERRUPT_LINE, 1) == LINES[1]
    one.set_interrupt(True)
    other.set_interrupt(True)
    one.set_interrupt(False)
    assert bus.levels == [(LINES[1], True)]
    assert bench.read(5, pci.STATUS, 2) & pci.STATUS_INTERRUPT
    assert not bench.read(1, pci.STATUS, 2) & pci.STATUS_INTERRUPT
    bench.write(5, pci.COMMAND, pci.COMMAND_INTX_DISABLE, 2)
    assert bus.levels[-1] == (LINES[1], False)
    bench.write(5, pci.COMMAND, 0, 2)
    assert bus.levels[-1] == (LINES[1], True)


def test_line_of_a_state_is_not_driven_again(bench):
    function, bus = bench.functions[0], bench.bus
    function.load(Record(space=function.space), asserts=True)
    assert bus.levels == []
    assert bus.lines[1].level
    function.set_interrupt(False)
    assert bus.levels == [(LINES[1], False)]


# ---- life ----------------------------------------------------------------------------------


def test_reset_gives_what_firmware_leaves(bench):
    before = [bench.read(1, at) for at in range(0, 256, 4)]
    bench.write(1, pci.COMMAND, BOTH, 2)
    bench.write(1, pci.BAR0 + 8, LOW[0] + 0x100000)
    bench.write(1, pci.BAR0 + 12, 0)
    bench.write(1, pci.INTERRUPT_LINE, 200, 1)
    bench.functions[0].reset()
    assert [bench.read(1, at) for at in range(0, 256, 4)] == before
    assert bench.regions() == {}


def test_state_gives_the_same_registers_and_places(bench):
    bench.write(1, pci.COMMAND, BOTH, 2)
    bench.write(1, pci.BAR0 + 4, LOW[0] + 0x7000)
    other = Bench()
    state = Record(space=bench.functions[0].space)
    other.functions[0].check(state)
    other.functions[0].load(state, asserts=False)
    assert other.regions() == bench.regions()
    assert [other.read(1, at) for at in range(0, 256, 4)] == [
        bench.read(1, at) for at in range(0, 256, 4)
    ]


def test_state_of_another_function_is_refused(bench):
    with pytest.raises(ValueError, match="f1 has 0x7a at 0x2, where 0x79 is fixed"):
        bench.functions[0].check(Record(space=bench.functions[1].space))


def test_host_refuses_a_state_that_cannot_be(bench):
    host = bench.bus.host
    good = Record(address=0x80000000, bridge=Record(space=host.bridge.space))
    host.vmstate.check(good)
    with pytest.raises(ValueError, match="address 0x1 has bits"):
        host.vmstate.check(Record(address=1, bridge=good.bridge))
    assert PciHost.vmstate.name == host.vmstate.name == "pci-host"


def test_place_that_is_taken_and_windows_that_are_full():
    bench = Bench(1)
    with pytest.raises(ConfigError, match=r"addr=1\.0 has a device already"):
        bench.add(1)
    huge = Function("huge", vendor=1, device=1, class_code=0)
    huge.add_bar(0, 1 << 30, Memory())
    with pytest.raises(ConfigError, match="no addresses for so many"):
        bench.bus.host.add(huge, (2, 0))


def test_functions_of_one_slot_are_found():
    bench = Bench(0)
    bench.add(1, multifunction=True)
    bench.add(1, 3)
    assert bench.read(1, pci.HEADER_TYPE, 1) == pci.MULTIFUNCTION
    assert bench.mmio.read(ECAM + (1 << 15) + (3 << 12) + pci.HEADER_TYPE, 1) == 0
    assert bench.mmio.read(ECAM + (1 << 15) + (3 << 12), 2) == 0x1234


def test_two_vcpus_move_bars_at_once(bench):
    """Each its own, to where the other's may be; a third looks: it finds one of them, or nobody."""
    places = [LOW[0] + number * 0x1000 for number in range(4)]
    for slot in (1, 2):
        bench.write(slot, pci.COMMAND, BOTH, 2)
    errors, seen, ends = [], set(), threading.Event()

    def vcpu(slot):
        try:
            for turn in range(2000):
                # In memory: the address register of the ports is shared, as on a board.
                at = ECAM + (slot << 15)
                bench.mmio.write(at + pci.BAR0 + 4, 4, places[turn * slot % 4])
                bench.mmio.write(at + pci.COMMAND, 2, BOTH if turn % 7 else 0)
        except Exception as error:
            errors.append(error)

    def looker():
        while not ends.is_set():
            seen.update(bench.mmio.read(place, 1) for place in places)

    vcpus = [threading.Thread(target=vcpu, args=(slot,)) for slot in (1, 2)]
    third = threading.Thread(target=looker)
    for thread in (*vcpus, third):
        thread.start()
    for thread in vcpus:
        thread.join()
    ends.set()
    third.join()
    assert errors == []
    assert seen <= {1, 2, 0xFF}
    for slot, place in ((1, places[0]), (2, places[1])):
        bench.write(slot, pci.COMMAND, BOTH, 2)
        bench.write(slot, pci.BAR0 + 4, place)
    assert bench.mmio.read(places[0], 1) == 1
    assert bench.mmio.read(places[1], 1) == 2


@pytest.mark.parametrize("size", [0x1000, 0x4000])
def test_bar_over_another_device_takes_nothing_from_it(bench, size):
    """Whatever is in a window before: the bus has it, and the BAR comes when it has gone."""
    other = bench.mmio.add(LOW[0] + 0x10000, 0x1000, Memory(9), "other")
    bench.write(1, pci.COMMAND, BOTH, 2)
    index = 1 if size == 0x1000 else 2
    at = pci.BAR0 + 4 * index
    bench.write(1, at, LOW[0] + 0x10000)
    if index == 2:
        bench.write(1, at + 4, 0)
    assert bench.mmio.read(LOW[0] + 0x10000, 1) == 9
    assert f"f1 BAR {index}" not in bench.regions()
    bench.mmio.remove(other)
    bench.write(1, pci.COMMAND, BOTH, 2)
    assert bench.mmio.read(LOW[0] + 0x10000, 1) == 1


VALUES = st.sampled_from([0, 1, 4, 0xC, BOTH, LOW[0], LOW[0] + 0x1000, IO[0] | 1, ONES])
WRITES = st.tuples(
    st.integers(0, 3),
    st.sampled_from([pci.COMMAND, *range(pci.BAR0, pci.BAR0 + 24, 4)]) | st.integers(0, 255),
    st.sampled_from([1, 2, 4]),
    VALUES | st.integers(0, ONES),
)


@given(st.lists(WRITES, max_size=60))
def test_any_writes_leave_bars_in_their_windows_and_apart(writes):
    bench = Bench()
    for slot, offset, size, value in writes:
        bench.write(slot, offset, value & (1 << 8 * size) - 1, size)
        bench.read(slot, offset, size)
        for bus in (bench.bus.ports, bench.mmio):
            regions = [one for one in bus.regions if "BAR" in one.name]
            for one in regions:
                ranges = (IO,) if bus is bench.bus.ports else (LOW, HIGH)
                assert any(start <= one.start and one.end <= end for start, end in ranges)
    for function in bench.functions:
        function.reset()
        for bar in function.bars:
            assert bar.region is None
        bench.write(function.slot, pci.COMMAND, BOTH, 2)
    assert len(bench.regions()) == 6
