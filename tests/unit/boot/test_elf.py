import os
import struct

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from pyvmm.boot.blob import FileBlob
from pyvmm.boot.elf import Elf
from pyvmm.boot.pvh import find_entry
from pyvmm.errors import ConfigError
from pyvmm.testing.images import elf, note, pvh_note

M = 1 << 20


def parse(data):
    fd = os.memfd_create("kernel")
    try:
        os.write(fd, data)
        with FileBlob(f"/proc/self/fd/{fd}", "-kernel") as blob:
            parsed = Elf(blob)
            return parsed, find_entry(parsed)
    finally:
        os.close(fd)


@pytest.mark.parametrize("wide", [True, False])
def test_segments_by_rising_address(wide):
    extra = ((1, 0, 0xC000_0000, 3 * M, 4, 0x1000), (1, 0, 0, 2 * M, 0, 8), (6, 0, 0, 0, 0, 0))
    parsed, _ = parse(elf(b"code", wide=wide, load_at=4 * M, mem_size=99, segments=extra))
    found = [(each.paddr, each.vaddr, each.file_size, each.mem_size) for each in parsed.loads]
    assert found == [
        (2 * M, 0, 0, 8), (3 * M, 0xC000_0000, 4, 0x1000), (4 * M, 4 * M, 4, 99)
    ]  # fmt: skip
    assert (parsed.entry, parsed.is_64) == (4 * M, wide)
    assert parsed.physical(0xC000_0010) == 3 * M + 0x10
    assert parsed.physical(0xC000_1000) == 0xC000_1000


@pytest.mark.parametrize("size", [1, 3, 4, 16, 51, 63])
@pytest.mark.parametrize("wide", [True, False])
def test_truncated_header(size, wide):
    with pytest.raises(ConfigError, match="truncated"):
        parse(elf(wide=wide)[:size])


@pytest.mark.parametrize("wide", [True, False])
def test_truncated_anywhere(wide):
    whole = elf(b"code", wide=wide, notes=pvh_note(M))
    assert parse(whole)[1] == M
    for size in range(1, len(whole)):
        with pytest.raises(ConfigError):
            parse(whole[:size])


BIG = (1 << 64) - 1


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"ei_class": 0}, "neither 32 nor 64 bits"),
        ({"ei_class": 3}, "neither 32 nor 64 bits"),
        ({"ei_data": 0}, "neither 32 nor 64 bits"),
        ({"ei_data": 2, "e_machine": 0x1600}, "ELF for s390, big-endian; give an x86 kernel"),
        ({"e_machine": 183}, "ELF for 64-bit Arm, not x86; give an x86 kernel"),
        ({"e_machine": 3}, "ELF for machine 3"),
        ({"e_machine": 999}, "ELF for machine 999, not x86"),
        ({"e_type": 1}, r"an object file \(ELF\) that is not linked, not an executable"),
        ({"e_type": 3}, "a shared object or a position-independent program"),
        ({"e_type": 4}, "a core dump"),
        ({"e_type": 9}, "ELF of type 9, not an executable"),
        ({"e_phoff": 0}, "without a usable program header table"),
        ({"e_phoff": 1 << 20}, "truncated"),
        ({"e_phoff": BIG}, "truncated"),
        ({"e_phnum": 0}, "without a usable program header table"),
        ({"e_phnum": 257}, "without a usable program header table"),
        ({"e_phnum": 65535}, "without a usable program header table"),
        ({"e_phnum": 200}, "truncated"),
        ({"e_phentsize": 32}, "without a usable program header table"),
        ({"e_phentsize": 0}, "without a usable program header table"),
    ],
)
def test_bad_headers(fields, message):
    with pytest.raises(ConfigError, match=message):
        parse(elf(**fields))


@pytest.mark.parametrize(
    ("segment", "message"),
    [
        ((1, 0, 0, 8 * M, 1 << 20, 1 << 20), "beyond the end of the file; it is truncated"),
        ((1, BIG, 0, 8 * M, 1, 1), "beyond the end of the file"),
        ((1, BIG, 0, 8 * M, BIG, BIG), "beyond the end of the file"),
        ((1, 0, 0, 8 * M, 16, 15), "larger in the file than in memory"),
        ((1, 0, 0, M - 1, 1, 2), "ELF segments overlap at 0x100000"),
        ((1, 0, 0, M, 1, 1), "ELF segments overlap"),
    ],
)
def test_bad_segments(segment, message):
    with pytest.raises(ConfigError, match=message):
        parse(elf(segments=(segment,)))


def test_nothing_to_load():
    with pytest.raises(ConfigError, match="without anything to load"):
        parse(elf(b""))


def test_note_is_found_among_others():
    notes = note(b"GNU\0", 18, b"\1\2\3\4") + note(b"Xen\0", 6, b"linux\0") + pvh_note(0x123456)
    assert parse(elf(notes=notes))[1] == 0x123456
    assert parse(elf(notes=note(b"Xen\0", 18, struct.pack("<I", 7 * M))))[1] == 7 * M


@pytest.mark.parametrize("pad", [4, 8])
@pytest.mark.parametrize("align", [0, 1, 4, 8])
@pytest.mark.parametrize("name", [b"GNU\0", b"Linux\0", b""])
@pytest.mark.parametrize("size", [4, 16, 20])
def test_note_is_found_however_the_notes_are_padded(pad, align, name, size):
    """A linker that joins notes of 4 and of 8 into one segment says 8 of all of them."""
    others = note(name, 3, bytes(range(size)), pad)
    others += bytes(-len(others) % pad)
    notes = others + note(b"Xen\0", 18, struct.pack("<Q", 5 * M), pad)
    assert parse(elf(notes=notes, notes_align=align))[1] == 5 * M
    assert parse(elf(notes=pvh_note(5 * M) + others, notes_align=align))[1] == 5 * M


@pytest.mark.parametrize(
    ("name", "type", "desc"),
    [(b"Linux\0", None, b"x"), (b"Linux\0", 8, None), (b"Xen\0", None, None)],
)
def test_notes_by_name(tmp_path, name, type, desc):
    notes = note(b"GNU\0", 3, b"Xen\0Linux\0\0\0") + note(b"Linux\0", 9, b"x")
    (tmp_path / "kernel").write_bytes(elf(notes=notes))
    with FileBlob(str(tmp_path / "kernel"), "-kernel") as blob:
        assert Elf(blob).find_note(name, type) == desc


@pytest.mark.parametrize(
    "notes",
    [
        note(b"Xen\0", 17, bytes(8)),
        note(b"Xem\0", 18, bytes(8)),
        note(b"Xen\0", 18, bytes(3)),
        note(b"Xen\0", 18, bytes(16)),
        note(b"", 18, bytes(8)),
        struct.pack("<III", 0xFFFFFFFF, 8, 18) + b"Xen\0" + bytes(8),
        struct.pack("<III", 4, 0xFFFFFFFF, 18) + b"Xen\0" + bytes(8),
        struct.pack("<III", 4, 9, 18) + b"Xen\0" + bytes(8),
        b"\0" * 11,
        b"\0" * 4096,
        note(b"x" * 70000, 1, b"") + pvh_note(M),
    ],
)
def test_no_usable_note(notes):
    assert parse(elf(notes=notes))[1] is None


@pytest.mark.parametrize(("offset", "size"), [(1 << 30, 16), (BIG, 16), (BIG, 0), (0, 4000)])
def test_notes_outside_the_file(offset, size):
    with pytest.raises(ConfigError, match="truncated"):
        parse(elf(segments=((4, offset, 0, 0, size, size),)))


def survives(data):
    message = "-kernel "
    try:
        parsed, _ = parse(data)
        assert 0 < len(parsed.loads) <= 256
    except ConfigError as error:
        message = str(error)
    assert message.startswith("-kernel ")
    assert message.isprintable()


@given(st.binary(min_size=1, max_size=300))
@example(b"\x7fELF")
def test_random_bytes(data):
    survives(data)
    survives(b"\x7fELF\2\1\1" + data)


VALID = [
    elf(b"code" * 9, wide=wide, notes=note(b"GNU\0", 5, b"12345") + pvh_note(M), mem_size=8192)
    for wide in (True, False)
]
WORDS = st.sampled_from([0, 1, 4, 0x7F, 0xFF, 0xFFFF, 1 << 31, (1 << 32) - 1, 1 << 63, BIG])


@given(
    st.sampled_from(VALID),
    st.lists(st.tuples(st.integers(0, 260), st.sampled_from([1, 2, 4, 8]), WORDS), max_size=4),
    st.integers(1, 400),
)
def test_mutated_executables(valid, edits, size):
    data = bytearray(valid)
    for at, width, value in edits:
        data[at : at + width] = (value & ((1 << 8 * width) - 1)).to_bytes(width, "little")
    survives(bytes(data[:size]))
