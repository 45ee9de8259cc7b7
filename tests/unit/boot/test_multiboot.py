import os
import struct

import pytest
from construct import Bytes, Int32ul, Int64ul, Struct
from hypothesis import given
from hypothesis import strategies as st

from pyvmm.boot import multiboot
from pyvmm.boot.blob import FileBlob
from pyvmm.errors import ConfigError
from pyvmm.testing.images import guest_memory, multiboot_header
from pyvmm.x86 import layout

M = 1 << 20
AOUT = 1 << 16

# Section 3.3 of the specification, written out once more, independently of the module.
INFO = Struct(
    "flags" / Int32ul, "mem_lower" / Int32ul, "mem_upper" / Int32ul, "boot_device" / Int32ul,
    "cmdline" / Int32ul, "mods_count" / Int32ul, "mods_addr" / Int32ul, "syms" / Bytes(16),
    "mmap_length" / Int32ul, "mmap_addr" / Int32ul, "drives_length" / Int32ul,
    "drives_addr" / Int32ul, "config_table" / Int32ul, "boot_loader_name" / Int32ul,
    "apm_table" / Int32ul, "vbe" / Bytes(16),
)  # fmt: skip
MODULE = Struct("start" / Int32ul, "end" / Int32ul, "string" / Int32ul, "reserved" / Int32ul)
MMAP = Struct("size" / Int32ul, "base" / Int64ul, "length" / Int64ul, "type" / Int32ul)


def find(data):
    fd = os.memfd_create("kernel")
    try:
        os.write(fd, data)
        with FileBlob(f"/proc/self/fd/{fd}", "-kernel") as blob:
            return multiboot.find_header(blob)
    finally:
        os.close(fd)


def test_header_without_addresses():
    assert find(bytes(64) + multiboot_header(3)).raw is None


@pytest.mark.parametrize(
    "data",
    [
        b"\0",
        bytes(8192) + multiboot_header(),
        bytes(8184) + multiboot_header(),
        bytes(2) + multiboot_header(),
        multiboot_header()[:11],
        multiboot_header()[:8] + b"\0\0\0\0",
        b"\x02\xb0\xad\x1b" * 2048,
    ],
)
def test_no_header(data):
    assert find(data) is None


def test_header_at_the_last_place_and_after_false_ones():
    assert find(bytes(8180) + multiboot_header())
    assert find(
        b"\x02\xb0\xad\x1b" * 3 + b"\0" + b"\x02\xb0\xad\x1b" + bytes(3) + multiboot_header()
    )


@pytest.mark.parametrize(
    ("flags", "what"), [(4, "a video mode"), (8, "unknown"), (0x8000, "unknown"), (12, "unknown")]
)
def test_demands_that_cannot_be_met(flags, what):
    with pytest.raises(ConfigError, match=f"demands {what}.*; build the kernel without"):
        find(multiboot_header(flags))


def test_optional_bits_are_ignored():
    assert find(multiboot_header(1 << 17 | 1 << 31)).raw is None


def image_with(*addresses, before=0, size=4096):
    return (bytes(before) + multiboot_header(AOUT, *addresses)).ljust(size, b"\xf4")


@pytest.mark.parametrize(
    ("addresses", "before", "raw"),
    [
        ((M, M, 0, 0, M), 0, (0, M, 4096, 4096, M)),
        ((M + 64, M, 0, M + 8192, M + 5), 64, (0, M, 4096, 8192, M + 5)),
        ((M + 4, M, M + 100, M + 100, M + 99), 64, (60, M, 100, 100, M + 99)),
    ],
)
def test_addresses(addresses, before, raw):
    assert find(image_with(*addresses, before=before)).raw == raw


TOP = (1 << 32) - 1


@pytest.mark.parametrize(
    "addresses",
    [
        (M - 1, M, 0, 0, M),  # the header before what is loaded
        (M + 65, M, 0, 0, M),  # would begin before the file
        (TOP, 0, 0, 0, 0),
        (M + 64, M, M + 4097, 0, M),  # ends beyond the file
        (M + 64, M, TOP, TOP, M),
        (M + 64, M, M - 1, 0, M),  # ends before it begins
        (M + 64, M, M, 0, M),
        (M + 64, M, 0, M + 4095, M),  # bss ends before the data
        (M + 64, M, 0, 1, M),
        (M + 64, M, 0, 0, M - 1),  # entry outside
        (M + 64, M, 0, 0, M + 4096),
        (M + 64, M, 0, 0, TOP),
    ],
)
def test_addresses_that_contradict(addresses):
    with pytest.raises(ConfigError, match="addresses in the multiboot header"):
        find(image_with(*addresses, before=64))


def test_truncated_addresses():
    with pytest.raises(ConfigError, match="header is truncated"):
        find(multiboot_header(AOUT, M, M, 0, 0))


@given(
    st.binary(max_size=200),
    st.integers(0, (1 << 32) - 1),
    st.lists(st.sampled_from([0, 1, M - 1, M, M + 8, M + 300, TOP]), max_size=5),
    st.binary(max_size=300),
)
def test_hostile_headers(before, flags, addresses, after):
    message = "-kernel "
    try:
        header = find(before + multiboot_header(flags, *addresses) + after)
        if header and header.raw:
            offset, load, size, mem_size, entry = header.raw
            assert 0 <= offset < offset + size <= len(before) + 12 + 4 * len(addresses) + len(after)
            assert size <= mem_size
            assert load <= entry < load + mem_size
    except ConfigError as error:
        message = str(error)
    assert message.startswith("-kernel ")


@given(st.binary(min_size=1, max_size=9000))
def test_random_bytes_are_no_header(data):
    assert find(data) is None


@pytest.mark.parametrize("initrd", [None, (0xE00000, 0x12345)])
def test_information(initrd):
    memory = guest_memory(16 * M)
    at = multiboot.write_info(memory, layout.CMDLINE, initrd)
    info = INFO.parse(memory.read(at, INFO.sizeof()))
    assert info.flags == 1 << 0 | 1 << 2 | 1 << 6 | 1 << 9 | (1 << 3 if initrd else 0)
    assert (info.mem_lower, info.mem_upper) == (608, 15 * 1024)
    assert info.cmdline == layout.CMDLINE
    assert memory.read(info.boot_loader_name, 6) == b"pyvmm\0"
    assert (info.syms, info.vbe, info.drives_length) == (bytes(16), bytes(16), 0)
    if initrd:
        assert info.mods_count == 1
        module = MODULE.parse(memory.read(info.mods_addr, MODULE.sizeof()))
        assert (module.start, module.end) == (initrd[0], initrd[0] + initrd[1])
    else:
        assert (info.mods_count, info.mods_addr) == (0, 0)
    entries = MMAP[info.mmap_length // MMAP.sizeof()].parse(
        memory.read(info.mmap_addr, info.mmap_length)
    )
    assert [(entry.size, entry.base, entry.length, entry.type) for entry in entries] == [
        (20, 0, 0x98000, 1),
        (20, 0x98000, 0x7C00, 3),
        (20, 0x9FC00, 0x60400, 2),
        (20, M, 15 * M, 1),
        (20, 0xFEC00000, 0x1400000, 2),
    ]
    assert info.mmap_addr + info.mmap_length <= layout.BOOT_INFO_END


def test_struct_and_construct_agree_on_the_header():
    header = Struct("magic" / Int32ul, "flags" / Int32ul, "checksum" / Int32ul)
    parsed = header.parse(multiboot_header(3))
    assert (parsed.magic + parsed.flags + parsed.checksum) & TOP == 0
    assert struct.calcsize("<22I") == INFO.sizeof()
