"""Wrong command lines: one line that names the option, the value and the mend, and exit code 2."""

import os
import socket
import stat
import subprocess
import sys

import pytest
from harness import DEADLINE_S, guests, run_cli

QUIET = ("-nodefaults", "-append", "ticker passes=1 period=1")


def refuse(*options, text="", exit_code=2, **arguments):
    """See that ``pyvmm run`` ends at once with one line that has ``text``."""
    done = run_cli("run", *map(str, options), **arguments)
    assert done.returncode == exit_code, done
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("pyvmm: ")
    assert text in line
    return line


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["-frobnicate"], "'-frobnicate': unknown option"),
        (["-kernal", "x"], "did you mean -kernel?"),
        (["vmlinux"], "'vmlinux': not an option; a kernel is given with -kernel FILE"),
        (["-m", "1G", "-m", "2G"], "-m: given twice"),
        (["-m", "0"], "-m"),
        (["-m", "1"], "-m"),
        (["-m", "1G1"], "-m"),
        (["-m", "-5"], "-m"),
        (["-m", "99999P"], "-m"),
        (["-m", "4097B"], "-m"),
        (["-m", ""], "-m"),
        (["-m", "1,5G"], "-m"),
        (["-m", "9" * 5000], "-m"),
        (["-smp", "0"], "-smp"),
        (["-smp", "-1"], "-smp"),
        (["-smp", "256"], "-smp"),
        (["-smp", "cpus=2,maxcpus=1"], "-smp: maxcpus must equal cpus (2)"),
        (["-smp", "sockets=3,cpus=2"], "-smp"),
        (["-smp", "two"], "-smp"),
        (["-machine", "pc"], "-machine: 'pc' is no machine"),
        (["-machine", "frob=on"], "-machine"),
        (
            ["-machine", "kernel-type=flta"],
            "-machine: kernel-type='flta': did you mean flat?",
        ),
        (
            ["-machine", "kernel-type=9"],
            "-machine: kernel-type='9': give one of auto, linux, pvh, multiboot, flat",
        ),
        (
            ["-machine", "kernel-type=flat"],
            "-machine: kernel-type=flat is about a kernel; add -kernel FILE",
        ),
        (["-kernel", "/etc/passwd"], "-kernel /etc/passwd: a text file, not a kernel"),
        (
            ["-machine", "kernel-unpack=nobody"],
            "-machine: kernel-unpack='nobody': give host or guest",
        ),
        (["-machine", "ram-collapse=maybe"], "-machine: ram-collapse='maybe'"),
        (["-machine", "memory-backend=x"], "-machine: memory-backend='x': there is no such"),
        (["-accel", "tcg"], "-accel: 'tcg' is no accelerator"),
        (["-cpu", "486"], "-cpu: '486' is no CPU"),
        (["-display", "gtk"], "-display: 'gtk'"),
        (["-device", "e1000"], "-device: 'e1000' is no device"),
        (["-device", "pvpanic", "-device", "pvpanic"], "there is one already"),
        (["-device", "isa-debug-exit,iobase=0x10000"], "iobase"),
        (["-device", "isa-debug-exit,iobase=0x3f8"], "choose other ports"),
        (["-action", "panic=explode"], "-action: panic='explode'"),
        (["-action", "weather=rain"], "-action"),
        (["-incoming", "tcp:1"], "-incoming: 'tcp:1'"),
        (["-append", "x" * 5000], "bytes are too long; give at most 4095"),
        (["-append", "a\nb"], "-append: it has a control character"),
        (["-serial", "null", "-serial", "null", "-serial", "null"], "at most 2"),
        (["-serial", "chardev:none"], "none"),
        (["-serial", "frob:x"], "frob"),
        (["-serial", "unix:" + "x" * 108 + ",server=on,wait=off"], "108"),
        (["-serial", "stdio", "-monitor", "stdio"], "stdio"),
        (["-chardev", "null,id=a", "-chardev", "null,id=a"], "a"),
        (["-chardev", "frob,id=a"], "frob"),
        (["-chardev", "null"], "id"),
        (["-mon", "none"], "none"),
        (["-mon", "chardev=a,mode=frob"], "mode"),
        (["-object", "memory-backend-memfd,id=a"], "size is missing"),
        (["-object", "memory-backend-frob,id=a,size=64M"], "unknown kind of memory"),
        (["-bios", "/nonexistent/rom"], "/nonexistent/rom"),
        (["-kernel", "/nonexistent/kernel"], "/nonexistent/kernel"),
        (["-kernel", "/tmp"], "/tmp"),
        (["-kernel", "/dev/null"], "/dev/null"),
        (["-initrd", "/nonexistent/initrd"], "/nonexistent/initrd"),
        (["-initrd", "/tmp"], "/tmp"),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else "",
)
def test_wrong_option(options, text):
    refuse(*options, "-nodefaults", text=text)


def test_option_without_its_value():
    refuse("-m", text="-m: a value is missing; write -m SIZE")


def test_no_command():
    done = run_cli()
    assert done.returncode == 2
    assert done.stderr.splitlines()[0] == "pyvmm: a command is missing"


def test_unknown_command():
    done = run_cli("frob")
    assert done.returncode == 2
    assert done.stderr.splitlines()[0] == "pyvmm: frob: no such command"


@pytest.mark.parametrize("arguments", [["--version"], ["--help"], ["run", "-help"], ["run", "-h"]])
def test_what_needs_no_kvm(arguments):
    done = run_cli(*arguments)
    assert (done.returncode, done.stderr) == (0, "")
    assert "pyvmm" in done.stdout


@pytest.mark.parametrize("option", ["m", "object", "action", "device"])
def test_help_for_one_option(option):
    done = run_cli("run", f"-{option}", "help")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"  -{option} ")


def test_kernel_that_blocks(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    refuse("-nodefaults", "-kernel", tmp_path / "fifo", text="fifo")


@pytest.mark.parametrize("size", [4, 51, 63, 64, 500, 0.5])
def test_kernel_that_is_cut_off(tmp_path, size):
    whole = guests.image("guest.elf").read_bytes()
    path = tmp_path / "kernel"
    path.write_bytes(whole[: size if size > 1 else len(whole) // 2])
    refuse("-nodefaults", "-kernel", path, text=str(path))


def test_initrd_that_does_not_fit(tmp_path):
    path = tmp_path / "initrd"
    path.touch()
    os.truncate(path, 64 << 20)
    refuse("-nodefaults", "-m", "32M", "-initrd", path, text="do not fit")


def test_rom_of_a_wrong_size(tmp_path):
    path = tmp_path / "rom"
    path.write_bytes(bytes(1000))
    refuse("-nodefaults", "-bios", path, text="not a multiple of 4K")


def test_socket_where_a_file_is(tmp_path):
    path = tmp_path / "file"
    path.write_text("precious")
    refuse("-serial", f"unix:{path},server=on,wait=off", text="file")
    assert path.read_text() == "precious"


def test_port_in_use():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        refuse("-serial", f"tcp:127.0.0.1:{port},server=on,wait=off", text=str(port))


@pytest.mark.parametrize("port", ["0x", "65536", "-1", ""])
def test_port_that_is_none(port):
    refuse("-serial", f"tcp:127.0.0.1:{port},server=on,wait=off")


def test_nobody_listens(tmp_path):
    refuse("-serial", f"unix:{tmp_path}/none", text="start the server first")


def test_folder_that_is_not_there(tmp_path):
    refuse("-serial", f"file:{tmp_path}/none/log", text="No such file or directory")


def test_incoming_that_is_not_there(tmp_path):
    refuse(
        *("-nodefaults", "-incoming", f"file:{tmp_path}/none"),
        text="No such file or directory", exit_code=1,
    )  # fmt: skip


def test_incoming_that_is_no_state(tmp_path):
    path = tmp_path / "state"
    for content in (b"", b"\0", b"QEVM", os.urandom(5000), guests.image("guest.elf").read_bytes()):
        path.write_bytes(content)
        refuse("-nodefaults", "-incoming", f"file:{path}", exit_code=1)


OTHER_DEVICE = """
import sys
from pyvmm.kvm.system import System
open_kvm, path = System.open, sys.argv.pop()
System.open = lambda: open_kvm(path)
from pyvmm.cli import main
sys.exit(main())
"""


def test_what_is_no_kvm_device(tmp_path):
    """As if it were in the place of /dev/kvm, which takes no mount namespace."""
    fake = tmp_path / "fake"
    fake.touch()
    done = subprocess.run(
        [sys.executable, "-c", OTHER_DEVICE, "run", "-nodefaults", fake],
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
    )
    assert done.returncode == 1
    assert done.stderr == f"pyvmm: {fake} is not a KVM device\n"


def test_nothing_is_left_behind(tmp_path):
    """Neither by what was refused halfway nor by what ended."""
    path = tmp_path / "serial.sock"
    options = ["-serial", f"unix:{path},server=on,wait=off"]
    refuse(*options, "-kernel", "/nonexistent", text="/nonexistent")
    assert not path.exists()
    done = run_cli("run", *options, *QUIET)
    assert done.returncode == 0
    assert not path.exists()


def test_file_chardev_is_not_executable(tmp_path):
    log = tmp_path / "log"
    assert run_cli("run", "-serial", f"file:{log}", *QUIET).returncode == 0
    assert not stat.S_IMODE(log.stat().st_mode) & 0o111


def test_numbers_with_leading_zeroes_are_numbers(tmp_path):
    """Checked as decimal, they are used as that, too."""
    network = ["-netdev", f"stream,id=n,server=on,addr.path={tmp_path}/s"]
    device = ["-device", "virtio-net-device,netdev=n,rx_queue_size=0256,host_mtu=01500"]
    ports = ["-device", "isa-debugcon,iobase=01026", "-device", "pvpanic,ioport=01285"]
    done = run_cli("run", *QUIET, *network, *device, *ports)
    assert (done.returncode, done.stderr) == (0, "")
