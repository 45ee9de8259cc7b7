"""Updates that cannot work: refused or undone, and the guest runs on as if nothing had been."""

import re
import resource
import shutil
import subprocess

import pytest
from harness import pyvmm
from harness.network import StreamPeer, echo_of, numbered

STATE = "file:vm.state"


def replaced(words, old, new):
    """The words with one replaced."""
    return [new if word == old else word for word in words]


def script(folder, text, mode=0o755):
    path = folder / "command"
    path.write_text(text)
    path.chmod(mode)
    return str(path)


@pytest.fixture
def ticking(vm):
    """A running guest, and a check that it stayed one and can still be updated."""
    # One test limits the size of files: byte code cut short by that would harm everybody.
    machine = vm(append="ticker period=5", smp=2, PYTHONDONTWRITEBYTECODE="1")
    machine.expect(r"tick 3\b")
    yield machine
    machine.seen = len(machine.serial)
    machine.expect(r"tick \d+\r\n")
    assert machine.status == "running"
    machine.update()
    machine.seen = len(machine.serial)
    machine.expect(r"tick \d+\r\n")
    ticks = [int(tick) for tick in re.findall(r"tick (\d+)\r", machine.serial.decode())]
    assert ticks == list(range(1, len(ticks) + 1))


def refuse(machine, command, text, uri=STATE):
    """See that the update is refused with ``text`` and changes nothing in the process."""
    footprint = machine.footprint()
    machine.set_update(command)
    reply = machine.hmp(f"migrate {uri}")
    assert re.fullmatch(rf"Error: [^\n]*{text}[^\n]*\n", reply), reply
    assert machine.status == "running"
    assert machine.footprint() == footprint
    assert machine.cmdline[-1] != STATE


INCOMING = ["-incoming", STATE]
OPTIONS = {
    "no incoming": (lambda argv: argv, "lacks -incoming"),
    "other incoming": (lambda argv: [*argv, "-incoming", "file:other"], "the state goes to file:"),
    "other size": (
        lambda argv: [*replaced(argv, "64M", "128M"), *INCOMING],
        "-m is 134217728, this machine has 67108864",
    ),
    "other number of CPUs": (
        lambda argv: [*replaced(argv, "2", "1"), *INCOMING],
        "-smp is 1, this machine has 2",
    ),
    "other CPUs": (
        lambda argv: [*argv, "-cpu", "host,-kvmclock", *INCOMING],
        "-cpu is host,-kvmclock, this machine has host",
    ),
    "another device": (
        lambda argv: [*argv, "-device", "isa-debug-exit", *INCOMING],
        "-device is isa-debug-exit",
    ),
    "another serial port": (
        lambda argv: [*argv, "-serial", "null", *INCOMING],
        "-serial is 2, this machine has 1",
    ),
    "memory of another kind": (
        lambda argv: [*argv, "-object", "memory-backend-memfd,id=ram0,size=64M", *INCOMING],
        "-object is ram0",
    ),
    "a chardev of another kind": (
        lambda argv: [
            *("pty,id=serial" if word.startswith("socket,id=serial,") else word for word in argv),
            *INCOMING,
        ],
        "chardev serial is pty, this machine has unix socket",
    ),
    "unknown option": (
        lambda argv: [*argv, "-frobnicate", *INCOMING],
        "-frobnicate.: unknown option",
    ),
    "bad value": (lambda argv: [*argv, "-display", "gtk", *INCOMING], "-display: 'gtk'"),
    "help": (lambda argv: [*argv, "-help", *INCOMING], "help"),
    "another verb": (lambda argv: [argv[0], "--version"], "without answering the preflight"),
    "missing program": (
        lambda argv: ["/nonexistent/pyvmm", *argv[1:], *INCOMING],
        "/nonexistent/pyvmm cannot be executed: No such file or directory",
    ),
    "missing in PATH": (
        lambda argv: ["no-such-pyvmm", *argv[1:], *INCOMING],
        "no-such-pyvmm cannot be executed: No such file or directory",
    ),
    "a folder": (lambda argv: ["/tmp", *argv[1:], *INCOMING], "/tmp cannot be executed"),
    "another program": (
        lambda argv: [shutil.which("true"), *argv[1:], *INCOMING],
        "without answering the preflight",
    ),
    "a program that fails": (
        lambda argv: [shutil.which("cat"), "/nonexistent", *INCOMING],
        "cat: .*",
    ),
}


@pytest.mark.parametrize("case", OPTIONS)
def test_command_is_refused(ticking, case):
    change, text = OPTIONS[case]
    refuse(ticking, change(ticking.argv), text)
    assert "Status: \t\tcompleted" not in ticking.hmp("info migrate")


def test_program_that_cannot_be_executed(ticking, tmp_path):
    path = script(tmp_path, "#!/bin/sh\n", mode=0o644)
    refuse(ticking, [path, *ticking.argv[1:], *INCOMING], "cannot be executed: Permission denied")


def test_script_whose_interpreter_is_missing(ticking, tmp_path):
    path = script(tmp_path, "#!/nonexistent/python\n")
    refuse(ticking, [path, *ticking.argv[1:], *INCOMING], "its interpreter '/nonexistent/python'")


def test_program_that_is_cut_off(ticking, tmp_path):
    """execve of this does not return, it kills: the preflight dies in the guest's stead."""
    path = tmp_path / "cut"
    with open(shutil.which("tail"), "rb") as file:
        path.write_bytes(file.read(8192))
    path.chmod(0o755)
    refuse(ticking, [str(path), *ticking.argv[1:], *INCOMING], "")


def test_program_that_breaks_at_its_start(ticking, tmp_path):
    path = script(tmp_path, "#!/usr/bin/env python3\nimport nonexistent_module\n")
    refuse(
        ticking,
        [path, *ticking.argv[1:], *INCOMING],
        "ModuleNotFoundError: No module named 'nonexistent_module'",
    )


@pytest.mark.parametrize(
    ("uri", "text"),
    [
        ("nonsense", "unknown migration protocol: nonsense"),
        ("tcp:127.0.0.1:4444", ""),
        ("file:", ""),
        ("file:/nonexistent/vm.state", "No such file or directory"),
        ("file:.", "Is a directory"),
        ("file:vm.state,offset=x", "offset"),
        ("file:vm.state,offset=-1", "offset"),
    ],
)
def test_uri_is_refused(ticking, uri, text):
    refuse(ticking, [*ticking.argv, *INCOMING], text, uri=uri)


def test_command_is_needed(ticking):
    ticking.hmp("migrate_set_parameter mode cpr-exec")
    reply = ticking.hmp(f"migrate {STATE}")
    assert reply == "Error: cpr-exec mode requires setting cpr-exec-command\n"


def test_mode_is_needed(ticking):
    assert "mode normal is not supported" in ticking.hmp(f"migrate {STATE}")


PRIVATE = {
    "ram": ["-object", "memory-backend-ram,id=ram0,size=64M"],
    "memfd": ["-object", "memory-backend-memfd,id=ram0,size=64M,share=off"],
    "file": ["-object", "memory-backend-file,id=ram0,size=64M,mem-path=ram,share=off"],
    "anon-alloc": ["-machine", "anon-alloc=mmap"],
}


@pytest.mark.parametrize("kind", PRIVATE)
def test_private_memory_is_refused(vm, kind):
    machine = vm(*PRIVATE[kind], append="ticker period=20")
    machine.expect(r"tick 1\b")
    refuse(machine, [*machine.argv, *INCOMING], "is not compatible with CPR")
    assert "Outgoing migration blocked:" in machine.hmp("info migrate")
    machine.expect(r"tick \d+")


# ---- failures behind the preflight ---------------------------------------------------------

# What the first run of a command does to the command itself, and what execve says then.
SELF_HARM = {
    "deleted": ('rm "$0"', "No such file or directory"),
    "no longer executable": ('chmod 644 "$0"', "Permission denied"),
    "no program any more": ('cp /dev/null "$0"', "Exec format error"),
    "without its interpreter": (
        'printf "#!/nonexistent\\n" > "$0.new"; chmod 755 "$0.new"; mv "$0.new" "$0"',
        "No such file or directory",
    ),
}


@pytest.mark.parametrize("harm", SELF_HARM)
def test_exec_that_fails_after_the_stop_is_undone(ticking, tmp_path, harm):
    action, text = SELF_HARM[harm]
    path = script(tmp_path, f'#!/bin/sh\n{action}\nexec {pyvmm()} "$@"\n')
    refuse(ticking, [path, *ticking.argv[1:], *INCOMING], f"execve {path} failed: {text}")
    assert re.search(r"Status: \t\tfailed \(.*" + text, ticking.hmp("info migrate"))


def test_exec_that_fails_leaves_a_paused_guest_paused(vm, tmp_path):
    machine = vm(append="counter")
    machine.expect("counter ready")
    machine.hmp("stop")
    count = machine.hmp("xp /gx 0x200000")
    path = script(tmp_path, f'#!/bin/sh\nrm "$0"\nexec {pyvmm()} "$@"\n')
    machine.set_update([path, *machine.argv[1:], *INCOMING])
    assert "execve" in machine.hmp(f"migrate {STATE}")
    assert machine.status == "paused"
    assert machine.hmp("xp /gx 0x200000") == count
    machine.update()
    assert machine.status == "paused"


def test_state_that_does_not_fit_on_the_disk(ticking):
    """RLIMIT_FSIZE stands in for a full disk."""
    resource.prlimit(ticking.pid, resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
    refuse(ticking, [*ticking.argv, *INCOMING], "")
    assert "failed" in ticking.hmp("info migrate")
    resource.prlimit(
        ticking.pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
    )


def test_no_further_process_is_allowed(ticking):
    """Without descriptors to spare nothing can be started."""
    before = resource.prlimit(ticking.pid, resource.RLIMIT_NOFILE)
    resource.prlimit(ticking.pid, resource.RLIMIT_NOFILE, (len(ticking.fds()) + 1, before[1]))
    refuse(ticking, [*ticking.argv, *INCOMING], "Too many open files")
    resource.prlimit(ticking.pid, resource.RLIMIT_NOFILE, before)


def test_folder_that_was_deleted(ticking, tmp_path):
    folder = tmp_path / "gone"
    folder.mkdir()
    subprocess.run(["rmdir", folder], check=True)
    uri = f"file:{folder}/vm.state"
    refuse(ticking, [*ticking.argv, "-incoming", uri], "No such file or directory", uri=uri)


def test_other_devices(vm):
    """They must be the same in the same order."""
    machine = vm("-device", "virtio-rng-device", append="virtio-rng step=16")
    machine.expect(r"rng \d+")
    command = [*machine.argv, *INCOMING]
    at = command.index("virtio-rng-device")
    del command[at - 1 : at + 1]
    refuse(machine, command, "-device is nothing, this machine has virtio-rng-device")
    machine.update()
    machine.expect(r"rng \d+\r\n")


def test_other_network(vm, tmp_path):
    with StreamPeer(tmp_path) as peer:
        machine = vm(*peer.options, append="virtio-net")
        machine.expect("ready")
        command = [*machine.argv, *INCOMING]
        command[command.index("-netdev") + 1] = "tap,id=n0,ifname=tap0"
        refuse(machine, command, "-netdev is tap n0, this machine has stream n0")
        peer.send_frames(numbered(1))
        assert peer.frames(1) == [echo_of(numbered(1))]
