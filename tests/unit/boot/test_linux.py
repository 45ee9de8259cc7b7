"""bzImage and vmlinux, by Linux's 64-bit boot protocol."""

import os
import struct
import tracemalloc

import pytest
from construct import Const, Int8ul, Int16ul, Int32ul, Int64ul, Padding, Struct
from harness.process import descriptors
from hypothesis import given, settings
from hypothesis import strategies as st

from pyvmm.boot import bootparams, unpack
from pyvmm.boot.blob import Blob
from pyvmm.boot.config import KernelConfig
from pyvmm.boot.loader import FLAT, LINUX64, load
from pyvmm.boot.memmap import memory_map
from pyvmm.errors import ConfigError
from pyvmm.testing.images import SETUP_HEADER, bzimage, elf, guest_memory, pack
from pyvmm.x86 import layout

M = 1 << 20
RUN_AT = 16 * M
CODE = bytes(range(1, 200)) * 3
KERNEL = elf(CODE, load_at=RUN_AT, vaddr=0xFFFF_FFFF_8100_0000, mem_size=M, entry=RUN_AT + 8)
METHODS = ("gzip", "bzip2", "lzma", "xz", "lz4", "zstd", "none")

# bootparam.h once more, independently of the module.
BOOT_PARAMS = Struct(
    Padding(0x70), "acpi_rsdp_addr" / Int64ul, Padding(0x1E8 - 0x78), "e820_entries" / Int8ul,
    Padding(6), "sentinel" / Const(0, Int8ul), Padding(1), "setup_sects" / Int8ul, Padding(2),
    "syssize" / Int32ul, Padding(6), "boot_flag" / Const(0xAA55, Int16ul), Padding(2),
    "header" / Const(b"HdrS"), "version" / Int16ul, Padding(8), "type_of_loader" / Int8ul,
    "loadflags" / Int8ul, Padding(2), "code32_start" / Int32ul, "ramdisk_image" / Int32ul,
    "ramdisk_size" / Int32ul, Padding(8), "cmd_line_ptr" / Int32ul, "initrd_addr_max" / Int32ul,
    "kernel_alignment" / Int32ul, Padding(0x250 - 0x234), "setup_data" / Int64ul,
    "pref_address" / Int64ul, "init_size" / Int32ul, Padding(0x2D0 - 0x264),
    "e820_table" / Struct("addr" / Int64ul, "size" / Int64ul, "type" / Int32ul)[128],
    Padding(4096 - 0x2D0 - 128 * 20),
)  # fmt: skip


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """The cache, empty."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "pyvmm"


@pytest.fixture
def memory():
    return guest_memory(64 * M)


@pytest.fixture
def kernel(tmp_path):
    """A function that writes a kernel image and returns its path."""

    def write(data, name="kernel"):
        (tmp_path / name).write_bytes(data)
        return str(tmp_path / name)

    return write


def boot_params(memory, found):
    assert found.info == 0x6000
    return BOOT_PARAMS.parse(memory.read(found.info, 4096))


@pytest.mark.parametrize("method", METHODS)
def test_bzimage_is_unpacked(memory, kernel, method):
    memory.fill(RUN_AT, 2 * M, 0xEE)
    path = kernel(bzimage(pack(KERNEL, method)))
    initrd = bytes(range(256)) * 33
    config = KernelConfig(path, kernel(initrd, "initrd"), "console=ttyS0 quiet")
    found = load(memory, config, rsdp=0xE0000)
    assert (found.kind, found.entry, found.is_real_mode) == (LINUX64, RUN_AT + 8, False)
    assert memory.read(RUN_AT, len(CODE)) == CODE
    assert memory.read(RUN_AT + len(CODE), M - len(CODE)) == bytes(M - len(CODE))
    assert memory.read_u8(RUN_AT + M) == 0xEE
    params = boot_params(memory, found)
    assert (params.type_of_loader, params.loadflags, params.version) == (0xFF, 1, 0x20F)
    assert params.code32_start == RUN_AT
    assert params.acpi_rsdp_addr == 0xE0000
    assert memory.read(params.cmd_line_ptr, 20) == b"console=ttyS0 quiet\0"
    assert memory.read(params.ramdisk_image, params.ramdisk_size) == initrd
    assert params.ramdisk_image == 64 * M - 0x3000
    entries = params.e820_table[: params.e820_entries]
    assert [(entry.addr, entry.size, entry.type) for entry in entries] == memory_map(memory)
    record = struct.unpack("<4s5I", memory.read(0x500, 24))
    assert record == (b"PVMB", 4, RUN_AT + 8, 0x6000, 0, found.cr3)


def test_each_boot_has_a_random_seed_of_its_own(memory, kernel):
    config = KernelConfig(kernel(bzimage(pack(KERNEL, "gzip"), setup_data=M)))
    seeds = set()
    for _ in range(3):
        at = boot_params(memory, load(memory, config)).setup_data
        # struct setup_data: next, type, len
        assert struct.unpack("<QII", memory.read(at, 16)) == (0, 9, 32)
        seeds.add(memory.read(at + 16, 32))
    assert len(seeds) == 3


def test_page_tables_map_4_gib_to_themselves(memory, kernel):
    root = load(memory, KernelConfig(kernel(bzimage(pack(KERNEL, "gzip"))))).cr3

    def walk(address):
        entry = memory.read_u64(root + 8 * (address >> 39))
        entry = memory.read_u64((entry & ~0xFFF) + 8 * (address >> 30 & 511))
        entry = memory.read_u64((entry & ~0xFFF) + 8 * (address >> 21 & 511))
        assert entry & 0x83 == 0x83  # present, writable, 2 MiB
        return (entry & ~0x1FFFFF) + (address & 0x1FFFFF)

    for address in (0, 0x6000, RUN_AT, 0xBFFF_FFFF, 0xFEE0_0000, 0xFFFF_FFF0):
        assert walk(address) == address


@pytest.mark.parametrize("method", ["gzip", "unknown"])
def test_bzimage_that_unpacks_itself(memory, kernel, method, folder):
    """It is asked to, or nobody here knows how its payload is packed."""
    payload = b"\x89LZO\0" * 20 if method == "unknown" else pack(KERNEL, method)
    unpacker = "host" if method == "unknown" else "guest"
    code = os.urandom(4096)
    config = KernelConfig(kernel(bzimage(payload, code)), "", "x", unpacker)
    found = load(memory, config)
    assert (found.kind, found.entry) == (LINUX64, RUN_AT + 0x200)
    assert memory.read(RUN_AT, len(code + payload)) == code + payload
    assert boot_params(memory, found).code32_start == RUN_AT
    assert not folder.exists()


@pytest.mark.parametrize(
    ("fields", "start"),
    [
        ({"pref_address": 0}, 2 * M),
        ({"pref_address": 0, "relocatable_kernel": 0}, M),
        ({"pref_address": 17 * M}, 18 * M),
        ({"pref_address": 17 * M, "relocatable_kernel": 0}, 17 * M),
    ],
)
def test_where_a_bzimage_runs(memory, kernel, fields, start):
    path = kernel(bzimage(pack(KERNEL, "gzip"), **fields))
    assert load(memory, KernelConfig(path, unpack="guest")).entry == start + 0x200


def test_vmlinux(memory, kernel):
    initrd = kernel(b"initrd", "initrd")
    found = load(memory, KernelConfig(kernel(KERNEL), initrd, "quiet"), rsdp=0xE0000)
    assert (found.kind, found.entry) == (LINUX64, RUN_AT + 8)
    params = boot_params(memory, found)
    assert (params.type_of_loader, params.loadflags, params.version) == (0xFF, 1, 0x20C)
    assert (params.kernel_alignment, params.acpi_rsdp_addr) == (2 * M, 0xE0000)
    assert memory.read(params.ramdisk_image, params.ramdisk_size) == b"initrd"
    with pytest.raises(ConfigError, match="2048 bytes are too long; give at most 2047"):
        load(memory, KernelConfig(kernel(KERNEL), append="x" * 2048))


@pytest.mark.parametrize("unpacker", ["host", "guest"])
@pytest.mark.parametrize(
    ("fields", "append", "message"),
    [
        ({"cmdline_size": 8}, "x" * 9, "-append: 9 bytes are too long; give at most 8$"),
        ({"cmdline_size": 0}, "x", "-append: 1 bytes are too long; give at most 0$"),
        ({"cmdline_size": 2**32 - 1}, "x" * 4096, "give at most 4095$"),
        ({"initrd_addr_max": RUN_AT + M - 1}, "", r"-initrd .* above the kernel and below 0x1100"),
        ({"initrd_addr_max": 0}, "", "-initrd .* above the kernel and below 0x1; give a smaller"),
    ],
)
def test_limits_of_the_header(memory, kernel, fields, append, message, unpacker):
    path = kernel(bzimage(pack(KERNEL, "gzip"), **fields))
    initrd = kernel(b"x", "initrd")
    with pytest.raises(ConfigError, match=message):
        load(memory, KernelConfig(path, initrd, append, unpacker))


def test_initrd_lies_below_initrd_addr_max(memory, kernel):
    path = kernel(bzimage(pack(KERNEL, "gzip"), initrd_addr_max=40 * M - 1))
    found = load(memory, KernelConfig(path, kernel(bytes(5000), "initrd")))
    assert boot_params(memory, found).ramdisk_image == 40 * M - 8192


@pytest.mark.parametrize("unpacker", ["host", "guest"])
@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"boot_flag": 0}, "without the boot flag 0xaa55; it is damaged"),
        ({"version": 0x205}, "without a 64-bit entry; give a 64-bit Linux 3.8 or newer"),
        ({"version": 0x20B}, "without a 64-bit entry"),
        ({"xloadflags": 2}, "without a 64-bit entry"),
        ({"loadflags": 0x80}, "without a 64-bit entry"),
        ({"jump": 0x61EB}, "setup header of the bzImage ends at 0x263; it is damaged"),
        ({"jump": 0}, "setup header of the bzImage ends at 0x202"),
        ({"syssize": 0}, r"should have 1536 \+ 0 bytes, but it has \d+; it is truncated"),
        ({"syssize": 2**32 - 1}, "truncated or damaged"),
        ({"setup_sects": 255}, "truncated or damaged"),
        ({"payload_offset": 2**32 - 1}, "payload of the bzImage lies beyond its end"),
        ({"payload_length": 2**32 - 1}, "payload of the bzImage lies beyond its end"),
        ({"kernel_alignment": 0}, "kernel_alignment 0x0 of the bzImage is no power of two"),
        ({"kernel_alignment": 0x180000}, "kernel_alignment 0x180000 of the bzImage is no power"),
    ],
)
def test_headers_that_are_refused(memory, kernel, fields, message, unpacker):
    path = kernel(bzimage(pack(KERNEL, "gzip"), **fields))
    with pytest.raises(ConfigError, match=message) as caught:
        load(memory, KernelConfig(path, unpack=unpacker))
    assert str(caught.value).startswith("-kernel ")
    assert memory.read(RUN_AT, 16) == bytes(16)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"init_size": 2**32 - 1}, "it is meant to run at 0x1000000, beyond 3G"),
        (
            {"init_size": 49 * M},
            "0x3100000 bytes to be loaded at 0x1000000 are not all RAM; give at least -m 65M",
        ),
        ({"pref_address": 2**64 - 1}, "beyond 3G; build it for less"),
        ({"pref_address": 1 << 40}, "beyond 3G; build it for less"),
        ({"pref_address": 64 * M}, "are not all RAM; give at least -m 66M"),
        ({"pref_address": 0x1000, "relocatable_kernel": 0}, "are not all RAM"),
        (
            {"pref_address": 0x6000, "relocatable_kernel": 0, "init_size": 1},
            "covers the boot structures at 0x6000",
        ),
    ],
)
def test_places_that_are_refused(memory, kernel, fields, message):
    path = kernel(bzimage(pack(KERNEL, "gzip"), **fields))
    with pytest.raises(ConfigError, match=message):
        load(memory, KernelConfig(path, unpack="guest"))


def test_setup_sects_0_means_4(memory, kernel):
    data = bzimage(pack(KERNEL, "gzip"), setup_sects=0)
    path = kernel(data[:1536] + bytes(1024) + data[1536:])
    assert load(memory, KernelConfig(path)).entry == RUN_AT + 8


def test_last_paragraph_need_not_be_whole(memory, kernel):
    """syssize counts in units of 16 bytes."""
    code = os.urandom(1024)
    data = bzimage(b"", code, payload_offset=0)
    for missing in (0, 1, 15):
        path = kernel(data[: len(data) - missing])
        assert load(memory, KernelConfig(path, unpack="guest")).entry == RUN_AT + 0x200
        assert memory.read(RUN_AT, 1024 - missing) == code[: 1024 - missing]
    with pytest.raises(ConfigError, match="truncated"):
        load(memory, KernelConfig(kernel(data[:-16]), unpack="guest"))


def test_what_is_appended_is_not_loaded(memory, kernel):
    """Signatures are, behind what syssize counts."""
    data = bzimage(pack(KERNEL, "gzip"))
    load(memory, KernelConfig(kernel(data + b"\xaa" * 5000), unpack="guest"))
    assert memory.read(RUN_AT + len(data) - 1536, 16) == bytes(16)


def test_bzimage_of_every_length(memory, kernel):
    """With its first sector alone it is a boot sector, whatever else it is an error, and never a
    traceback."""
    data = bzimage(pack(KERNEL, "gzip"))
    assert load(memory, KernelConfig(kernel(data[:0x200]))).kind == FLAT
    for size in (1, 0x1F0, 0x1FF):
        with pytest.raises(ConfigError, match=r"a file of zeros|of no kind that is known"):
            load(memory, KernelConfig(kernel(data[:size])))
    for size in (0x203, 0x205, 0x206, 0x263, 0x264, 0x3FF, 0x600, 0x7FF, len(data) - 16):
        with pytest.raises(ConfigError, match="truncated"):
            load(memory, KernelConfig(kernel(data[:size])))


@pytest.mark.parametrize(
    ("payload", "message"),
    [
        (pack(elf(load_at=RUN_AT, wide=False), "xz"), "32-bit ELF, and Linux is entered in"),
        (pack(b"not a kernel" * 2, "zstd"), "not an ELF file"),
        (pack(b"", "gzip"), "the file ends before"),
        (
            pack(elf(load_at=64 * M), "lz4"),
            "to be loaded at 0x4000000 are not all RAM; give at least -m 65M",
        ),
        (pack(elf(load_at=RUN_AT, entry=M), "xz"), "starts at 0x100000, where nothing is loaded"),
        (b"\x1f\x8b", "cannot be unpacked|does not unpack|which no kernel has"),
        (b"\xfd7zXZ\0", "cannot be unpacked|does not unpack|which no kernel has"),
        (b"BZh9" + b"\xff" * 4, "a payload of 4294967295 bytes, which no kernel has"),
        (
            pack(KERNEL, "gzip")[:-4] + struct.pack("<I", 512 * M),
            "does not unpack|cannot be unpack",
        ),
    ],
)
def test_payloads_that_are_refused(memory, kernel, payload, message, folder):
    with pytest.raises(ConfigError, match=f"^-kernel .*({message})"):
        load(memory, KernelConfig(kernel(bzimage(payload))))
    assert memory.read(RUN_AT, 16) == bytes(16)


@pytest.mark.parametrize("method", METHODS[:-1])
@pytest.mark.parametrize("declared", [-1, +1])
def test_wrong_declared_size(memory, kernel, method, declared, folder):
    """gzip's is in its checksum; of the others nothing but the bytes tells."""
    payload = pack(KERNEL, method)
    size = struct.pack("<I", len(KERNEL) + declared)
    with pytest.raises(ConfigError, match=f"the {method} payload (cannot|does not) unpack|be unp"):
        load(memory, KernelConfig(kernel(bzimage(payload[:-4] + size))))
    assert not folder.exists()


@pytest.mark.parametrize("method", METHODS[:-1])
def test_bomb_is_not_unpacked(method):
    """A payload that would have 16 MiB and declares 1 KiB is given up after that."""
    blob = Blob("kernel", "-kernel")
    good, bomb = pack(bytes(1024), method), pack(bytes(16 * M), method)
    tracemalloc.start()
    try:
        unpack.unpack(blob, good)
        _, usual = tracemalloc.get_traced_memory()  # has a dictionary in it
        tracemalloc.reset_peak()
        with pytest.raises(ConfigError, match=r"cannot be unpacked|does not unpack to 1024 bytes"):
            unpack.unpack(blob, bomb[:-4] + good[-4:])
        assert tracemalloc.get_traced_memory()[1] < usual + M
    finally:
        tracemalloc.stop()


def test_lz4_of_several_blocks():
    data = os.urandom(1000) * 20000
    assert unpack.unpack(Blob("kernel", "-kernel"), pack(data, "lz4")) == data


def test_lz4_blocks_that_hold_nothing(memory, kernel):
    """There may be no more of them than the declared size needs."""
    payload = b"\x02\x21\x4c\x18" + struct.pack("<IB", 1, 0) * 100 + struct.pack("<I", 9 * M)
    with pytest.raises(ConfigError, match="lz4 payload does not unpack to"):
        load(memory, KernelConfig(kernel(bzimage(payload))))


def test_dictionary_is_bounded(memory, kernel):
    """An lzma header that asks for a dictionary of 4 GiB."""
    payload = pack(KERNEL, "lzma")
    payload = payload[:1] + b"\xff\xff\xff\xff" + payload[5:]
    assert not unpack.is_known(payload)
    payload = payload[:1] + b"\0\0\0\x80" + payload[5:]
    with pytest.raises(ConfigError, match=r"lzma payload cannot be unpacked .*Memory"):
        load(memory, KernelConfig(kernel(bzimage(payload))))


def test_no_descriptor_is_left(memory, kernel):
    before = descriptors("self")
    path = kernel(bzimage(pack(KERNEL, "gzip")))
    for _ in range(2):
        load(memory, KernelConfig(path))
    bad = kernel(bzimage(pack(elf(load_at=RUN_AT, entry=0), "xz")), "bad")
    for _ in range(2):
        with pytest.raises(ConfigError, match="where nothing is loaded"):
            load(memory, KernelConfig(bad))
    assert descriptors("self") == before


MEMORY = guest_memory(20 * M)
FILES = [bzimage(pack(KERNEL, method)) for method in METHODS]
PAYLOADS = [pack(KERNEL, method) for method in METHODS]


def load_data(data, unpacker):
    """The message if it is refused, else ''."""
    fd = os.memfd_create("kernel")
    try:
        os.write(fd, data)
        found = load(MEMORY, KernelConfig(f"/proc/self/fd/{fd}", "", "x", unpacker))
        assert MEMORY.contains(found.entry, 1)
    except ConfigError as error:
        return str(error)
    finally:
        os.close(fd)
    return ""


@settings(deadline=None)
@given(
    st.sampled_from(FILES),
    st.dictionaries(st.sampled_from(sorted(SETUP_HEADER)), st.binary(min_size=8, max_size=8)),
    st.sampled_from(["host", "guest"]),
)
def test_hostile_headers(data, fields, unpacker):
    data = bytearray(data)
    for name, value in fields.items():
        offset, kind = SETUP_HEADER[name]
        if name != "header":
            size = struct.calcsize(kind)
            data[offset : offset + size] = value[:size]
    message = load_data(data, unpacker)
    assert message == "" or message.startswith(("-kernel ", "-append"))


@settings(deadline=None)
@given(
    st.sampled_from(PAYLOADS),
    st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), max_size=4),
    st.integers(0, 800),
)
def test_hostile_payloads(data, edits, size):
    data = bytearray(data[:size])
    for at, value in edits:
        data[at : at + 1] = bytes([value])
    message = load_data(bzimage(bytes(data)), "host")
    assert message == "" or message.startswith("-kernel ")


def test_header_ends_where_the_boot_parameters_have_no_more_room(memory, kernel):
    found = load(memory, KernelConfig(kernel(bzimage(pack(KERNEL, "xz"), jump=0xFFEB))))
    assert boot_params(memory, found).e820_entries == len(memory_map(memory))
    assert memory.read(found.info + bootparams.HEADER_END, 0x40) == bytes(0x40)
    assert layout.ZERO_PAGE + 4096 <= layout.BOOT_INFO_END
