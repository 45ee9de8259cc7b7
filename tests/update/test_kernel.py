"""The kernel's file belongs to the start: updates and resets have no use for it."""

import shlex
import shutil
import sys
from pathlib import Path

import pytest
from faults.tools import BACK, replaced
from harness import guests, process

FIRMWARE = Path(__file__).parents[2] / "firmware" / "build" / "bios.bin"
PACKAGE = Path(__file__).parents[2] / "pyvmm"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """Unpacked kernels stay in the test's folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def test_update_and_reset_without_the_kernel(vm, tmp_path):
    image = guests.bzimage(tmp_path, "zstd")
    machine = vm("-kernel", image)
    guests.expect_verdict(machine, "ELF")
    machine.wait_status("running")
    image.unlink()
    for _ in range(2):
        machine.update()
        assert machine.status == "running"
        assert machine.hmp("system_reset") == ""
        guests.expect_verdict(machine, "ELF")
    assert machine.stderr() == ""


def initrd(data):
    """The end of the line that the checker prints of that initial RAM disk."""
    return f" {len(data):#x} {guests.hash31(data):#x}\r\n"


def kept(machine):
    """What is kept, by name."""
    return sorted(
        target.split("boot/")[1].split()[0]
        for target in process.descriptors(machine.pid).values()
        if "boot/" in target
    )


@pytest.fixture
def start(vm, tmp_path):
    """Starts the checker of the boot protocol with a kernel and an initrd in its folder."""

    def boot(**arguments):
        (tmp_path / "kernel").write_bytes(guests.image("linux64.elf").read_bytes())
        (tmp_path / "initrd").write_bytes(b"first")
        options = ("-kernel", tmp_path / "kernel", "-initrd", tmp_path / "initrd")
        machine = vm(*options, append="one", **arguments)
        assert initrd(b"first") in guests.expect_verdict(machine, "ELF")
        machine.wait_status("running")
        return machine

    return boot


def update_to(machine, *options, program=None):
    """Update to the machine's own command with other words for some, or another program."""
    command = list(machine.argv)
    if program:
        command[: command.index("run") + 1] = program
    for old, new in options:
        at = command.index(str(old))
        command[at : at + (1 if new is not None else 2)] = [] if new is None else [str(new)]
    assert machine.hmp(f"update {shlex.join(command)}") == ""
    assert machine.status == "running"


def test_new_paths_are_loaded_at_the_next_reset(start, tmp_path):
    machine = start()
    (tmp_path / "initrd").write_bytes(b"changed")
    (tmp_path / "second").write_bytes(b"second")
    update_to(machine, (tmp_path / "initrd", tmp_path / "second"), ("one", "two"))
    # Kept from now on, too.
    (tmp_path / "second").unlink()
    (tmp_path / "kernel").unlink()
    machine.hmp("system_reset")
    text = guests.expect_verdict(machine, "ELF")
    assert initrd(b"second") in text
    assert "cmdline two\r\n" in text
    assert kept(machine) == ["initrd", "kernel"]
    assert machine.stderr() == ""


def test_new_path_without_a_file_leaves_what_is_kept(start, tmp_path):
    machine = start()
    update_to(machine, (tmp_path / "initrd", tmp_path / "nowhere"))
    assert "nowhere: No such file or directory" in machine.stderr()
    assert f"(a reset loads what {tmp_path}/initrd had)" in machine.stderr()
    (tmp_path / "initrd").unlink()
    machine.hmp("system_reset")
    assert initrd(b"first") in guests.expect_verdict(machine, "ELF")


def test_file_that_the_new_command_has_no_more_is_let_go(start):
    machine = start()
    assert kept(machine) == ["initrd", "kernel"]
    update_to(machine, ("-initrd", None))
    assert kept(machine) == ["kernel"]
    machine.hmp("system_reset")
    assert "initrd 0x0 0x0" in guests.expect_verdict(machine, "ELF")
    assert machine.stderr() == ""


def test_update_whose_package_lacks_the_built_in_guest(vm, tmp_path):
    """The guest runs; what a reset loads is kept."""
    machine = vm()
    machine.expect("guest> ")
    (tmp_path / "package").mkdir()
    shutil.copytree(PACKAGE, tmp_path / "package" / "pyvmm")
    code = "import sys; from pyvmm import cli; sys.exit(cli.main())"
    path = f"import sys; sys.path.insert(0, {str(tmp_path / 'package')!r}); "
    update_to(machine, program=[sys.executable, "-c", path + code, "run"])
    assert "(a reset loads what" in machine.stderr()
    machine.hmp("system_reset")
    machine.expect("guest> ")


def test_relative_paths_over_a_deleted_directory(vm, tmp_path):
    """No update, reset or way back opens what the options name a second time."""
    (tmp_path / "kernel").write_bytes(guests.image("linux64.elf").read_bytes())
    (tmp_path / "initrd").write_bytes(b"first")
    (tmp_path / "bios").write_bytes(FIRMWARE.read_bytes())
    for name in ("disk", "random"):
        (tmp_path / name).write_bytes(bytes(4096))
    machine = vm(
        *("-object", "memory-backend-file,id=ram0,size=64M,mem-path=../ram,share=on"),
        *("-object", "rng-random,id=rng0,filename=../random"),
        *("-device", "virtio-rng-device,rng=rng0", "-drive", "file=../disk,format=raw"),
        *("-chardev", "pty,id=p0,path=pty", "-chardev", "file,id=f0,path=log"),
        *("-chardev", "socket,id=s0,path=listener,server=on,wait=off"),
        *("-netdev", "stream,id=n0,server=on,addr.type=unix,addr.path=net"),
        *("-device", "virtio-net-device,netdev=n0"),
        *("-bios", "../bios", "-kernel", "../kernel", "-initrd", "../initrd"),
    )
    guests.expect_verdict(machine, "ELF")
    machine.wait_status("running")
    shutil.rmtree(machine.folder)
    for name in ("kernel", "initrd", "bios", "disk", "random", "ram"):
        (tmp_path / name).unlink()
    try:
        for _ in range(2):
            assert machine.hmp("update") == ""
            machine.hmp("system_reset")
            assert initrd(b"first") in guests.expect_verdict(machine, "ELF")
        fault = shlex.join(replaced(machine, "pyvmm.kvm.carrier:Takeover.take", "raise ValueError"))
        assert BACK in machine.hmp(f"update {fault}")
        machine.hmp("system_reset")
        assert initrd(b"first") in guests.expect_verdict(machine, "ELF")
        assert machine.status == "running"
    finally:
        # For the report of a failure.
        machine.folder.mkdir()
        (machine.folder / "stderr").touch()
