"""What Linux's 64-bit boot protocol promises, as a guest that is entered by it sees it.

``guests/linux64`` checks registers, segments and boot parameters itself and ends with a verdict.
"""

import os
import re

import pytest
from harness import guests, process

M = 1 << 20
INITRD = bytes(range(256)) * 33
METHODS = ("gzip", "bzip2", "lzma", "xz", "lz4", "zstd", "none")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """The folder of unpacked kernels; not made yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "pyvmm"


@pytest.mark.parametrize("method", METHODS)
def test_bzimage_unpacked_by_the_host(vm, tmp_path, method, cache):
    initrd = tmp_path / "initrd"
    initrd.write_bytes(INITRD)
    machine = vm(
        "-kernel", guests.bzimage(tmp_path, method), "-initrd", initrd, append="console=ttyS0 a=b"
    )
    text = guests.expect_verdict(machine, "ELF")
    assert "cmdline console=ttyS0 a=b\r\n" in text
    assert f"initrd {64 * M - 0x3000:#x} {len(INITRD):#x} {guests.hash31(INITRD):#x}\r\n" in text
    ranges = re.findall(r"e820 (\S+) (\S+) 0x1\r\n", text)
    assert [start for start, _ in ranges] == ["0x0", "0x100000"]
    assert ranges[1][1] == hex(63 * M)
    # And once more, from the cache and into used memory. Only the random seed is another one.
    machine.hmp("system_reset")
    again = guests.expect_verdict(machine, "ELF")
    seed = r"seed \S+\r\n"
    assert re.sub(seed, "", again) == re.sub(seed, "", text)
    assert re.search(seed, again)[0] != re.search(seed, text)[0]
    assert len(list(cache.iterdir()) if cache.exists() else []) == (method != "none")


def test_bzimage_unpacks_itself(vm, tmp_path):
    image = guests.bzimage(tmp_path, "xz", code32_start=0, setup_data=M, type_of_loader=0)
    machine = vm("-kernel", image, "-machine", "kernel-unpack=guest", append="x" * 2047)
    assert "cmdline " + "x" * 2047 + "\r\n" in guests.expect_verdict(machine, "bzImage")


def test_vmlinux(vm, tmp_path):
    initrd = tmp_path / "initrd"
    initrd.write_bytes(b"x")
    machine = vm("-kernel", guests.image("linux64.elf"), "-initrd", initrd, append="y", smp=2)
    text = guests.expect_verdict(machine, "ELF")
    assert "cmdline y\r\n" in text
    assert f"initrd {64 * M - 0x1000:#x} 0x1 0x78\r\n" in text


def test_memory_above_4g(vm, tmp_path):
    machine = vm("-kernel", guests.bzimage(tmp_path, "lz4"), memory="6G")
    assert "e820 0x100000000 0xc0000000 0x1\r\n" in guests.expect_verdict(machine, "ELF")


def test_reset_loads_what_was_loaded(vm, tmp_path):
    """Not what the files are by then; each time, and with a copy that nobody can change."""
    image = guests.bzimage(tmp_path, "gzip")
    initrd = tmp_path / "initrd"
    initrd.write_bytes(b"x" * 5000)
    machine = vm("-kernel", image, "-initrd", initrd, append="first")
    guests.expect_verdict(machine, "ELF")
    machine.wait_status("running")
    image.write_bytes(b"no kernel")
    initrd.write_bytes(b"y")
    for _ in range(2):
        assert machine.hmp("system_reset") == ""
        text = guests.expect_verdict(machine, "ELF")
        assert f" 0x1388 {guests.hash31(b'x' * 5000):#x}\r\n" in text
    copies = [
        fd
        for fd, target in process.descriptors(machine.pid).items()
        if target.startswith("/memfd:boot/")
    ]
    assert len(copies) == 2
    for fd in copies:
        path = f"/proc/{machine.pid}/fd/{fd}"
        with open(path, "r+b", buffering=0) as file, pytest.raises(PermissionError):
            file.write(b"x")
    assert machine.stderr() == ""


def test_only_what_is_needed_is_kept(vm, tmp_path):
    """Debug information of a vmlinux has ten times its size."""
    image = tmp_path / "vmlinux"
    code = guests.image("linux64.elf").read_bytes()
    image.write_bytes(code)
    os.truncate(image, 100 << 20)
    machine = vm("-kernel", image)
    guests.expect_verdict(machine, "ELF")
    machine.wait_status("running")
    (size,) = (
        os.stat(f"/proc/{machine.pid}/fd/{fd}").st_size
        for fd, target in process.descriptors(machine.pid).items()
        if target.startswith("/memfd:boot/")
    )
    assert size <= len(code)
    image.unlink()
    machine.hmp("system_reset")
    guests.expect_verdict(machine, "ELF")
