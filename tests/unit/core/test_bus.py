import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyvmm.core.bus import Bus, BusDevice
from pyvmm.core.threads import Lock, spawn
from pyvmm.errors import InternalError


class Ram(BusDevice):
    """Remembers bytes, and every access."""

    def __init__(self, length):
        self.lock = Lock()
        self.bytes = bytearray(range(length))
        self.accesses = []

    def on_read(self, offset, size):
        self._note("read", offset, size)
        return int.from_bytes(self.bytes[offset : offset + size], "little")

    def on_write(self, offset, size, value):
        self._note("write", offset, size)
        self.bytes[offset : offset + size] = value.to_bytes(size, "little")

    def _note(self, kind, offset, size):
        assert self.lock.locked()
        assert size in (1, 2, 4, 8)
        assert offset + size <= len(self.bytes)
        self.accesses.append((kind, offset, size))


@pytest.fixture
def bus():
    return Bus("I/O", 1 << 16)


def test_device_sees_offset_size_and_cut_value(bus):
    ram = Ram(8)
    bus.add(0x100, 8, ram, "ram", width=8)
    assert bus.read(0x102, 2) == 0x0302
    bus.write(0x104, 2, 0xABCDEF)
    assert ram.bytes[4:8] == b"\xef\xcd\x06\x07"
    assert ram.accesses == [("read", 2, 2), ("write", 4, 2)]
    assert not ram.lock.locked()


def test_answer_is_cut_to_the_size(bus):
    class Loud(BusDevice):
        lock = Lock()

        def on_read(self, offset, size):
            return -1

    bus.add(0, 8, Loud(), "loud", width=8)
    assert [bus.read(0, size) for size in (1, 2, 4, 8)] == [
        0xFF,
        0xFFFF,
        0xFFFFFFFF,
        0xFFFFFFFFFFFFFFFF,
    ]


def test_nobody_answers(bus):
    assert [bus.read(0x80, size) for size in (1, 2, 4)] == [0xFF, 0xFFFF, 0xFFFFFFFF]
    bus.write(0x80, 4, 0)
    assert bus.read(0xFFFF, 4) == 0xFFFFFFFF
    assert bus.find(0x80) is None


def test_default_device_reads_ones_and_takes_writes(bus):
    device = BusDevice()
    device.lock = Lock()
    bus.add(0, 4, device, "plain", width=4)
    bus.write(0, 4, 0)
    assert bus.read(0, 4) == 0xFFFFFFFF


def test_wide_access_is_split_lowest_first(bus):
    ram = Ram(8)
    bus.add(0, 8, ram, "ram", width=2)
    assert bus.read(0, 8) == 0x0706050403020100
    assert ram.accesses == [("read", at, 2) for at in (0, 2, 4, 6)]


def test_access_across_two_devices_and_a_gap(bus):
    low, high = Ram(2), Ram(4)
    bus.add(0x10, 2, low, "low")
    bus.add(0x13, 4, high, "high", width=4)
    assert bus.read(0x10, 4) == 0x00FF0100
    bus.write(0x10, 8, 0x8877665544332211)
    assert low.bytes == b"\x11\x22"
    assert high.bytes == b"\x44\x55\x66\x77"


def test_lock_is_free_after_a_device_failed(bus):
    class Broken(BusDevice):
        lock = Lock()

        def on_read(self, offset, size):
            raise RuntimeError

    bus.add(0, 1, Broken(), "broken")
    with pytest.raises(RuntimeError):
        bus.read(0, 1)
    assert not Broken.lock.locked()


@pytest.mark.parametrize(("start", "length"), [(-1, 4), (0, 0), (0xFFFE, 3), (0x10000, 1)])
def test_region_must_fit_the_bus(bus, start, length):
    with pytest.raises(InternalError, match="does not fit the I/O bus"):
        bus.add(start, length, Ram(8), "ram")


@pytest.mark.parametrize(("start", "length"), [(0x20, 1), (0x1F, 2), (0x27, 1), (0x10, 0x40)])
def test_regions_must_not_overlap(bus, start, length):
    bus.add(0x20, 8, Ram(8), "first")
    with pytest.raises(InternalError, match="overlaps first"):
        bus.add(start, length, Ram(8), "second")
    assert len(bus.regions) == 1


def test_neighbours_are_found_whatever_the_order(bus):
    for start in (0x28, 0x18, 0x20):
        bus.add(start, 8, Ram(8), f"{start:#x}")
    assert [region.start for region in bus.regions] == [0x18, 0x20, 0x28]
    found = [bus.find(address) for address in (0x17, 0x18, 0x1F, 0x20, 0x2F, 0x30)]
    names = [region and region.name for region in found]
    assert names == [None, "0x18", "0x18", "0x20", "0x28", None]


regions = st.lists(
    st.tuples(st.integers(0, 30), st.integers(1, 12), st.sampled_from([1, 2, 4, 8])), max_size=6
)


@given(regions, st.integers(0, 40), st.sampled_from([1, 2, 4, 8]), st.binary(min_size=8))
def test_any_access_to_any_map_is_what_its_bytes_say(layout, address, size, data):
    bus = Bus("memory", 64)
    for start, length, width in layout:
        try:
            bus.add(start, length, Ram(length), "ram", width=width)
        except InternalError:
            continue
    expected = bytearray(b"\xff" * 64)
    for region in bus.regions:
        expected[region.start : region.end] = region.device.bytes
    assert bus.read(address, size) == int.from_bytes(expected[address : address + size], "little")
    bus.write(address, size, int.from_bytes(data[:size], "little"))
    expected[address : address + size] = data[:size]
    for region in bus.regions:
        assert region.device.bytes == expected[region.start : region.end]


# ---- regions that go and move ----------------------------------------------------------------


def test_region_that_was_removed_answers_no_more(bus):
    low, high = Ram(4), Ram(4)
    region = bus.add(0x10, 4, low, "low")
    bus.add(0x14, 4, high, "high")
    bus.remove(region)
    assert bus.read(0x10, 1) == 0xFF
    assert bus.read(0x14, 1) == 0
    assert low.accesses == []
    with pytest.raises(InternalError, match="low is not on the I/O bus"):
        bus.remove(region)
    assert bus.add(0x10, 4, low, "low").start == 0x10


def test_region_moves_with_its_device_and_width(bus):
    ram = Ram(8)
    before = bus.add(0x10, 8, ram, "ram", width=4)
    after = bus.move(before, 0x14)  # over a part of itself
    assert (before.start, after.start, after.end) == (0x10, 0x14, 0x1C)
    assert bus.read(0x14, 4) == 0x03020100
    assert ram.accesses == [("read", 0, 4)]
    assert bus.read(0x10, 4) == 0xFFFFFFFF
    with pytest.raises(InternalError, match="is not on"):
        bus.move(before, 0x20)


@pytest.mark.parametrize(("start", "words"), [(0x1C, "overlaps"), (0xFFFC, "fit"), (-1, "fit")])
def test_region_that_cannot_move_stays(bus, start, words):
    ram = Ram(8)
    region = bus.add(0x10, 8, ram, "ram")
    bus.add(0x20, 8, Ram(8), "other")
    with pytest.raises(InternalError, match=words):
        bus.move(region, start)
    assert bus.find(0x10) is region
    assert len(bus.regions) == 2


def test_device_moves_itself_from_within_an_access(bus):
    """As a function does whose BAR is written."""

    class Bar(Ram):
        def on_write(self, offset, size, value):
            self.region = bus.move(self.region, value)

    device = Bar(4)
    device.region = bus.add(0x10, 4, device, "bar")
    bus.write(0x10, 1, 0x40)
    assert bus.read(0x40, 1) == 0
    assert bus.find(0x10) is None


def test_access_sees_one_map_while_regions_move(bus):
    """Two threads each move one of many regions, and a third looks: nothing that stays is ever
    missing, and no device is entered at an offset that it does not have."""
    staying = [bus.add(0x1000 + 16 * number, 8, Ram(8), "stays") for number in range(50)]
    failures, ended = [], []

    def move(region, places):
        for turn in range(3000):
            region = bus.move(region, places[turn % len(places)])
        ended.append(region)

    movers = [(bus.add(at, 8, Ram(8), "moves"), (0x2000 + at, at)) for at in (0x100, 0x200)]
    for mover in movers:
        spawn(lambda mover=mover: move(*mover), failures.append)
    while len(ended) + len(failures) < len(movers):
        for region in staying:
            assert bus.find(region.start) is region
        for at in (0x100, 0x2100, 0x200, 0x2200):
            bus.read(at, 1)  # Ram asserts the offset
    assert failures == []
    assert len(bus.regions) == 52
