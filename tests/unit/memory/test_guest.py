import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyvmm.errors import InternalError
from pyvmm.memory.backend import RamBackend
from pyvmm.memory.config import RamConfig
from pyvmm.memory.guest import GuestMemory, GuestMemoryError, MemoryRegion
from pyvmm.x86 import layout

PAGE = 4096
WIDTHS = [8, 16, 32, 64]


def ram(size, id="ram0"):
    return RamBackend(RamConfig("memory-backend-ram", id, size))


@pytest.fixture
def memory():
    """Two adjacent regions from 0x1000, in backend order turned round, then a hole, then ROM."""
    memory = GuestMemory()
    backend, rom = ram(2 * PAGE), ram(PAGE, "rom")
    memory.add(MemoryRegion("b", 2 * PAGE, PAGE, backend, 0))
    memory.add(MemoryRegion("a", PAGE, PAGE, backend, PAGE))
    memory.add(MemoryRegion("rom", 4 * PAGE, PAGE, rom, readonly=True))
    memory.add(MemoryRegion("top", (1 << 64) - PAGE, PAGE, ram(PAGE)))
    return memory


def test_regions_are_ordered_by_address(memory):
    assert [region.name for region in memory.regions] == ["a", "b", "rom", "top"]


def test_access_over_a_border(memory):
    memory.write(2 * PAGE - 2, b"abcd")
    assert memory.read(2 * PAGE - 3, 6) == b"\0abcd\0"
    backend = memory.regions[0].backend
    assert backend.view[2 * PAGE - 2 :] == b"ab"
    assert backend.view[:2] == b"cd"


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("at", [PAGE, PAGE + 3, 2 * PAGE - 1, 3 * PAGE - 8])
def test_typed_access(memory, bits, at):
    memory.fill(PAGE, 2 * PAGE, 0xEE)
    value = 0x8899_AABB_CCDD_EEF1
    getattr(memory, f"write_u{bits}")(at, value)
    kept = value & ((1 << bits) - 1)
    assert getattr(memory, f"read_u{bits}")(at) == kept
    expected = b"\xee" + kept.to_bytes(bits // 8, "little") + b"\xee"
    if at > PAGE and at + bits // 8 < 3 * PAGE:
        assert memory.read(at - 1, bits // 8 + 2) == expected


@pytest.mark.parametrize("gpa", [PAGE, 2 * PAGE - 4])
def test_negative_values_are_cut(memory, gpa):
    memory.write_u64(gpa, -2)
    assert memory.read_u64(gpa) == (1 << 64) - 2


@pytest.mark.parametrize(
    ("gpa", "size"),
    [
        (0, 1),
        (PAGE - 1, 2),
        (3 * PAGE - 1, 2),
        (3 * PAGE, 1),
        (3 * PAGE, 2 * PAGE),
        (PAGE, 3 * PAGE),
        (PAGE, 4 * PAGE),
        (-1, 1),
        (-1, PAGE + 5),
        (PAGE, -1),
        (PAGE, -PAGE),
        ((1 << 64) - 1, 2),
        (1 << 64, 1),
        ((1 << 64) + PAGE, 1),
        (PAGE, 1 << 64),
        (PAGE, 1 << 200),
    ],
)
def test_bad_accesses(memory, gpa, size):
    with pytest.raises(GuestMemoryError) as caught:
        memory.read(gpa, size)
    assert (caught.value.gpa, caught.value.size) == (gpa, size)
    with pytest.raises(GuestMemoryError):
        memory.fill(gpa, size, 1)
    with pytest.raises(GuestMemoryError):
        memory.view(gpa, size)
    assert not memory.contains(gpa, size)


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("gpa", [-1, PAGE - 1, 3 * PAGE, 1 << 64, 1 << 70])
def test_bad_typed_accesses(memory, bits, gpa):
    if (bits, gpa) == (8, PAGE - 1):
        gpa = 0
    with pytest.raises(GuestMemoryError):
        getattr(memory, f"read_u{bits}")(gpa)
    with pytest.raises(GuestMemoryError):
        getattr(memory, f"write_u{bits}")(gpa, 1)


def test_a_write_that_fails_stores_nothing(memory):
    with pytest.raises(GuestMemoryError):
        memory.write(3 * PAGE - 2, b"abcd")
    assert memory.read(3 * PAGE - 2, 2) == b"\0\0"


def test_rom_is_read_but_not_written(memory):
    memory.regions[2].backend.view[:3] = b"ROM"
    assert memory.read(4 * PAGE, 3) == b"ROM"
    for attempt in (
        lambda: memory.write(4 * PAGE, b"x"),
        lambda: memory.write_u32(4 * PAGE, 1),
        lambda: memory.fill(4 * PAGE, 8),
        lambda: memory.view(4 * PAGE, 8),
    ):
        with pytest.raises(GuestMemoryError, match="only ROM"):
            attempt()
    view = memory.view(4 * PAGE, 3, writable=False)
    assert view == b"ROM"
    assert view.readonly
    assert memory.contains(4 * PAGE, 1, writable=False)


def test_last_byte_of_the_address_space(memory):
    memory.write((1 << 64) - 1, b"z")
    assert memory.read((1 << 64) - 2, 2) == b"\0z"


def test_view_is_the_memory_and_stays_in_one_region(memory):
    with memory.view(PAGE + 8, 4) as view:
        view[:] = b"wxyz"
    assert memory.read(PAGE + 8, 4) == b"wxyz"
    with pytest.raises(GuestMemoryError, match="two regions meet"):
        memory.view(2 * PAGE - 1, 2)
    assert len(memory.view(2 * PAGE, 0)) == 0


def test_fill_is_exact(memory):
    memory.fill(PAGE, 2 * PAGE, 1)
    memory.fill(2 * PAGE - 3, 5, 0xAB)
    assert memory.read(2 * PAGE - 4, 7) == b"\1" + b"\xab" * 5 + b"\1"


def test_fill_longer_than_its_step():
    memory = GuestMemory()
    memory.add(MemoryRegion("r", 0, 4 << 20, ram(4 << 20)))
    memory.fill(5, (3 << 20) + 1, 7)
    assert memory.read(4, 2) == b"\0\7"
    assert memory.read((3 << 20) + 5, 2) == b"\7\0"
    assert memory.read(5, (3 << 20) + 1).count(7) == (3 << 20) + 1


@given(st.integers(0, 3 * PAGE), st.binary(max_size=2 * PAGE))
def test_agrees_with_a_flat_model(at, data):
    memory = GuestMemory()
    backend = ram(3 * PAGE)
    for gpa, offset in ((0, 2 * PAGE), (PAGE, 0), (2 * PAGE, PAGE)):
        memory.add(MemoryRegion("r", gpa, PAGE, backend, offset))
    model = bytearray(3 * PAGE)
    if at + len(data) <= len(model):
        memory.write(at, data)
        model[at : at + len(data)] = data
    else:
        with pytest.raises(GuestMemoryError):
            memory.write(at, data)
    assert memory.read(0, 3 * PAGE) == model
    backend.close()


@pytest.mark.parametrize(
    "region",
    [
        (2 * PAGE, PAGE, 0),
        (PAGE + 1, PAGE, 0),
        (8 * PAGE, PAGE + 1, 0),
        (8 * PAGE, 3 * PAGE, 0),
        (8 * PAGE, PAGE, 2 * PAGE),
        (8 * PAGE, PAGE, -PAGE),
        (8 * PAGE, 0, 0),
        (-PAGE, PAGE, 0),
        (1 << 64, PAGE, 0),
        (0, 2 * PAGE, 0),
    ],
)
def test_regions_that_cannot_be(memory, region):
    gpa, size, offset = region
    with pytest.raises(InternalError):
        memory.add(MemoryRegion("bad", gpa, size, ram(2 * PAGE), offset))
    assert len(memory.regions) == 4


G = 1 << 30


@pytest.mark.parametrize(
    ("size", "ranges"),
    [
        (0x80000, [(0, 0x80000, 0)]),
        (2 << 20, [(0, 0xA0000, 0), (1 << 20, 1 << 20, 1 << 20)]),
        (3 * G, [(0, 0xA0000, 0), (1 << 20, 3 * G - (1 << 20), 1 << 20)]),
        (3 * G + PAGE, [(0, 0xA0000, 0), (1 << 20, 3 * G - (1 << 20), 1 << 20),
                        (4 * G, PAGE, 3 * G)]),
        (8 * G, [(0, 0xA0000, 0), (1 << 20, 3 * G - (1 << 20), 1 << 20), (4 * G, 5 * G, 3 * G)]),
    ],
)  # fmt: skip
def test_ram_is_split_around_the_32_bit_hole(size, ranges):
    assert layout.ram_ranges(size) == ranges


def test_both_sides_of_the_hole_are_one_backend():
    size = 3 * G + (1 << 20)
    backend = RamBackend(RamConfig("memory-backend-memfd", "ram0", size))
    memory = GuestMemory()
    memory.add_ram(backend, layout.ram_ranges(size))
    memory.write_u32(3 * G - 4, 0x11111111)
    memory.write_u32(4 * G, 0x22222222)
    assert backend.view[3 * G - 4 : 3 * G + 4] == b"\x11" * 4 + b"\x22" * 4
    for gpa in (3 * G - 2, 3 * G, 4 * G - 2):
        with pytest.raises(GuestMemoryError):
            memory.read_u32(gpa)
    backend.close()
