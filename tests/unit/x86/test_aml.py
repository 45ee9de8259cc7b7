import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyvmm.x86 import aml


@pytest.mark.parametrize(
    ("value", "code"),
    [
        (0, "00"),
        (1, "01"),
        (2, "0a02"),
        (0xFF, "0aff"),
        (0x100, "0b0001"),
        (0x10000, "0c00000100"),
        (0xFFFFFFFF, "0cffffffff"),
        (1 << 32, "0e0000000001000000"),
    ],
)
def test_integer(value, code):
    assert aml.integer(value).hex() == code


def test_integer_beyond_64_bits():
    with pytest.raises(ValueError, match="more than 64 bits"):
        aml.integer(1 << 64)


def test_known_terms():
    # As iasl compiles them.
    assert aml.eisa_id("PNP0501").hex() == "0c41d00501"
    assert aml.eisa_id("PNP0B00").hex() == "0c41d00b00"
    assert aml.string("ab") == b"\x0dab\0"
    assert aml.name("_UID", aml.integer(1)) == b"\x08_UID\x01"
    assert aml.path("_SB") == b"_SB_"
    assert aml.package(aml.integer(0), aml.integer(5)) == b"\x12\x05\x02\x00\x0a\x05"
    assert aml.buffer(b"xy") == b"\x11\x05\x0a\x02xy"
    assert aml.device("X") == b"\x5b\x82\x05X___"
    assert aml.resources() == b"\x11\x05\x0a\x02\x79\0"


def test_resource_descriptors():
    assert aml.io(0x3F8, 8).hex() == "4701f803f8030108"
    assert aml.irq(8).hex() == "220001"
    assert aml.interrupt(17, edge=True).hex() == "890600030111000000"
    assert aml.interrupt(17, edge=False).hex() == "890600010111000000"
    assert aml.memory32(0xFEB00000, 0x200).hex() == "86090001" + "0000b0fe" + "00020000"
    with pytest.raises(OverflowError):
        aml.memory32(1 << 32, 0x200)


@given(st.one_of(st.integers(0, 5000), st.sampled_from([57, 58, 59, 4086, 4087, 4088, 1 << 20])))
def test_package_length_counts_itself_and_all_that_follows(size):
    code = aml.scope("A", bytes(size))
    more = code[1] >> 6
    rest = int.from_bytes(code[2 : 2 + more], "little")
    assert (code[1] & 0xF | rest << 4 if more else code[1]) == len(code) - 1
    assert code[2 + more :] == b"A___" + bytes(size)
