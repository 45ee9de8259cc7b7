import os
from itertools import pairwise

import pytest
from construct import Const, Int32ul, Int64ul, Padding, Struct
from harness.process import descriptors
from hypothesis import given
from hypothesis import strategies as st

from pyvmm.boot.config import KernelConfig
from pyvmm.boot.loader import FLAT, LINUX64, MULTIBOOT, NONE, PVH, load
from pyvmm.boot.place import OWN
from pyvmm.errors import ConfigError
from pyvmm.testing.images import boot_sector, elf, guest_memory, multiboot_header, pvh_note
from pyvmm.x86 import layout

M = 1 << 20
CODE = bytes(range(1, 200))

RECORD = Struct(
    "magic" / Const(b"PVMB"), "kind" / Int32ul, "entry" / Int32ul, "info" / Int32ul,
    "eax" / Int32ul, "cr3" / Int32ul, Padding(8),
)  # fmt: skip
# Xen's start_info.h once more, independently of the module.
START_INFO = Struct(
    "magic" / Const(0x336EC578, Int32ul), "version" / Int32ul, "flags" / Int32ul,
    "nr_modules" / Int32ul, "modlist_paddr" / Int64ul, "cmdline_paddr" / Int64ul,
    "rsdp_paddr" / Int64ul, "memmap_paddr" / Int64ul, "memmap_entries" / Int32ul,
    "reserved" / Int32ul,
)  # fmt: skip
MODULE = Struct(
    "paddr" / Int64ul, "size" / Int64ul, "cmdline_paddr" / Int64ul, "reserved" / Int64ul
)
MEMMAP = Struct("addr" / Int64ul, "size" / Int64ul, "type" / Int32ul, "reserved" / Int32ul)


@pytest.fixture
def memory():
    return guest_memory(16 * M)


@pytest.fixture
def kernel(tmp_path):
    """A function that writes a kernel image and returns its path."""

    def write(data, name="kernel"):
        (tmp_path / name).write_bytes(data)
        return str(tmp_path / name)

    return write


def record(memory):
    return RECORD.parse(memory.read(0x500, 32))


@pytest.mark.parametrize("wide", [True, False])
def test_pvh(memory, kernel, wide):
    memory.fill(M, 8 * M, 0xEE)
    blob = elf(CODE, wide=wide, notes=pvh_note(M + 3), mem_size=M)
    initrd = bytes(range(256)) * 33
    found = load(
        memory, KernelConfig(kernel(blob), kernel(initrd, "initrd"), "console=ttyS0 ticker")
    )
    assert (found.kind, found.entry, found.eax) == (PVH, M + 3, 0)
    assert not found.is_real_mode
    assert memory.read(M, len(CODE)) == CODE
    bss = memory.read(M + len(CODE), M - len(CODE))
    assert bss == bytes(len(bss))
    assert memory.read_u8(2 * M) == 0xEE
    info = START_INFO.parse(memory.read(found.info, START_INFO.sizeof()))
    assert (info.version, info.flags, info.nr_modules, info.rsdp_paddr) == (1, 0, 1, 0)
    assert memory.read(info.cmdline_paddr, 21) == b"console=ttyS0 ticker\0"
    module = MODULE.parse(memory.read(info.modlist_paddr, MODULE.sizeof()))
    assert memory.read(module.paddr, module.size) == initrd
    assert module.paddr == 16 * M - 0x3000
    assert module.cmdline_paddr == 0
    entries = MEMMAP[info.memmap_entries].parse(memory.read(info.memmap_paddr, 24 * 5))
    assert [(entry.addr, entry.size, entry.type) for entry in entries] == [
        (0, 0x98000, 1),
        (0x98000, 0x7C00, 3),
        (0x9FC00, 0x60400, 2),
        (M, 15 * M, 1),
        (0xFEC00000, 0x1400000, 2),
    ]
    left = record(memory)
    assert (left.kind, left.entry, left.info, left.eax) == (1, M + 3, found.info, 0)


def test_pvh_without_initrd(memory, kernel):
    found = load(memory, KernelConfig(kernel(elf(notes=pvh_note(M)))), rsdp=0x9FC20)
    info = START_INFO.parse(memory.read(found.info, START_INFO.sizeof()))
    assert (info.nr_modules, info.modlist_paddr) == (0, 0)
    assert info.rsdp_paddr == 0x9FC20
    assert memory.read(info.cmdline_paddr, 1) == b"\0"


def test_memory_map_above_4g(kernel):
    size = 5 << 30
    memory = guest_memory(size)
    found = load(memory, KernelConfig(kernel(elf(notes=pvh_note(M)))))
    info = START_INFO.parse(memory.read(found.info, START_INFO.sizeof()))
    entries = MEMMAP[info.memmap_entries].parse(memory.read(info.memmap_paddr, 24 * 6))
    assert [(entry.addr, entry.size, entry.type) for entry in entries[3:]] == [
        (M, (3 << 30) - M, 1),
        (0xFEC00000, 0x1400000, 2),
        (4 << 30, 2 << 30, 1),
    ]


def test_root_pointer_of_acpi(memory, kernel):
    found = load(memory, KernelConfig(kernel(elf(notes=pvh_note(M)))), rsdp=0xE0000)
    info = START_INFO.parse(memory.read(found.info, START_INFO.sizeof()))
    assert info.rsdp_paddr == 0xE0000


def test_multiboot_elf(memory, kernel):
    blob = elf(multiboot_header(3) + CODE, wide=False, vaddr=0xC000_0000, entry=0xC000_0010)
    found = load(memory, KernelConfig(kernel(blob), kernel(b"module", "initrd"), "a=b c"))
    assert (found.kind, found.entry, found.eax) == (MULTIBOOT, M + 0x10, 0x2BADB002)
    assert memory.read(M + 12, len(CODE)) == CODE
    assert memory.read(memory.read_u32(found.info + 16), 13) == b"kernel a=b c\0"
    modules = memory.read_u32(found.info + 24)
    assert memory.read(memory.read_u32(modules), 6) == b"module"
    left = record(memory)
    assert (left.kind, left.entry, left.info, left.eax) == (2, M + 0x10, found.info, 0x2BADB002)


def test_multiboot_by_addresses(memory, kernel):
    memory.fill(2 * M, 8192, 0xEE)
    header = multiboot_header(1 << 16, 2 * M + 4, 2 * M, 0, 2 * M + 4096, 2 * M + 36)
    found = load(memory, KernelConfig(kernel(b"\x90" * 4 + header + CODE)))
    assert (found.kind, found.entry) == (MULTIBOOT, 2 * M + 36)
    assert memory.read(2 * M + 36, len(CODE)) == CODE
    assert memory.read(2 * M + 36 + len(CODE), 4096 - 36 - len(CODE)).count(0) == 4060 - len(CODE)
    assert memory.read_u8(2 * M + 4096) == 0xEE


def test_multiboot_without_addresses_that_is_not_elf(memory, kernel):
    with pytest.raises(ConfigError, match="multiboot without load addresses, and not ELF"):
        load(memory, KernelConfig(kernel(multiboot_header())))


@pytest.mark.parametrize(("wide", "kind"), [(True, PVH), (False, MULTIBOOT)])
def test_kernel_of_both_kinds(memory, kernel, wide, kind):
    blob = elf(multiboot_header() + CODE, wide=wide, notes=pvh_note(M), entry=M + 12)
    assert load(memory, KernelConfig(kernel(blob))).kind == kind


def test_elf_of_neither_kind(memory, kernel):
    with pytest.raises(ConfigError, match="32-bit ELF with neither a PVH note nor a multiboot"):
        load(memory, KernelConfig(kernel(elf(wide=False))))


@pytest.mark.parametrize("data", [b"\x7f", b"\x7fEL", b"\x7fELF"])
def test_truncated_elf_is_not_flat(memory, kernel, data):
    with pytest.raises(ConfigError, match="truncated"):
        load(memory, KernelConfig(kernel(data)))


FLAT_MAX = 0x98000 - 0x7C00


@pytest.mark.parametrize(
    ("data", "type"),
    [
        (boot_sector(b"\xf4"), "auto"),
        (boot_sector(CODE).ljust(FLAT_MAX, b"\xcc"), "auto"),
        (b"\xf4", "flat"),
        (CODE, "flat"),
        (b"\x55" * FLAT_MAX, "flat"),
        (elf(notes=pvh_note(M)), "flat"),
        (b"\x1f\x8b", "flat"),
    ],
)
def test_flat(memory, kernel, data, type):
    found = load(memory, KernelConfig(kernel(data), type=type))
    assert (found.kind, found.entry, found.eax, found.info) == (FLAT, 0x7C00, 0, 0)
    assert found.is_real_mode
    assert memory.read(0x7C00, len(data)) == data
    assert memory.read(0x7C00 + len(data), 4) == bytes(4)
    assert record(memory).kind == 3


def test_flat_too_large(memory, kernel):
    data = boot_sector(b"").ljust(FLAT_MAX + 1, b"\xcc")
    for type in ("auto", "flat"):
        with pytest.raises(ConfigError, match=r"590849 bytes .*flat.*at most 590848 \(577K\)"):
            load(memory, KernelConfig(kernel(data), type=type))


def test_flat_takes_no_initrd_and_no_command_line(memory, kernel):
    data = boot_sector(CODE)
    for config in (
        KernelConfig(kernel(data), append="x"),
        KernelConfig(kernel(data), kernel(CODE, "initrd")),
    ):
        with pytest.raises(ConfigError, match=r"flat image takes no -initrd and no -append"):
            load(memory, config)


def test_no_kernel_means_the_reset_vector(memory):
    found = load(memory, KernelConfig())
    assert (found.kind, found.entry, found.is_real_mode) == (NONE, 0xFFFFFFF0, True)
    assert record(memory).kind == 0
    for config in (KernelConfig(append="x"), KernelConfig(initrd="/x")):
        with pytest.raises(ConfigError, match="need a kernel; add -kernel"):
            load(memory, config)


def test_loading_again_restores_the_image(memory, kernel):
    config = KernelConfig(kernel(elf(CODE, notes=pvh_note(M), mem_size=8192)), append="x")
    load(memory, config)
    before = memory.read(0, 0xA0000), memory.read(M, 8192)
    memory.fill(0, 0xA0000, 0)
    memory.fill(M, 8192, 0xCC)
    load(memory, config)
    assert (memory.read(0, 0xA0000), memory.read(M, 8192)) == before


@pytest.mark.parametrize(
    ("segment", "message"),
    [
        ((1, 1, 0, 0x4FF, 2, 2), "covers the boot structures at 0x500"),
        ((1, 1, 0, 0x0, 1, 0xA0000), "covers the boot structures at 0x500"),
        ((1, 1, 0, 0x6FFF, 1, 1), "covers the boot structures at 0x6000"),
        ((1, 1, 0, 0x20FFF, 1, 1), "covers the boot structures at 0x20000"),
        ((1, 1, 0, 0x9FFFF, 1, 2), "are not all RAM; link the kernel elsewhere"),
        ((1, 1, 0, 0xF0000, 1, 2), "are not all RAM"),
        ((1, 0, 0, 16 * M - 1, 1, 2), "are not all RAM; give at least -m 17M"),
        ((1, 0, 0, 16 * M, 1, M), "are not all RAM; give at least -m 17M"),
        (
            (1, 0, 0, 2 * M, 1, 1 << 40),
            "0x10000000000 bytes to be loaded at 0x200000 are not all RAM",
        ),
        ((1, 0, 0, (1 << 64) - 1, 1, 2), "are not all RAM"),
        ((1, 0, 0, (1 << 64) - 4096, 1, (1 << 64) - 1), "are not all RAM"),
    ],
)
def test_segments_that_cannot_be_placed(memory, kernel, segment, message):
    with pytest.raises(ConfigError, match=message):
        load(memory, KernelConfig(kernel(elf(notes=pvh_note(M), segments=(segment,)))))
    assert memory.read(M, 4) == bytes(4)


@pytest.mark.parametrize("entry", [0, M - 1, M + 1, (1 << 32) + M, (1 << 64) - 1])
def test_entry_where_nothing_is_loaded(memory, kernel, entry):
    with pytest.raises(ConfigError, match=f"starts at {entry:#x}, where nothing is loaded"):
        load(memory, KernelConfig(kernel(elf(notes=pvh_note(entry)))))
    if entry < 1 << 32:
        blob = elf(multiboot_header(), wide=False, entry=entry, load_at=4 * M)
        with pytest.raises(ConfigError, match="where nothing is loaded"):
            load(memory, KernelConfig(kernel(blob)))


def test_initrd_that_does_not_fit(memory, kernel):
    blob = kernel(elf(notes=pvh_note(M), mem_size=8 * M))
    path = kernel(b"", "initrd")
    os.truncate(path, 7 * M)
    load(memory, KernelConfig(blob, path))
    for size in (7 * M + 1, 16 * M, 64 * M):
        os.truncate(path, size)
        with pytest.raises(ConfigError, match=r"-initrd .*do not fit into RAM above the kernel"):
            load(memory, KernelConfig(blob, path))


@pytest.mark.parametrize(
    ("append", "message"),
    [
        ("x" * 4096, "-append: 4096 bytes are too long; give at most 40(95|88)$"),
        ("ä" * 2048, "-append: 4096 bytes are too long"),
        ("a\0b", "character that no path or name can have"),
        ("\ud800", "character that no path or name can have"),
        ("a\nb", "control character"),
        ("\x1b[2J", "control character"),
    ],
)
def test_command_lines_that_are_refused(memory, kernel, append, message):
    for blob in (elf(notes=pvh_note(M)), elf(multiboot_header(), wide=False)):
        with pytest.raises(ConfigError, match=message):
            load(memory, KernelConfig(kernel(blob, "k"), append=append))


def test_longest_command_line(memory, kernel):
    load(memory, KernelConfig(kernel(elf(notes=pvh_note(M))), append="x" * 4095))
    assert memory.read(layout.CMDLINE, 4096) == b"x" * 4095 + b"\0"


@pytest.mark.parametrize("option", ["-kernel", "-initrd"])
def test_files_that_cannot_be_read(memory, kernel, tmp_path, option):
    good = kernel(elf(notes=pvh_note(M)))
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "empty").touch()
    with (tmp_path / "huge").open("wb") as huge:
        huge.truncate(10 << 30)
    for path, message in (
        (tmp_path / "missing", "No such file or directory; name a readable file"),
        (tmp_path, "not a regular file"),
        (tmp_path / "fifo", "not a regular file"),
        (tmp_path / "empty", "the file is empty"),
        (tmp_path / "huge", "larger than 4G"),
        ("a\0b", "name a readable file"),
        ("a\nb", "No such file"),
        ("x" * 5000, "File name too long"),
    ):
        config = KernelConfig(str(path)) if option == "-kernel" else KernelConfig(good, str(path))
        with pytest.raises(ConfigError, match=message) as caught:
            load(memory, config)
        assert str(caught.value).startswith(option)
        assert str(caught.value).isprintable()


def test_unreadable_file(memory, kernel, monkeypatch):
    def fail(*_):
        raise OSError(5, "Input/output error")

    path = kernel(elf(notes=pvh_note(M)))
    for call in ("preadv", "pread"):
        monkeypatch.setattr(os, call, fail)
        with pytest.raises(ConfigError, match="Input/output error"):
            load(memory, KernelConfig(path))


def test_file_that_shrinks_or_trickles(memory, kernel, monkeypatch):
    path = kernel(elf(CODE, notes=pvh_note(M)))
    pread, preadv = os.pread, os.preadv
    monkeypatch.setattr(os, "pread", lambda fd, size, at: pread(fd, min(size, 7), at))
    monkeypatch.setattr(os, "preadv", lambda fd, views, at: preadv(fd, [views[0][:7]], at))
    load(memory, KernelConfig(path))
    assert memory.read(M, len(CODE)) == CODE
    monkeypatch.setattr(
        os, "preadv", lambda fd, views, at: preadv(fd, [views[0][: max(250 - at, 0)]], at)
    )
    with pytest.raises(ConfigError, match="shrank while it was read"):
        load(memory, KernelConfig(path))
    monkeypatch.setattr(os, "pread", lambda fd, size, at: pread(fd, min(size, 7), at)[: 60 - at])
    with pytest.raises(ConfigError, match="shrank while it was read"):
        load(memory, KernelConfig(path))


def test_no_descriptor_is_left(memory, kernel):
    before = descriptors("self")
    load(memory, KernelConfig(kernel(elf(notes=pvh_note(M)), "k"), kernel(CODE, "initrd")))
    for data in (b"\x7fELF", elf(wide=False), elf(notes=pvh_note(0))):
        with pytest.raises(ConfigError):
            load(memory, KernelConfig(kernel(data)))
    assert descriptors("self") == before


MEMORY = guest_memory(4 * M)
IMAGES = [
    elf(CODE, notes=pvh_note(M), mem_size=8192),
    elf(multiboot_header(3) + CODE, wide=False),
    multiboot_header(1 << 16, M, M, 0, M + 4096, M + 32) + CODE,
]


@given(
    st.sampled_from(IMAGES),
    st.lists(st.tuples(st.integers(0, 330), st.integers(0, 255)), max_size=6),
    st.integers(1, 400),
)
def test_mutated_images(data, edits, size):
    data = bytearray(data)
    for at, value in edits:
        data[at : at + 1] = bytes([value])
    fd = os.memfd_create("kernel")
    message = "-kernel"
    try:
        os.write(fd, data[:size])
        found = load(MEMORY, KernelConfig(f"/proc/self/fd/{fd}"))
        assert found.kind in (PVH, MULTIBOOT, FLAT, LINUX64)
        assert MEMORY.contains(found.entry, 1)
    except ConfigError as error:
        message = str(error)
    finally:
        os.close(fd)
    assert message.startswith("-kernel")


def test_own_structures_lie_apart_and_in_conventional_memory():
    spans = sorted(OWN)
    assert all(end <= start for (_, end), (start, _) in pairwise(spans))
    assert spans[-1] == (layout.TABLES_START, layout.VGA_START)
    assert spans[1][1] <= layout.FLAT_START - 0x400  # the ROM's stack
