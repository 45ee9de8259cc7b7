"""Every kind of guest memory, mapped, shared or not, and seen by the guest."""

import os
import re
from pathlib import Path

import pytest
from harness import guests, process, run_cli

KINDS = {
    "default": [],
    "anonymous": ["-machine", "anon-alloc=mmap"],
    "aux-ram-share": ["-machine", "aux-ram-share=on"],
    "memfd": ["-object", "memory-backend-memfd,id=ram0,size=64M"],
    "private memfd": ["-object", "memory-backend-memfd,id=ram0,size=64M,share=off"],
    "unsealed memfd": ["-object", "memory-backend-memfd,id=ram0,size=64M,seal=off"],
    "file": ["-object", "memory-backend-file,id=ram0,size=64M,mem-path=ram,share=on"],
    "private file": ["-object", "memory-backend-file,id=ram0,size=64M,mem-path=ram,share=off"],
    "folder": ["-object", "memory-backend-file,id=ram0,size=64M,mem-path=.,share=on"],
    "ram": ["-object", "memory-backend-ram,id=ram0,size=64M"],
    "shared ram": ["-object", "memory-backend-ram,id=ram0,size=64M,share=on"],
    "prealloc": ["-object", "memory-backend-memfd,id=ram0,size=64M,prealloc=on"],
}


@pytest.mark.parametrize("kind", KINDS)
def test_guest_uses_all_of_it(vm, kind):
    machine = vm(*KINDS[kind], append="memhash passes=2", smp=2)
    machine.expect(r"memhash 6\d MiB")
    machine.expect("memhash PASS")
    assert machine.wait_exit() == 0
    assert machine.stderr() == ""


def test_memory_is_what_the_guest_wrote(vm, tmp_path):
    """Shared memory is the file; the monitor, the file and the guest agree."""
    path = tmp_path / "ram"
    machine = vm(
        "-object", f"memory-backend-file,id=ram0,size=64M,mem-path={path},share=on", append="shell"
    )
    machine.expect("guest> ")
    seen = machine.hmp("xp /16xb 0x100000")
    with open(path, "rb") as file:
        file.seek(0x100000)
        content = file.read(16)
    assert [int(byte, 16) for byte in re.findall(r" 0x(..)", seen)] == list(content)
    assert any(content)


def test_private_file_stays_as_it_was(vm, tmp_path):
    path = tmp_path / "ram"
    path.write_bytes(bytes(64 << 20))
    machine = vm(
        *("-object", f"memory-backend-file,id=ram0,size=64M,mem-path={path},share=off"),
        append="memhash mb=8 passes=1",
    )
    assert machine.wait_exit() == 0
    assert not any(path.read_bytes())


def test_memfd_is_sealed_against_resizing(vm):
    machine = vm(append="counter")
    machine.expect("counter ready")
    with open(process.memfd(machine.pid, "pc.ram"), "r+b") as file:
        assert os.fstat(file.fileno()).st_size == 64 << 20
        for size in (0, 32 << 20, 128 << 20):
            with pytest.raises(PermissionError):
                os.truncate(file.fileno(), size)


def test_prealloc_takes_it_all_at_once(vm):
    def kib(options):
        machine = vm("-S", *options, append="halt")
        machine.hmp("info status")
        with open(process.memfd(machine.pid, "ram0"), "rb") as file:
            return os.fstat(file.fileno()).st_blocks // 2

    backend = "memory-backend-memfd,id=ram0,size=64M"
    assert kib(["-object", backend]) < 4096
    assert kib(["-object", f"{backend},prealloc=on"]) == 64 << 10


def test_split_at_4g(vm):
    """The guest writes above 4 GiB; only what it touches becomes the host's."""
    machine = vm("-object", "memory-backend-memfd,id=ram0,size=5G", memory="5G")
    machine.expect("guest> ")
    # The first bytes above, and the last of all: 2 GiB of RAM lie above 4 GiB.
    assert machine.shell("hash 0x100000000 0x1000").startswith("hash 0x100000000")
    assert machine.shell("hash 0x17ffff000 0x1000").startswith("hash 0x17ffff000")
    assert "is not RAM" in machine.shell("hash 0x180000000 1")
    assert "is not RAM" in machine.shell("hash 0xbffffff8 16")
    assert machine.hmp("xp /gx 0x17ffffff8") == "17ffffff8: 0x0000000000000000\n"
    assert "Cannot access memory" in machine.hmp("xp /gx 0x180000000")


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["-m", "128M", "-object", "memory-backend-memfd,id=r,size=64M"], "make them equal"),
        (["-object", "memory-backend-memfd,id=r,size=1M"], ""),
        (["-object", "memory-backend-memfd,id=r,size=0"], "size"),
        (["-object", "memory-backend-memfd,id=r,size=64M,share=maybe"], "share"),
        (["-object", "memory-backend-memfd,id=r,size=64M,frob=on"], "frob"),
        (["-object", "memory-backend-memfd,id=r,size=64M,hugetlbsize=2M"], "needs hugetlb"),
        (["-object", "memory-backend-memfd,id=r,size=64M,hugetlb=on,hugetlbsize=3M"], "power of"),
        (["-object", "memory-backend-memfd,size=64M"], "id is missing"),
        (["-object", "memory-backend-memfd,id=r r,size=64M"], "no name"),
        (["-object", "memory-backend-file,id=r,size=64M"], "mem-path is missing"),
        (["-object", "memory-backend-file,id=r,size=64M,mem-path=/nonexistent/r"], "/nonexistent"),
        (["-object", "memory-backend-file,id=r,size=64M,mem-path=/dev/null"], "/dev/null"),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)
def test_wrong_memory(options, text):
    done = run_cli("run", "-nodefaults", *options)
    assert done.returncode in (1, 2)
    (line,) = done.stderr.splitlines()
    assert text in line


def test_object_gives_the_size(vm):
    machine = vm("-object", "memory-backend-memfd,id=r,size=48M", memory=None, append="shell")
    machine.expect("guest> ")
    assert "ram 0x100000 size 0x2f00000" in machine.shell("memory")


def test_one_of_two_objects(vm):
    machine = vm(
        *("-object", "memory-backend-memfd,id=a,size=32M"),
        *("-object", "memory-backend-memfd,id=b,size=64M"),
        *("-machine", "memory-backend=b"),
        append="memhash passes=1",
    )
    machine.expect(r"memhash 6\d MiB")
    assert machine.wait_exit() == 0


def huge_pages():
    free = re.search(r"HugePages_Free:\s+(\d+)", Path("/proc/meminfo").read_text())
    return int(free[1])


def test_huge_pages(vm):
    options = ["-object", "memory-backend-memfd,id=r,size=64M,hugetlb=on,hugetlbsize=2M"]
    if huge_pages() < 32:
        done = run_cli("run", "-nodefaults", *options)
        assert done.returncode in (1, 2)
        assert "huge" in done.stderr
        assert len(done.stderr.splitlines()) == 1
        return
    machine = vm(*options, append="memhash passes=1")
    assert machine.wait_exit() == 0


def test_place_of_option_roms_is_memory_that_reads_as_zero(vm, tmp_path):
    """What is no memory reads as ones, and each read is an exit; Linux makes 24,000 of them."""
    code = (
        b"\xb8\x00\xc0\x30\xdb"  # mov $0xc000, %ax; xor %bl, %bl
        b"\x8e\xd8\x0a\x1e\x00\x00"  # 1: mov %ax, %ds; or (0), %bl
        b"\x40\x3d\x00\xf0\x72\xf4"  # inc %ax; cmp $0xf000, %ax; jb 1b
        b"\xb8\x00\xc0\x8e\xd8\xc6\x06\x00\x00\x55"  # mov $0xc000, %ax; mov %ax, %ds; movb $85, 0
        b"\x0a\x1e\x00\x00\x88\xd8\xe6\xf4"  # or (0), %bl; mov %bl, %al; out %al, $0xf4
    )
    image = guests.flat(tmp_path, code + guests.SPIN)
    machine = vm("-kernel", image, "-device", "isa-debug-exit,iobase=0xf4,iosize=1")
    assert machine.wait_exit() == 1  # (0 << 1) | 1
