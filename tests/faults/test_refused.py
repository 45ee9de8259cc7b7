"""Commands that cannot take over: the preflight refuses them, and the guest is never stopped."""

import os
import re
import resource
import shutil
import signal
import sys

import pytest
from faults.tools import (
    QMP,
    Qmp,
    armed,
    check_alive,
    check_refused,
    check_ticking,
    faulty,
    options,
    replaced,
    strangers,
    update,
)
from harness import wait_until

ELF = os.path.realpath(sys.executable)


def script(folder, text, mode=0o755):
    path = folder / "program"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    path.chmod(mode)
    return str(path)


def elf(size):
    with open(ELF, "rb") as file:
        return file.read()[:size]


@pytest.mark.parametrize(
    ("text", "mode", "why"),
    [
        (None, 0, "No such file or directory"),
        ("#!/bin/sh\n", 0o644, "Permission denied"),
        ("no program", 0o755, "neither a program nor a script"),
        ("", 0o755, "neither a program nor a script"),
        ("#!/no/such/python\n", 0o755, "interpreter '/no/such/python' cannot be executed"),
        (elf(64), 0o755, "Exec format error"),
        (elf(4096), 0o755, "killed by signal 11|Exec format error"),
        (elf(18) + b"\xb7\0" + elf(4096)[20:], 0o755, "Exec format error"),  # aarch64
        ("#!/bin/sh\nkill -6 $$\n", 0o755, "killed by signal 6 in the preflight"),
        ("#!/bin/sh\nexit 3\n", 0o755, "exit code 3 without answering the preflight"),
        ("#!/bin/sh\necho '[1]' >&3\n", 0o755, "without answering the preflight"),
        ("#!/bin/sh\nyes >&3 & pid=$!; sleep 0.1; kill $pid\n", 0o755, "another process"),
        ("#!/bin/sh\necho oops >&2; echo worse >&2; exit 1\n", 0o755, "program: worse"),
    ],
    ids=lambda value: re.sub(r"\W+", "-", str(value))[:30],
)
def test_program(ticker, text, mode, why):
    machine = ticker(*QMP)
    path = str(machine.folder / "program") if text is None else script(machine.folder, text, mode)
    check_refused(machine, [path, "run", *options(machine)], why)


@pytest.mark.parametrize(
    "change",
    [
        {"error": "\ud800"},
        {"shape": 3},
        {"places": {"serial[0]": "new"}},
        {"incoming": ["memfd:"]},
        {"places": 0},
    ],
    ids=str,
)
def test_answer_in_another_form(ticker, change):
    # A later version may answer as it likes.
    machine = ticker(*QMP)
    code = f"import json; real = json.dumps; json.dumps = lambda value: real(value | {change})"
    command = replaced(machine, "pyvmm:", code, probe=True)
    check_refused(machine, command, "Error: ")


def test_program_that_is_being_written(ticker):
    machine = ticker(*QMP)
    path = shutil.copy(ELF, machine.folder / "program")
    with open(path, "ab"):
        check_refused(machine, [str(path), "run"], "Text file busy")


@pytest.mark.parametrize("command", ["pyv\0mm run", "pyvmm run -name x\0"])
def test_word_that_is_no_argument(ticker, command):
    machine = ticker(*QMP)
    footprint = machine.footprint()
    assert machine.hmp(f"update {command}") == "Error: A word of a command cannot contain NUL\n"
    assert machine.footprint() == footprint
    assert machine.stderr() == ""
    check_alive(machine)


def test_arguments_too_long(ticker):
    machine = ticker(*QMP)
    with Qmp(machine.folder / "qmp.sock") as qmp:
        qmp.send({"execute": "update", "arguments": {"command": [*machine.argv, "x" * 140_000]}})
        reply = qmp.reply()
        assert "Argument list too long" in reply["error"]["desc"] if "error" in reply else True
        info = qmp.execute("query-migrate")
        assert "error" in reply or "Argument list too long" in info["error-desc"]
        assert "STOP" not in qmp.events
    check_alive(machine)


@pytest.mark.parametrize(
    ("fault", "why"),
    [
        ("raise ImportError('no module named kvm')", "ImportError: no module named kvm"),
        ("import no_such_module", "ModuleNotFoundError: No module named 'no_such_module'"),
        ("raise SyntaxError('half a file')", "SyntaxError: half a file"),
        ("import os; os.abort()", "killed by signal 6"),
        ("import ctypes; ctypes.string_at(0)", "killed by signal 11"),
        ("import os; os._exit(0)", "without answering the preflight"),
        ("raise SystemExit", "without answering the preflight"),
        ("raise MemoryError", "MemoryError"),
    ],
)
def test_broken_package(ticker, fault, why):
    machine = ticker(*QMP)
    check_refused(machine, replaced(machine, "pyvmm:", fault, probe=True), why)


@pytest.mark.parametrize("module", ["migration.manager", "monitor.attach", "machine.builder"])
def test_module_that_only_the_exec_needs(ticker, module):
    machine = ticker(*QMP)
    fault = f"import sys; sys.modules['pyvmm.{module}'] = None"
    check_refused(
        machine, replaced(machine, "pyvmm:", fault, probe=True), "ModuleNotFoundError|Import"
    )


@pytest.mark.parametrize(
    ("old", "new", "why"),
    [
        ("64M", "65M", r"-m is 68157440, this machine has 67108864"),
        ("-append", "-smp 2 -append", "-smp is 2, this machine has 1"),
        ("-append", "-device pvpanic -append", "-device is pvpanic, this machine has nothing"),
        ("-append", "-serial null -append", "-serial is 2, this machine has 1"),
        ("-append", "-object memory-backend-memfd,id=a,size=64M -append", "-object is a "),
        ("-append", "-no-such-option -append", "no-such-option': unknown option"),
        ("-append", "-m banana -append", "-m"),
        ("-append", "-help -append", "only prints help"),
    ],
)
def test_other_machine(ticker, old, new, why):
    machine = ticker(*QMP)
    words = machine.argv
    at = words.index(old)
    check_refused(machine, [*words[:at], *new.split(), *words[at + 1 :]], why)


def test_device_that_is_missing(ticker):
    machine = ticker(*QMP, "-device", "pvpanic")
    check_refused(machine, machine.argv[:-2], "-device is nothing, this machine has pvpanic")


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ("minimum_version = 9; d.version = 9", r"reads serial\[0\] in versions 9 to 9, this one"),
        ("version = 0", r"reads serial\[0\] in versions \d to 0, this one writes"),
        ("name = 'cereal'", r"no device serial\[0\]|serial"),
    ],
)
def test_state_version(ticker, change, why):
    machine = ticker(*QMP)
    fault = f"from pyvmm.devices.serial import Serial; d = Serial.vmstate; d.{change}"
    if "cereal" in change:
        fault = "from pyvmm.devices.serial import Serial; Serial.name = 'cereal'"
    check_refused(machine, replaced(machine, "pyvmm:", fault, probe=True), why)


@pytest.mark.parametrize(
    ("constant", "why"),
    [
        ("VERSION", "reads CPR state in versions 2 to 2, this one writes 1"),
        ("VALUES_VERSION", "reads host-side values in versions 2 to 2, this one writes 1"),
    ],
)
def test_version_of_what_goes_through_the_exec(ticker, constant, why):
    machine = ticker(*QMP)
    fault = f"import pyvmm.cpr.state as state; state.{constant} = 2"
    check_refused(machine, replaced(machine, "pyvmm:", fault, probe=True), why)


def test_probe_that_hangs(ticker):
    # The good update that follows has all its time.
    fault = (
        "import os, pyvmm.migration.preflight as p\n"
        "p.DEADLINE_S = 0.3 if os.path.exists('impatient') else 20.0"
    )
    machine = ticker(*QMP, program=faulty("pyvmm.migration.preflight:Probe.__init__", fault))
    hang = replaced(machine, "pyvmm:", "import signal; signal.pause()", probe=True)
    (machine.folder / "impatient").touch()
    with Qmp(machine.folder / "qmp.sock") as qmp:
        assert "did not answer the preflight" in update(machine, hang)
        assert qmp.execute("query-status")["status"] == "running"
        assert "STOP" not in qmp.events
    (machine.folder / "impatient").unlink()
    check_alive(machine)


def test_cancel_of_a_probe_that_hangs(ticker):
    machine = ticker(*QMP)
    hang = replaced(machine, "pyvmm:", "import signal; signal.pause()", probe=True)
    assert machine.hmp("update -d " + " ".join(f"'{word}'" for word in hang)) == ""
    assert "in progress" in update(machine)
    wait_until(machine.probes, "the probe")
    machine.hmp("migrate_cancel")
    wait_until(lambda: "cancelled" in machine.hmp("info migrate"), "the end of the update")
    assert machine.children() == []
    check_alive(machine)


# In its process group, and in a session of its own; then the probe hangs.
BROOD = "sleep 600 & setsid sleep 600 & setsid setsid sleep 600 & exec sleep 600"


@pytest.mark.parametrize("way", ["cancel", "quit"])
def test_cancel_ends_what_the_probe_started(ticker, way):
    machine = ticker()
    assert machine.hmp(f"update -d sh -c '{BROOD}'") == ""
    wait_until(lambda: len(asleep(machine)) == 4, "all that the probe starts")
    if way == "quit":
        machine.hmp_send("quit")
        assert machine.wait_exit() == 0
    else:
        machine.hmp("migrate_cancel")
        wait_until(lambda: "cancelled" in machine.hmp("info migrate"), "the end of the update")
        assert machine.children() == []
    wait_until(lambda: not strangers(machine), "the end of all that the probe started")
    if way == "cancel":
        check_alive(machine)


def asleep(machine):
    return [pid for pid, words in strangers(machine) if words == b"sleep\x00600\x00"]


def test_deadline_ends_what_the_probe_started(ticker):
    fault = (
        "import os, pyvmm.migration.preflight as p\n"
        "p.DEADLINE_S = 1 if os.path.exists('impatient') else 20.0"
    )
    machine = ticker(*QMP, program=faulty("pyvmm.migration.preflight:Probe.__init__", fault))
    (machine.folder / "impatient").touch()
    assert "did not answer the preflight" in update(machine, ["sh", "-c", BROOD])
    wait_until(lambda: not strangers(machine), "the end of all that the probe started")
    (machine.folder / "impatient").unlink()
    check_alive(machine)


def test_probe_that_cannot_be_ended(ticker):
    """Another user's, or one that waits for a device: the update is given up without it."""
    fault = (
        "import os, pyvmm.migration.preflight as p\n"
        "tame = os.path.exists('tame'); p.DEADLINE_S = p.GRACE_S = 20.0 if tame else 0.2\n"
        "if not tame: p.os.killpg, p.descendants.kill = (lambda *_: None), (lambda *_: None)"
    )
    machine = ticker(*QMP, program=faulty("pyvmm.migration.preflight:Probe.__init__", fault))
    reply = update(machine, ["sh", "-c", "exec sleep 600"])
    (pid,) = re.findall(r"\(process (\d+) cannot be ended\)", reply)
    assert machine.children() == [int(pid)]
    os.kill(int(pid), signal.SIGKILL)
    wait_until(lambda: not machine.children(), "the end of the probe")
    (machine.folder / "tame").touch()
    check_alive(machine)


def test_what_a_good_probe_left_in_its_group_is_ended(ticker):
    # The update itself starts it once more.
    machine = ticker()
    script = """
import os, sys
read_fd, write_fd = os.pipe()
if not os.fork():
    os.closerange(3, 1024)
    os.execlp("sleep", "sleep", "600")
os.close(write_fd)
os.read(read_fd, 1)
os.close(read_fd)
os.execv(sys.argv[1], sys.argv[1:])
"""
    command = [sys.executable, "-c", f"exec({script!r})", *machine.argv]
    assert update(machine, command) == ""
    (pid,) = asleep(machine)
    os.kill(int(pid), signal.SIGKILL)
    check_ticking(machine)


def test_update_right_behind_a_cancel(ticker):
    machine = ticker()
    hang = replaced(machine, "pyvmm:", "import signal; signal.pause()", probe=True)
    assert machine.hmp("update -d " + " ".join(f"'{word}'" for word in hang)) == ""
    wait_until(machine.probes, "the probe")
    # In one piece: no moment for the probe to end in between.
    machine.hmp_send("migrate_cancel\nupdate")
    assert machine.hmp_reply() == ""
    assert "in progress" in machine.hmp_reply()
    wait_until(lambda: "cancelled" in machine.hmp("info migrate"), "the end of the update")
    check_alive(machine)


def test_quit_during_the_preflight_leaves_no_probe(ticker):
    machine = ticker()
    hang = replaced(machine, "pyvmm:", "import signal; signal.pause()", probe=True)
    machine.hmp("update -d " + " ".join(f"'{word}'" for word in hang))
    (probe,) = wait_until(machine.probes, "the probe")
    machine.hmp_send("quit")
    assert machine.wait_exit() == 0
    wait_until(lambda: not os.path.exists(f"/proc/{probe}"), "the end of the probe")


def test_storm(ticker):
    machine = ticker()
    for _ in range(3):
        machine.hmp_send("update -d")
    assert machine.hmp_reply() == ""
    replies = [machine.hmp_reply() for _ in range(2)]
    # Those that were sent during the exec begin another update, or are refused.
    assert all(not reply or "in progress" in reply for reply in replies), replies
    wait_until(lambda: "completed" in machine.hmp("info migrate"), "the end of the update")
    check_alive(machine)


@pytest.mark.parametrize(
    "memory",
    [
        ["-machine", "anon-alloc=mmap"],
        ["-object", "memory-backend-ram,id=ram,size=64M", "-machine", "memory-backend=ram"],
        [
            *("-object", "memory-backend-memfd,id=ram,size=64M,share=off"),
            *("-machine", "memory-backend=ram"),
        ],
    ],
    ids=["mmap", "ram", "private-memfd"],
)
def test_private_memory(ticker, memory):
    machine = ticker(*memory)
    name = "ram" if "-object" in memory else "pc.ram"
    assert f"Memory region {name} is not compatible with CPR" in update(machine)
    check_ticking(machine)
    assert machine.status == "running"


SECCOMP = """
import ctypes, struct
rules = struct.pack("<HBBI", 0x20, 0, 0, 0)  # load the system call's number
for number in 59, 322:  # execve, execveat
    rules += struct.pack("<HBBI", 0x15, 0, 1, number) + struct.pack("<HBBI", 6, 0, 0, {action:#x})
rules += struct.pack("<HBBI", 6, 0, 0, 0x7fff0000)  # allow
text = ctypes.create_string_buffer(rules)
program = struct.pack("@HxxxxxxP", len(rules) // 8, ctypes.addressof(text))
libc = ctypes.CDLL(None, use_errno=True)
assert libc.prctl(38, 1, 0, 0, 0) == 0 and libc.prctl(22, 2, program, 0, 0) == 0
"""


@pytest.mark.parametrize(
    ("action", "why"),
    [(0x0005_0001, "Operation not permitted"), (0x8000_0000, "signal 31|cannot be executed")],
    ids=["refused", "killed"],
)
def test_seccomp_that_denies_execve(ticker, action, why):
    machine = ticker(*QMP, program=faulty("pyvmm:", SECCOMP.format(action=action)))
    with Qmp(machine.folder / "qmp.sock") as qmp:
        reply = update(machine)
        assert re.search(why, reply), reply
        assert qmp.execute("query-status")["status"] == "running"
        assert "STOP" not in qmp.events
    check_ticking(machine)


@pytest.mark.parametrize(
    ("uri", "why"),
    [
        ("file:missing/vm.state", "No such file or directory"),
        ("file:.", "Is a directory"),
        ("tcp:localhost:1", "unknown migration protocol"),
        ("file:/proc/self/status", "Permission denied|Could not"),
    ],
)
def test_state_that_cannot_be_written(ticker, uri, why):
    machine = ticker(*QMP)
    machine.set_update(uri=uri)
    with Qmp(machine.folder / "qmp.sock") as qmp:
        reply = machine.hmp(f"migrate {uri}")
        assert re.search(why, reply), reply
        qmp.execute("query-status")
        assert "STOP" not in qmp.events
    check_alive(machine)


def test_file_size_limit(ticker):
    # Python does not notice that byte code in its cache was cut short, so none is written.
    machine = ticker(PYTHONDONTWRITEBYTECODE="1")
    old = resource.prlimit(machine.pid, resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))
    assert "Error" in update(machine)
    check_ticking(machine)
    resource.prlimit(machine.pid, resource.RLIMIT_FSIZE, old)
    check_alive(machine)


def test_private_faults_need_the_file(ticker):
    # What the other files build on: a faulty old image is sound until it is armed.
    machine = ticker(program=armed("pyvmm.migration.savevm:save", "raise ValueError('armed')"))
    check_alive(machine)
    (machine.folder / "armed").touch()
    assert "ValueError: armed" in update(machine)
