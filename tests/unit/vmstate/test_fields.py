import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyvmm.errors import VmStateError
from pyvmm.vmstate.cursor import Cursor
from pyvmm.vmstate.fields import (
    Array,
    Buffer,
    CStruct,
    Description,
    Record,
    Scalar,
    Struct,
    StructArray,
    Table,
    boolean,
    i32,
    i64,
    u8,
    u16,
    u32,
    u64,
)

RANGES = {
    "uint8": (0, 0xFF),
    "uint16": (0, 0xFFFF),
    "uint32": (0, 0xFFFFFFFF),
    "uint64": (0, (1 << 64) - 1),
    "int32": (-(1 << 31), (1 << 31) - 1),
    "int64": (-(1 << 63), (1 << 63) - 1),
}

POINT = Description("point", [u8("x"), i32("y")], version=2)
EXTRA = Description(
    "whole/extra", [u16("extra")], version=3, minimum_version=2, needed=lambda state: state.extra
)


def no_odd_flag(state):
    if state.flag and state.count % 2:
        raise ValueError("flag with an odd count")


WHOLE = Description(
    "whole",
    [
        u64("wide"),
        boolean("flag"),
        u32("count"),
        Buffer("data", "count", maximum=9),
        Array("words", "uint16", 3),
        Struct("point", POINT),
        StructArray("points", POINT, "count", maximum=9),
        i64("last"),
    ],
    subsections=[EXTRA],
    check=no_odd_flag,
)


def encode(description, state):
    out = bytearray()
    description.save(out, state)
    return bytes(out)


def decode(description, data):
    """The record; the whole of ``data`` must have been read."""
    source = Cursor(data)
    record = description.load(source, description.version)
    assert source.at == len(data)
    return record


def plain(record):
    """A record as nested dicts, which compare."""
    if isinstance(record, Record):
        return {name: plain(value) for name, value in record.__dict__.items()}
    return [plain(item) for item in record] if isinstance(record, list) else record


def number(kind):
    return st.integers(*RANGES[kind])


points = st.builds(Record, x=number("uint8"), y=number("int32"))


@st.composite
def wholes(draw):
    count = draw(st.integers(0, 9))
    return Record(
        wide=draw(number("uint64")),
        flag=draw(st.booleans()) and count % 2 == 0,
        count=count,
        data=draw(st.binary(min_size=count, max_size=count)),
        words=draw(st.lists(number("uint16"), min_size=3, max_size=3)),
        point=draw(points),
        points=draw(st.lists(points, min_size=count, max_size=count)),
        last=draw(number("int64")),
        extra=draw(number("uint16")),
    )


def example(**changes):
    values = {
        "wide": 1,
        "flag": False,
        "count": 2,
        "data": b"ab",
        "words": [1, 2, 3],
        "point": Record(x=4, y=-5),
        "points": [Record(x=6, y=7), Record(x=8, y=9)],
        "last": -1,
        "extra": 0,
    }
    return Record(**values | changes)


@pytest.mark.parametrize("kind", RANGES)
def test_scalar_is_big_endian_and_keeps_its_range(kind):
    description = Description("one", [Scalar("value", kind)])
    low, high = RANGES[kind]
    size = (high - low + 1).bit_length() // 8
    for value in (low, 0, 1, 0x5A, high):
        data = encode(description, Record(value=value))
        assert data == value.to_bytes(size, "big", signed=low < 0)
        assert decode(description, data).value == value


def test_bool_reads_any_byte_but_zero_as_true():
    description = Description("one", [boolean("value")])
    assert encode(description, Record(value=True)) == b"\x01"
    assert [decode(description, bytes((byte,))).value for byte in (0, 1, 255)] == [0, 1, 1]


@given(wholes())
def test_what_was_saved_is_loaded(state):
    loaded = plain(decode(WHOLE, encode(WHOLE, state)))
    expected = plain(state)
    if not state.extra:
        del expected["extra"]
    assert loaded == expected


def test_layout():
    assert encode(WHOLE, example(extra=0x1234)) == bytes.fromhex(
        "0000000000000001 00 00000002 6162 0001 0002 0003 04 fffffffb"
        "06 00000007 08 00000009 ffffffffffffffff"
        "05 0b 77686f6c652f6578747261 00000003 1234"
    )


@given(wholes())
def test_description_tells_the_size_of_every_field(state):
    described = WHOLE.describe(decode(WHOLE, encode(WHOLE, state)))
    total = sum(entry["size"] * entry.get("array_len", 1) for entry in described["fields"])
    without = Record(**state.__dict__ | {"extra": 0})
    assert total == len(encode(WHOLE, without))
    assert [part["vmsd_name"] for part in described.get("subsections", [])] == (
        ["whole/extra"] if state.extra else []
    )


@given(wholes())
def test_truncation_is_refused_at_every_byte_of_the_fields(state):
    state.extra = 0
    data = encode(WHOLE, state)
    for end in range(len(data)):
        with pytest.raises(VmStateError):
            WHOLE.load(Cursor(data[:end]), WHOLE.version)


def test_truncated_subsection_is_refused_or_left_for_the_reader_of_the_section():
    whole = encode(WHOLE, example(extra=7))
    start = len(encode(WHOLE, example()))
    for end in range(start + 1, len(whole)):
        source = Cursor(whole[:end])
        try:
            WHOLE.load(source, WHOLE.version)
        except VmStateError:
            continue
        assert source.at == start


@given(st.binary(max_size=200))
def test_any_bytes_give_a_record_or_an_error(data):
    source = Cursor(data)
    try:
        WHOLE.load(source, WHOLE.version)
    except VmStateError:
        return
    assert source.at <= len(data)


@given(wholes(), st.data())
def test_a_changed_byte_gives_a_record_or_an_error(state, data):
    stream = bytearray(encode(WHOLE, state))
    at = data.draw(st.integers(0, len(stream) - 1))
    stream[at] ^= data.draw(st.integers(1, 255))
    try:
        record = WHOLE.load(Cursor(bytes(stream)), WHOLE.version)
    except VmStateError:
        return
    assert record.count == len(record.data) == len(record.points) <= 9


@given(st.binary(max_size=8))
def test_bytes_after_an_inner_record_are_not_mistaken_for_a_subsection(rest):
    # 5 begins a subsection, and is a number like any other.
    outer = Description("outer", [Struct("point", POINT), Buffer("rest", 1 + len(rest))])
    data = encode(outer, Record(point=Record(x=1, y=2), rest=b"\x05" + rest))
    assert decode(outer, data).rest == b"\x05" + rest


def test_subsection_of_the_owner_after_an_inner_record():
    inner = Description("inner", [u8("value")])
    outer = Description(
        "outer",
        [Struct("inner", inner)],
        subsections=[Description("outer/more", [Struct("more", inner)])],
    )
    state = Record(inner=Record(value=1), more=Record(value=2))
    assert plain(decode(outer, encode(outer, state))) == plain(state)


def test_subsection_of_a_subsection():
    deep = Description("a/b/c", [u8("z")])
    description = Description(
        "a", [u8("x")], subsections=[Description("a/b", [u8("y")], subsections=[deep])]
    )
    assert plain(decode(description, encode(description, Record(x=1, y=2, z=3)))) == {
        "x": 1,
        "y": 2,
        "z": 3,
    }


def test_absent_subsection_leaves_its_attributes_out():
    assert not hasattr(decode(WHOLE, encode(WHOLE, example())), "extra")


@pytest.mark.parametrize("version", [0, 2])
def test_other_versions_are_refused(version):
    with pytest.raises(VmStateError, match=f"version {version} of whole is not supported"):
        WHOLE.load(Cursor(encode(WHOLE, example())), version)


@pytest.mark.parametrize(("version", "accepted"), [(1, False), (2, True), (3, True), (4, False)])
def test_versions_of_a_subsection(version, accepted):
    data = bytearray(encode(WHOLE, example(extra=7)))
    data[-6:-2] = version.to_bytes(4, "big")
    if accepted:
        assert decode(WHOLE, bytes(data)).extra == 7
    else:
        with pytest.raises(VmStateError, match=f"version {version} of whole/extra"):
            decode(WHOLE, bytes(data))


@pytest.mark.parametrize("name", [b"whole/other", b"whole/", b"whole/extra"])
def test_unknown_or_repeated_subsection_is_refused(name):
    part = b"\x05" + bytes((len(name),)) + name + b"\0\0\0\x03\0\x07"
    data = encode(WHOLE, example(extra=7)) + part
    with pytest.raises(VmStateError, match="unknown, repeated or out of order"):
        WHOLE.load(Cursor(data), WHOLE.version)


def test_count_is_capped_before_anything_is_read():
    data = bytearray(encode(WHOLE, example()))
    data[9:13] = b"\xff" * 4
    with pytest.raises(VmStateError, match="4294967295 elements, at most 9 are possible") as error:
        WHOLE.load(Cursor(bytes(data)), WHOLE.version)
    assert error.value.path == "data"


@pytest.mark.parametrize("field", [Buffer("data", "count", 9), StructArray("data", POINT, "count")])
def test_negative_count_is_refused(field):
    description = Description("one", [i32("count"), field])
    with pytest.raises(VmStateError, match="-4 elements"):
        description.load(Cursor((-4).to_bytes(4, "big", signed=True) + bytes(20)), 1)


def test_buffer_of_another_size_is_not_saved():
    with pytest.raises(VmStateError, match="3 bytes, not 2"):
        encode(WHOLE, example(data=b"abc"))


def test_impossible_record_is_refused_with_its_reason():
    data = bytearray(encode(WHOLE, example(count=3, data=b"abc", points=[Record(x=0, y=0)] * 3)))
    data[8] = 1
    with pytest.raises(VmStateError, match=r"^flag with an odd count$"):
        decode(WHOLE, bytes(data))


def test_error_names_the_path_of_the_field():
    data = encode(WHOLE, example())
    with pytest.raises(VmStateError) as error:
        WHOLE.load(Cursor(data[: len(data) - 9]), WHOLE.version)
    assert error.value.path == "points/points[1]/y"


# ---- what goes all at once ---------------------------------------------------------------------

TABLE = Description("table", [u8("rows"), Table("points", POINT, "rows", 9), u8("last")])
PLACE = Description("place", [u16("x"), Struct("inner", POINT), Array("z", "uint16", 2)])
# u16 x, two bytes of nothing, u8 x, three bytes of nothing, i32 y, u16 z[2], four of nothing.
IN_MEMORY = CStruct("place", PLACE, "H2xBi2H4x", lambda: bytearray(20), lambda made: made)


@given(st.lists(st.tuples(number("uint8"), number("int32")), max_size=9))
def test_table_is_as_an_array_of_records(rows):
    flat = tuple(value for row in rows for value in row)
    data = encode(TABLE, Record(rows=len(rows), points=flat, last=7))
    array = Description("table", [u8("rows"), StructArray("points", POINT, "rows", 9), u8("last")])
    records = Record(rows=len(rows), points=[Record(x=x, y=y) for x, y in rows], last=7)
    assert data == encode(array, records)
    loaded = decode(TABLE, data)
    assert (loaded.points, loaded.last) == (flat, 7)
    assert TABLE.describe(loaded) == array.describe(decode(array, data))
    for end in range(len(data)):
        errors = []
        for description in (TABLE, array):
            with pytest.raises(VmStateError) as error:
                description.load(Cursor(data[:end]), 1)
            errors.append(error.value.path)
        assert errors[0] == errors[1]


def test_table_with_too_few_values_is_not_saved():
    with pytest.raises(struct.error):
        encode(TABLE, Record(rows=2, points=(1, 2, 3), last=0))


def test_structure_in_memory_is_one_in_the_stream():
    description = Description("one", [IN_MEMORY])
    made = bytearray.fromhex("3412 ffff 56 ffffff feffffff 0100 0200 ffffffff")
    data = encode(description, Record(place=made))
    assert data == bytes.fromhex("1234 56 fffffffe 0001 0002")
    loaded = decode(description, data)
    assert loaded.place == bytes.fromhex("3412 0000 56 000000 feffffff 0100 0200 00000000")
    same = Description("one", [Struct("place", PLACE)])
    assert description.describe(Record(place=None)) == same.describe(decode(same, data))
    with pytest.raises(VmStateError, match="truncated") as error:
        description.load(Cursor(data[:6]), 1)
    assert error.value.path == "place/inner/y"
