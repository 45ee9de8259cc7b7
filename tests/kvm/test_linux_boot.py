"""What Linux's 64-bit boot protocol promises, as a guest that is entered by it sees it.

``guests/linux64`` checks registers, segments and boot parameters itself and ends with a verdict.
"""

import re
import struct

import pytest
from harness import guests

from pyvmm.testing.images import bzimage, pack

M = 1 << 20
INITRD = bytes(range(256)) * 33
METHODS = ("gzip", "bzip2", "lzma", "xz", "lz4", "zstd", "none")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """The folder of unpacked kernels; not made yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "pyvmm"


@pytest.fixture
def checker(tmp_path):
    """A function that makes the guest a bzImage, packed with a method, and returns its path."""
    elf = guests.image("linux64.elf").read_bytes()
    (offset,), (size,) = (struct.unpack_from("<Q", elf, 64 + field) for field in (8, 32))

    def make(method, **header):
        path = tmp_path / f"bzImage-{method}"
        path.write_bytes(bzimage(pack(elf, method), elf[offset : offset + size], **header))
        return path

    return make


def hash31(data):
    value = 0
    for byte in data:
        value = (value * 31 + byte) & 0xFFFF_FFFF
    return value


def passes(machine, entered_as):
    """Wait for the verdict; what was printed on the way."""
    start = machine.seen
    verdict = machine.expect(r"linux64 (PASS as (\w+)|FAIL .*)\r\n")
    text = machine.serial[start : machine.seen].decode()
    assert verdict[1] == f"PASS as {entered_as}".encode(), text
    return text


@pytest.mark.parametrize("method", METHODS)
def test_bzimage_unpacked_by_the_host(vm, tmp_path, checker, method, cache):
    initrd = tmp_path / "initrd"
    initrd.write_bytes(INITRD)
    machine = vm("-kernel", checker(method), "-initrd", initrd, append="console=ttyS0 a=b")
    text = passes(machine, "ELF")
    assert "cmdline console=ttyS0 a=b\r\n" in text
    assert f"initrd {64 * M - 0x3000:#x} {len(INITRD):#x} {hash31(INITRD):#x}\r\n" in text
    ranges = re.findall(r"e820 (\S+) (\S+) 0x1\r\n", text)
    assert ranges == [("0x0", "0x9fc00"), ("0x100000", hex(63 * M))]
    # And once more, from the cache and into used memory.
    machine.hmp("system_reset")
    assert passes(machine, "ELF") == text
    assert len(list(cache.iterdir()) if cache.exists() else []) == (method != "none")


def test_bzimage_unpacks_itself(vm, checker):
    image = checker("xz", code32_start=0, setup_data=M, type_of_loader=0)
    machine = vm("-kernel", image, "-machine", "kernel-unpack=guest", append="x" * 2047)
    assert "cmdline " + "x" * 2047 + "\r\n" in passes(machine, "bzImage")


def test_vmlinux(vm, tmp_path):
    initrd = tmp_path / "initrd"
    initrd.write_bytes(b"x")
    machine = vm("-kernel", guests.image("linux64.elf"), "-initrd", initrd, append="y", smp=2)
    text = passes(machine, "ELF")
    assert "cmdline y\r\n" in text
    assert f"initrd {64 * M - 0x1000:#x} 0x1 0x78\r\n" in text


def test_memory_above_4g(vm, checker):
    machine = vm("-kernel", checker("lz4"), memory="6G")
    assert "e820 0x100000000 0xc0000000 0x1\r\n" in passes(machine, "ELF")


def test_reset_loads_the_file_that_is_there_now(vm, checker):
    """The kernel that is gone leaves the guest paused; a good one lets it start again."""
    image = checker("gzip")
    machine = vm("-kernel", image, append="first")
    passes(machine, "ELF")
    data = image.read_bytes()
    image.write_bytes(data[:-16])
    assert "truncated" in machine.hmp("system_reset")
    assert machine.status.startswith("paused")
    image.write_bytes(data)
    machine.hmp("system_reset")
    machine.hmp("cont")
    passes(machine, "ELF")
