"""What goes through an exec besides the guest: limits, directories, environment, descriptors."""

import fcntl
import json
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from faults.tools import (
    BACK,
    TICKER,
    check_alive,
    check_ticking,
    faulty,
    options,
    replaced,
    update,
)
from harness import process, pyvmm, run_cli, wait_until


def memfds(pid):
    """Descriptors of guest memory: number -> target."""
    found = process.descriptors(pid)
    return {fd: target for fd, target in found.items() if "memfd:pc." in target}


def test_descriptor_limit(ticker):
    """With any number of descriptors left the update succeeds or leaves the guest running."""
    machine = ticker()
    assert update(machine) == ""
    footprint = machine.footprint()
    used = max(process.descriptors(machine.pid)) + 1
    outcomes = set()
    for spare in (*range(0, 24, 3), *range(24, 72, 8)):
        resource.prlimit(machine.pid, resource.RLIMIT_NOFILE, (used + spare, 4096))
        reply = update(machine)
        resource.prlimit(machine.pid, resource.RLIMIT_NOFILE, (1024, 4096))
        assert machine.status == "running"
        assert not reply or "Too many open files" in reply or "descriptor" in reply, reply
        fds, threads = machine.footprint()
        assert (fds, len(threads)) == (footprint[0], len(footprint[1])), f"{spare=} {reply=}"
        outcomes.add(bool(reply))
    assert outcomes == {False, True}
    check_alive(machine)


def test_disk_full(ticker):
    # /dev/full takes no byte; it is written in place.
    machine = ticker()
    machine.set_update(uri="file:/dev/full")
    assert "No space left on device" in machine.hmp("migrate file:/dev/full")
    assert "No space left on device" in machine.hmp("info migrate")
    check_alive(machine)


def test_disk_full_under_the_state_file(ticker):
    # RLIMIT_FSIZE stands in for a disk that fills while the state is written.
    machine = ticker(PYTHONDONTWRITEBYTECODE="1")
    path = machine.folder / "vm.state"
    machine.set_update()
    fault = f"import resource as r; r.prlimit({machine.pid}, r.RLIMIT_FSIZE, (2000, -1))"
    command = replaced(machine, "pyvmm:", fault, probe=True)
    machine.set_update([*command, "-incoming", "file:vm.state"])
    path.write_bytes(b"the last one")
    assert "File too large" in machine.hmp("migrate file:vm.state")
    assert path.read_bytes() == b"the last one"
    assert [entry.name for entry in machine.folder.glob(".pyvmm-*")] == []
    resource.prlimit(machine.pid, resource.RLIMIT_FSIZE, (-1, -1))
    check_alive(machine)


def test_folder_of_the_state_goes_after_the_preflight(ticker):
    machine = ticker()
    (machine.folder / "states").mkdir()
    fault = "import os; os.rmdir('states')"
    command = replaced(machine, "pyvmm:", fault, probe=True)
    machine.set_update([*command, "-incoming", "file:states/vm.state"])
    assert "No such file or directory" in machine.hmp("migrate file:states/vm.state")
    check_alive(machine)


@pytest.mark.parametrize(
    "harm",
    [
        "os.truncate('vm.state', 0)",
        "os.truncate('vm.state', 1000)",
        "os.unlink('vm.state')",
        "os.unlink('vm.state'); os.mkfifo('vm.state')",
        "f = open('vm.state', 'r+b'); f.seek(100); f.write(bytes(900)); f.close()",
        "f = open('vm.state', 'wb'); f.write(os.urandom(40000)); f.close()",
        "f = open('vm.state', 'ab'); f.truncate(1 << 40); f.close()",
    ],
)
def test_state_file_tampered_with(ticker, harm):
    """Between save and load somebody else reaches the file; the way back has a copy."""
    machine = ticker()
    command = replaced(machine, "pyvmm:", f"import os; {harm}")
    machine.set_update([*command, "-incoming", "file:vm.state"])
    assert BACK in machine.hmp("migrate file:vm.state")
    check_alive(machine)


@pytest.mark.parametrize("part", range(0, 24, 2))
@pytest.mark.parametrize(
    "harm",
    [
        "os.ftruncate(f.fileno(), at)",
        "f.seek(at); byte = f.read(1)[0]; f.seek(at); f.write(bytes([byte ^ 0x80]))",
    ],
    ids=["cut", "bent"],
)
def test_any_part_of_the_state(ticker, part, harm):
    """A state that ends early, or has any bit flipped, is refused and the guest is back."""
    machine = ticker()
    fault = f"import os; f = open('s', 'r+b'); at = os.path.getsize('s') * {part} // 24; {harm}"
    machine.set_update([*replaced(machine, "pyvmm:", f"{fault}; f.close()"), "-incoming", "file:s"])
    assert BACK in machine.hmp("migrate file:s")
    check_alive(machine)


def test_working_directory_deleted(ticker):
    machine = ticker()
    shutil.rmtree(machine.folder)
    assert update(machine) == ""
    reply = update(machine, replaced(machine, "pyvmm.cli:serve", "raise ValueError('nowhere')"))
    assert f"ValueError: nowhere {BACK}" in reply
    machine.folder.mkdir()
    check_alive(machine)


def test_umask_and_mode_of_the_state(ticker):
    machine = ticker(program=["/bin/sh", "-c", 'umask 0; exec "$@"', "sh", pyvmm(), "run"])
    machine.argv[:4] = []
    machine.update()
    assert (machine.folder / "vm.state.0").stat().st_mode & 0o777 == 0o600
    status = Path(f"/proc/{machine.pid}/status").read_text()
    assert "Umask:\t0000" in status


def test_kvm_forbidden_meanwhile(ticker):
    # A new image needs no permission to open /dev/kvm: it has the descriptor.
    fault = "raise PermissionError('/dev/kvm')"
    machine = ticker()
    assert update(machine, replaced(machine, "pyvmm.kvm.system:System.open", fault)) == ""
    check_alive(machine)


def test_host_name_of_the_executable_gone(ticker, tmp_path):
    # The way back goes through a descriptor of the old program, not through its path.
    python = tmp_path / "bin" / "python3"
    python.parent.mkdir()
    shutil.copy(os.path.realpath(sys.executable), python)
    path = ":".join(sys.path[1:])
    code = "from pyvmm import cli; raise SystemExit(cli.main())"
    library = os.path.realpath(os.path.join(sys.base_prefix, "lib"))
    machine = ticker(
        program=[str(python), "-c", code, "run"],
        PYTHONHOME=sys.base_prefix,
        PYTHONPATH=path,
        LD_LIBRARY_PATH=library,
    )
    python.unlink()
    fault = replaced(machine, "pyvmm.cli:serve", "raise ValueError('no path')")
    assert f"ValueError: no path {BACK}" in update(machine, fault)
    check_ticking(machine)
    assert machine.status == "running"


# ---- environment and descriptors of what an image starts ------------------------------------

TELL = (
    "import json, os\n"
    "paths = [f'/proc/self/fd/{fd}' for fd in os.listdir('/proc/self/fd')]\n"
    "fds = {path[14:]: os.readlink(path) for path in paths if os.path.lexists(path)}\n"
    "status = open('/proc/self/status').read()\n"
    "open('told', 'w').write(json.dumps([dict(os.environ), fds, status]))"
)


def told(machine):
    """What the probe of an update found: environment, descriptors, status."""
    (machine.folder / "told").unlink(missing_ok=True)
    assert update(machine, replaced(machine, "pyvmm:", TELL, probe=True)) == ""
    environment, fds, status = json.loads((machine.folder / "told").read_text())
    fields = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
    return environment, fds, fields


def ignored_signals(mask):
    """The numbers in a SigIgn line; 32 and 33 are the C library's own."""
    return {number for number in range(1, 32) if int(mask, 16) >> number - 1 & 1}


@pytest.mark.parametrize("history", ["fresh", "updated", "rolled back", "failed exec"])
def test_what_a_helper_inherits(ticker, history):
    machine = ticker()
    if history == "updated":
        assert update(machine) == ""
    elif history == "rolled back":
        assert BACK in update(machine, replaced(machine, "pyvmm.cli:serve", "raise ValueError"))
    elif history == "failed exec":
        program = machine.folder / "program"
        program.write_text(f'#!/bin/sh\nrm "$0"\nexec {pyvmm()} "$@"\n')
        program.chmod(0o755)
        assert "No such file" in update(machine, [str(program), "run", *options(machine)])
    environment, fds, status = told(machine)
    assert "PYVMM_CPR_EXEC_STATE" not in environment
    inherited = {target for fd, target in fds.items() if int(fd) > 3}
    assert not [target for target in inherited if "memfd" in target or "kvm" in target], fds
    assert not [target for target in inherited if "socket" in target], fds
    assert int(status["SigBlk"], 16) == 0
    # Python ignores SIGPIPE and SIGXFSZ itself; the rest is what this run was started with.
    own = Path("/proc/self/status").read_text().split("SigIgn:\t")[1].split()[0]
    python = {signal.SIGPIPE, signal.SIGXFSZ}
    assert ignored_signals(status["SigIgn"]) <= python | ignored_signals(own)
    # The probe's own variable goes no further either.
    entries = Path(f"/proc/{machine.pid}/environ").read_bytes().split(b"\0")
    assert not [entry for entry in entries if entry.startswith(b"PYVMM_CPR_PROBE")]


def test_environment_does_not_grow(ticker):
    machine = ticker()
    assert update(machine) == ""
    assert update(machine) == ""
    size = os.path.getsize(f"/proc/{machine.pid}/environ") or len(
        Path(f"/proc/{machine.pid}/environ").read_bytes()
    )
    words = machine.cmdline
    for _ in range(5):
        assert update(machine) == ""
    read = Path(f"/proc/{machine.pid}/environ").read_bytes()
    assert abs(len(read) - size) <= 2  # the descriptor's number may have another digit
    assert machine.cmdline == words


def test_descriptors_by_kind(ticker):
    """Exactly one VM and one descriptor a vCPU, the same memory, nothing from before."""
    machine = ticker(smp=2)
    memory = sorted(os.stat(f"/proc/{machine.pid}/fd/{fd}").st_ino for fd in memfds(machine.pid))
    for index in range(6):
        if index % 2:
            fault = replaced(machine, "pyvmm.kvm.carrier:Takeover.take", "raise ValueError")
            assert BACK in update(machine, fault)
        else:
            assert update(machine) == ""
        fds = machine.footprint()[0]
        kinds = [fd for fd in fds if "kvm" in fd]
        assert sorted(kinds) == sorted(
            ["/dev/kvm", "anon_inode:kvm-vcpu:0", "anon_inode:kvm-vcpu:1", "anon_inode:kvm-vm"]
        )
        now = sorted(os.stat(f"/proc/{machine.pid}/fd/{fd}").st_ino for fd in memfds(machine.pid))
        assert now == memory
        assert not [fd for fd in fds if "cpr-state" in fd or "vmstate" in fd or "probe" in fd]
    check_alive(machine)


def test_memory_stays_sealed(ticker):
    machine = ticker()
    for _ in range(2):
        for fd in memfds(machine.pid):
            other = os.open(f"/proc/{machine.pid}/fd/{fd}", os.O_RDWR)
            try:
                with pytest.raises(PermissionError):
                    os.ftruncate(other, 4096)
                seals = fcntl.fcntl(other, fcntl.F_GET_SEALS)
                assert seals & fcntl.F_SEAL_SHRINK
            finally:
                os.close(other)
        assert update(machine) == ""
    check_alive(machine)


def test_inherited_descriptor_that_is_missing(ticker):
    # A fault of the old image: said before anything runs, and no traceback.
    machine = ticker(
        program=faulty(
            "os:execve",
            "import os, glob\n"
            "fd = next(int(f[14:]) for f in glob.glob('/proc/self/fd/*') "
            "if 'memfd:pc.ram' in os.readlink(f))\n"
            "os.set_inheritable(fd, False)",
        )
    )
    machine.hmp_send("update")
    assert machine.wait_exit() == 1
    assert "pc.ram[0]: descriptor" in machine.stderr()
    assert "Traceback" not in machine.stderr()


@pytest.mark.parametrize(
    "value", ["", "x", "0", "-1", "1", "999", "2147483648", "9" * 40, "٣", "3"]
)
def test_variable_without_a_state(value):
    done = run_cli("run", "-m", "16M", "-S", "-monitor", "none", PYVMM_CPR_EXEC_STATE=value)
    assert done.returncode == 1
    assert done.stderr.startswith("pyvmm: CPR state: ")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("kind", ["pipe", "directory", "empty", "garbage", "huge", "socket"])
def test_variable_that_names_something_else(kind):
    opened = []
    if kind == "pipe":
        opened = list(os.pipe())
    elif kind == "directory":
        opened = [os.open("/", os.O_RDONLY)]
    elif kind == "socket":
        opened = [socket.socket().detach()]
    else:
        opened = [os.memfd_create(kind)]
        if kind == "garbage":
            os.write(opened[0], os.urandom(4096))
        elif kind == "huge":
            os.ftruncate(opened[0], 1 << 40)
    fd = opened[0]
    try:
        done = subprocess.run(
            [pyvmm(), "run", "-m", "16M", "-S", "-monitor", "none"],
            env=os.environ | {"PYVMM_CPR_EXEC_STATE": str(fd)},
            pass_fds=[fd],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=30,
        )
    finally:
        for fd in opened:
            os.close(fd)
    assert done.returncode == 1
    assert done.stderr.startswith("pyvmm: CPR state")
    assert "Traceback" not in done.stderr


def test_name_is_taken_all_the_time(vm, tmp_path):
    """A second VM of the name is refused before, during and after updates."""
    runtime = {"XDG_RUNTIME_DIR": str(tmp_path)}
    machine = vm("-name", "only", append=TICKER, **runtime)
    machine.expect(r"tick 2\r\n")
    second = ("run", "-m", "16M", "-S", "-monitor", "none", "-name", "only")
    for step in ("before", "during", "after"):
        if step == "during":
            hold = "import time, os\nwhile not os.path.exists('go'): time.sleep(0.005)"
            command = replaced(machine, "pyvmm.cli:serve", hold)
            machine.hmp_send("update " + " ".join(f'"{word}"' for word in command))
            wait_until(lambda: "inject.py" in machine.cmdline[1], "the new image")
        done = run_cli(*second, **runtime)
        assert done.returncode == 2
        assert "runs a VM of that name" in done.stderr
        if step == "during":
            (machine.folder / "go").touch()
            assert machine.hmp_reply() == ""
    check_alive(machine)
