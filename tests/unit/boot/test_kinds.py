"""What kind of image a file is: told by evidence in it, or refused by name."""

import bz2
import gzip
import lzma
import os
import re
import struct
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyvmm.boot.config import TYPES, KernelConfig
from pyvmm.boot.foreign import _MAGICS
from pyvmm.boot.loader import FLAT, LINUX64, MULTIBOOT, PVH, load
from pyvmm.errors import ConfigError
from pyvmm.testing.images import (
    boot_sector,
    bzimage,
    elf,
    guest_memory,
    multiboot_header,
    note,
    pack,
    pvh_note,
)

M = 1 << 20
MEMORY = guest_memory(64 * M)
LOAD, NOTE, INTERP = 1, 4, 3


def load_data(data, type="auto", append=""):
    """What is loaded of an image with that contents."""
    fd = os.memfd_create("kernel")
    try:
        os.write(fd, data)
        return load(MEMORY, KernelConfig(f"/proc/self/fd/{fd}", "", append, type=type))
    finally:
        os.close(fd)


def refusal(data, type="auto"):
    with pytest.raises(ConfigError) as caught:
        load_data(data, type)
    text = str(caught.value)
    assert text.startswith("-kernel /proc/self/fd/")
    assert text.isprintable()
    assert ";" in text, "it says no mend"
    return text.split(": ", 1)[1]


def multiboot2_header(length=24):
    magic, arch = 0xE85250D6, 0
    words = (magic, arch, length, -(magic + arch + length) & 0xFFFF_FFFF, 0, 8)
    return struct.pack("<6I", *words)


def pe(sections=(), subsystem=10, machine=0x8664, size=4096):
    """A PE program of that many bytes."""
    head = bytearray(0x80)
    head[:2] = b"MZ"
    struct.pack_into("<I", head, 0x3C, 0x80)
    optional = bytearray(240)
    struct.pack_into("<H", optional, 68, subsystem)
    coff = struct.pack("<4sHHIIIHH", b"PE\0\0", machine, len(sections), 0, 0, 0, 240, 0x22E)
    table = b"".join(name.encode().ljust(8, b"\0") + bytes(32) for name in sections)
    return (bytes(head) + coff + bytes(optional) + table).ljust(size, b"\0")


KERNEL = elf(load_at=16 * M, vaddr=0xFFFF_FFFF_8100_0000, entry=16 * M)
TEXT = b"This is a file about kernels.\n" * 30


@pytest.mark.parametrize(
    ("data", "name"),
    [
        (gzip.compress(KERNEL), r"a file compressed with gzip, not a kernel; unpack.*gzip -d"),
        (lzma.compress(KERNEL), "a file compressed with xz"),
        (lzma.compress(KERNEL, lzma.FORMAT_ALONE), "a file compressed with lzma"),
        (bz2.compress(KERNEL), "a file compressed with bzip2"),
        (pack(KERNEL, "zstd"), "a file compressed with zstd"),
        (pack(KERNEL, "lz4"), "a file compressed with lz4"),
        (b"\x04\x22\x4d\x18" + bytes(600), "a file compressed with lz4"),
        (TEXT, "a text file, not a kernel"),
        (b"x", "a text file"),
        (b"#!/bin/sh\n" + TEXT, "a script, not a kernel"),
        (b"<!DOCTYPE html>\n<html>" + TEXT, "a page of HTML, not a kernel; download"),
        (b"version https://git-lfs.github.com/spec/v1\noid x\n", "a pointer of Git LFS"),
        (bytes(5000), "a file of zeros"),
        (pe(), "an EFI program for x86-64, 4096 bytes, and there is no EFI here"),
        (pe(machine=0xAA64), "an EFI program for 64-bit Arm"),
        (pe(machine=7), "an EFI program for machine 0x7"),
        (pe(subsystem=3), "a Windows program"),
        (b"MZ" + bytes(600), "a DOS program"),
        (b"MZ", "a DOS program|a text file"),
        (
            pe((".text", ".osrel", ".linux", ".initrd"), size=70_000_001),
            r"70000001 bytes \(a unified kernel image\).*no EFI.*objcopy .*\.linux.*\.initrd",
        ),
        (multiboot2_header() + bytes(600), "a multiboot 2 kernel, which is not supported"),
        (b"\x27\x05\x19\x56" + bytes(600), "a U-Boot image"),
        (b"ANDROID!" + bytes(600), "an Android boot image"),
        (bytes(0x8001) + b"CD001" + bytes(3000), "an ISO 9660 image, not a kernel"),
        (boot_sector(b"\xeb\x63").ljust(0x8001, b"\0") + b"CD001" + bytes(M), "flat.*-drive"),
        (b"hsqs" + bytes(600), "a squashfs file system"),
        (bytes(0x438) + b"\x53\xef" + bytes(600), "an ext2, ext3 or ext4 file system"),
        (b"QFI\xfb" + bytes(600), "a qcow2 disk image, not a kernel; .*-drive"),
        (b"070701" + TEXT, "a cpio archive, not a kernel; it may be .* -initrd"),
        (b"\x7fEL", "truncated"),
        (b"\xfa\xf4\xeb\xfe", "4 bytes of no kind that is known.*kernel-type=flat"),
        (os.urandom(1 << 20).replace(b"\x02\xb0\xad\x1b", b"    "), "no kind|a file|too large"),
        (elf(e_type=4), "a core dump"),
        (elf(e_machine=243), "ELF for RISC-V, not x86"),
        (elf(wide=False), "32-bit ELF with neither a PVH note nor a multiboot header"),
        (elf(multiboot2_header(), wide=False, load_at=M), "32-bit ELF|a multiboot 2 kernel"),
        (elf(), "64-bit ELF without a PVH note.*does not look like Linux.*kernel-type=linux"),
        (elf(load_at=0x40_0000, segments=((INTERP, 0, 0, 0, 1, 1),)), "a program .ELF with an in"),
    ],
)
def test_refused_by_name(data, name):
    text = refusal(data)
    assert re.search(name, text), text
    if data[:4] != b"\x7fELF" and len(data) < 500_000:
        assert load_data(data, "flat").kind == FLAT


@pytest.mark.parametrize("wide", [True, False])
@pytest.mark.parametrize("linux", [True, False])
def test_multiboot_2_alone_is_refused_whatever_it_looks_like(wide, linux):
    code_at = 64 + 56 if wide else 52 + 32
    code = bytes(-code_at % 8) + multiboot2_header()
    place = {"load_at": 16 * M, "vaddr": 0xFFFF_FFFF_8100_0000} if linux and wide else {}
    assert "a multiboot 2 kernel" in refusal(
        elf(code, wide=wide, **place, entry=place.get("load_at"))
    )


def test_multiboot_1_beside_multiboot_2():
    code = bytes(4) + multiboot2_header() + multiboot_header()
    assert load_data(elf(code, wide=False)).kind == MULTIBOOT
    assert load_data(elf(bytes(4) + multiboot2_header(), notes=pvh_note(M))).kind == PVH


@pytest.mark.parametrize(
    ("blob", "linux"),
    [
        (KERNEL, True),
        (elf(load_at=16 * M, notes=note(b"Linux\0", 0x100, bytes(4))), True),
        (elf(load_at=16 * M), False),
        (elf(load_at=16 * M + 4096, vaddr=0xFFFF_FFFF_8100_1000), False),
        (elf(load_at=16 * M, vaddr=0xFFFF_FFFF_8200_0000), False),
        # The entry is virtual, as of kernels that are not entered where Linux is.
        (
            elf(load_at=16 * M, vaddr=0xFFFF_FFFF_8100_0000, entry=0xFFFF_FFFF_8100_0000),
            False,
        ),
        (elf(load_at=M, vaddr=0xFFFF_FFFF_8010_0000), False),
    ],
)
def test_evidence_for_vmlinux(blob, linux):
    if linux:
        assert load_data(blob).kind == LINUX64
    else:
        assert "does not look like Linux" in refusal(blob)
        assert load_data(blob, "linux").kind == LINUX64


BOTH = elf(bytes(8) + multiboot_header(), load_at=16 * M, notes=pvh_note(16 * M))


@pytest.mark.parametrize(
    ("type", "data", "kind"),
    [
        ("auto", BOTH, PVH),
        ("pvh", BOTH, PVH),
        ("multiboot", BOTH, MULTIBOOT),
        ("linux", BOTH, LINUX64),
        ("flat", BOTH, FLAT),
        ("linux", bzimage(pack(KERNEL, "none")), LINUX64),
        ("pvh", KERNEL, "not an ELF file with a PVH note, which kernel-type=pvh demands"),
        ("multiboot", KERNEL, "without a multiboot header, which kernel-type=multiboot demands"),
        ("linux", boot_sector(b""), "neither a bzImage nor an ELF file of 64 bits, which"),
        ("linux", elf(wide=False), "32-bit ELF, and Linux is entered in 64 bits"),
        ("pvh", bzimage(pack(KERNEL, "none")), "not an ELF file with a PVH note"),
        ("multiboot", boot_sector(b""), "without a multiboot header"),
    ],
)
def test_type_that_is_asked_for(type, data, kind):
    if isinstance(kind, str):
        assert kind in refusal(data, type)
    else:
        assert load_data(data, type).kind == kind


def test_truncated_bzimage_is_no_boot_sector():
    data = bzimage(pack(KERNEL, "gzip"))
    for size in (0x203, 0x204, 0x205, 0x206, 0x210):
        assert "truncated" in refusal(data[:size])


# ---- segments that hold only the file's headers ----------------------------------------------


def linked(low, size):
    """As ld lays it out by itself: a segment with the file's headers, and code at 1 MiB."""
    segments = ((LOAD, 0, low, low, size, size),)
    return elf(b"\xf4" * 8, notes=pvh_note(M), segments=segments)


@pytest.mark.parametrize("low", [0, 0x1000, 0x6000, 0x9F000, 0xA0000, 0xFF000])
@pytest.mark.parametrize("size", [64, 0xE8])
def test_segment_of_headers_does_not_stop_a_kernel(low, size):
    found = load_data(linked(low, size))
    assert (found.kind, found.entry) == (PVH, M)
    assert MEMORY.read(M, 8) == b"\xf4" * 8


def test_segment_of_headers_is_loaded_where_it_can_be():
    MEMORY.fill(0x3_0000, 0x100)
    blob = linked(0x3_0000, 0xE8)
    load_data(blob)
    assert MEMORY.read(0x3_0000, 0xE8) == blob[:0xE8]


@pytest.mark.parametrize(
    "segment",
    [
        (LOAD, 0, 0xFF000, 0xFF000, 0xF0, 0xF0),  # code behind the headers
        (LOAD, 0, 0xFF000, 0xFF000, 64, 0x100),  # memory that the kernel may count on
        (LOAD, 1, 0xFF000, 0xFF000, 64, 64),
    ],
)
def test_segment_that_holds_more_is_refused(segment):
    text = refusal(elf(b"\xf4" * 8, notes=pvh_note(M), segments=(segment,)))
    assert "are not all RAM; link the kernel elsewhere" in text


def test_headers_in_front_of_the_code_in_one_segment():
    """``ld -z noseparate-code -Ttext=0x100000``."""
    blob = bytearray(0x1008)
    head = elf(b"", notes=pvh_note(M), segments=((LOAD, 0, 0xFF000, 0xFF000, 0x1008, 0x1800),))
    blob[: len(head)] = head
    blob[0x1000:] = code = b"\xfa\xf4\xeb\xfdcode"
    MEMORY.fill(M, 4096, 0xEE)
    assert load_data(bytes(blob)).entry == M
    assert MEMORY.read(M, 0x800) == code + bytes(0x7F8)
    blob[0x800] = 1
    assert "are not all RAM" in refusal(bytes(blob))


# ---- whatever it is --------------------------------------------------------------------------

STARTS = [magic.rjust(offset + len(magic), b"\0") for offset, magic, _, _ in _MAGICS]
HEADS = st.sampled_from(
    [
        b"", *STARTS, KERNEL, elf(wide=False, notes=pvh_note(M)), bzimage(b"x" * 40),
        pe((".linux",)),
        boot_sector(b"\xf4"), multiboot_header(1 << 16, M, M, 0, 0, M), multiboot2_header(),
    ]
)  # fmt: skip


@settings(deadline=None, max_examples=400)
@given(
    HEADS,
    st.lists(st.tuples(st.integers(0, 700), st.binary(min_size=1, max_size=8)), max_size=5),
    st.binary(max_size=300),
    st.integers(1, 3000),
    st.sampled_from(TYPES),
)
def test_any_bytes_are_a_kind_or_refused_in_one_line(head, edits, rest, size, type):
    data = bytearray(head + rest)
    for at, value in edits:
        data[at : at + len(value)] = value
    data = bytes(data[:size]) or b"\0"
    started = time.monotonic()
    message = "-kernel /proc/self/fd/"
    try:
        found = load_data(data, type)
        assert found.kind in (PVH, MULTIBOOT, FLAT, LINUX64)
        assert MEMORY.contains(found.entry, 1)
    except ConfigError as error:
        message = str(error)
    assert message.startswith("-kernel /proc/self/fd/")
    assert message.isprintable()
    assert time.monotonic() - started < 2
