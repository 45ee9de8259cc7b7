"""VMs found by name: two of one name, killed ones, and list, monitor and update end to end."""

import contextlib
import json
import re
import select
import signal
import socket
import subprocess
import sys
import threading
from xml.etree import ElementTree

import pexpect
import pytest
from harness import DEADLINE_S, process, pyvmm, run_cli, wait_until

from pyvmm import rundir
from pyvmm.migration.status import STEPS

FILES = {"info", "lock", "monitor.sock", "qmp.sock"}
PROMPT = b"(pyvmm) "


@pytest.fixture(autouse=True)
def base(tmp_path, monkeypatch):
    """The run directory of one test."""
    runtime = tmp_path / "xdg"
    runtime.mkdir()
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(runtime))
    return runtime / "pyvmm"


@pytest.fixture
def ticking(vm, base):
    """Starts a VM that ticks for ever, and waits until it can be found."""

    def start(name, *options, **arguments):
        named = [] if name is None else ["-name", name]
        machine = vm(*named, *options, append="ticker period=20", **arguments)
        machine.expect("tick 1\\b")
        machine.name = name or f"vm-{machine.pid}"
        folder = base / rundir.encode_name(machine.name)
        wait_until(lambda: (folder / "qmp.sock").exists(), "an entry")
        return machine

    return start


def listed():
    """What ``pyvmm list --json`` shows, by name."""
    done = run_cli("list", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    return {row["name"]: row for row in json.loads(done.stdout)}


def client(base, name, file="monitor.sock"):
    """A client of one of a VM's sockets."""
    stream = socket.socket(socket.AF_UNIX)
    stream.settimeout(DEADLINE_S)
    stream.connect(str(base / name / file))
    return stream


def read_until(stream, end):
    """Everything up to what ends with ``end``."""
    data = b""
    while not data.endswith(end):
        piece = stream.recv(4096)
        assert piece, f"closed after {data!r}"
        data += piece
    return data


# Entries.


def test_an_entry_lasts_as_long_as_its_vm(ticking, base):
    machine = ticking(None)
    assert {path.name for path in (base / machine.name).iterdir()} == FILES
    for path in [base, base / machine.name]:
        assert path.stat().st_mode & 0o777 == 0o700
    machine.hmp_send("quit")
    assert machine.wait_exit() == 0
    assert list(base.iterdir()) == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_leaves_nothing(ticking, base, number):
    machine = ticking("vm")
    machine.kill(number)
    assert machine.wait_exit() == 128 + number
    assert list(base.iterdir()) == []


def test_a_vm_that_does_not_come_up_leaves_nothing(base, tmp_path):
    # Well below the time that a vCPU is waited for.
    done = run_cli("run", "-name", "vm", "-kernel", str(tmp_path / "none"), timeout=8)
    assert done.returncode == 2
    assert list(base.iterdir()) == []


def test_a_name_may_have_any_characters(ticking):
    machine = ticking("a/b c\u00fc%..")
    assert list(listed()) == ["a/b c\u00fc%.."]
    assert run_cli("monitor", machine.name, "info", "name").stdout == f"{machine.name}\n"


# Two VMs.


def test_a_second_vm_of_a_name_is_refused(ticking, tmp_path):
    first = ticking("vm")
    log = tmp_path / "log"
    log.write_text("of the first")
    done = run_cli("run", "-name", "vm", "-serial", f"file:{log}")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        f"pyvmm: -name 'vm': process {first.pid} runs a VM of that name; give another name, or "
        "end that one by its monitor's quit\n"
    )
    assert log.read_text() == "of the first"
    assert first.status == "running"
    ticking("other")
    assert set(listed()) == {"vm", "other"}


def test_a_second_vm_is_refused_all_through_twenty_updates(ticking):
    machine = ticking("vm")
    # Not run_cli: the loop is to be tight.
    code = """
import select, sys
from pyvmm import rundir
from pyvmm.migration.status import STEPS
tries = taken = 0
print("go", flush=True)
while not select.select([sys.stdin], [], [], 0)[0]:
    tries += 1
    try:
        rundir.reserve("vm")
        taken += 1
    except rundir.NameInUseError:
        pass
print(tries, taken)
"""
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as prober:
        assert prober.stdout.readline() == "go\n"
        starts = []
        stop = threading.Event()

        def start_again_and_again():
            while not stop.is_set():
                starts.append(run_cli("run", "-name", "vm", "-m", "16M"))

        thread = threading.Thread(target=start_again_and_again)
        thread.start()
        try:
            for _ in range(20):
                machine.update()
        finally:
            stop.set()
            thread.join()
            prober.stdin.close()
            tries, taken = map(int, prober.stdout.read().split())
    assert tries > 1000
    assert taken == 0
    assert len(starts) > 5
    assert {done.returncode for done in starts} == {2}
    assert all(f"process {machine.pid} runs a VM" in done.stderr for done in starts)
    assert listed()["vm"]["updates"] == 20
    assert machine.stderr() == ""


def test_what_a_killed_vm_left_is_taken_over(ticking, base):
    machine = ticking("vm")
    machine.kill(signal.SIGKILL)
    machine.wait_exit()
    assert {path.name for path in (base / "vm").iterdir()} == FILES
    again = ticking("vm")
    assert listed()["vm"]["pid"] == again.pid
    assert run_cli("monitor", "vm", "info", "status").stdout == "VM status: running\n"


def test_what_a_killed_vm_left_is_removed_by_list(ticking, base):
    dead, living = ticking("dead"), ticking("living")
    dead.kill(signal.SIGKILL)
    dead.wait_exit()
    assert list(listed()) == ["living"]
    assert [path.name for path in base.iterdir()] == ["living"]
    assert living.status == "running"


# A run directory that cannot be used.


@pytest.mark.parametrize("kind", ["symlink", "open", "file"])
def test_a_run_directory_that_is_not_safe(vm, base, tmp_path, kind):
    if kind == "symlink":
        (tmp_path / "elsewhere").mkdir()
        base.symlink_to(tmp_path / "elsewhere")
        problem = "is no directory"
    elif kind == "open":
        base.mkdir()
        base.chmod(0o777)
        problem = "is open to others (mode 777, not 700)"
    else:
        base.write_text("")
        problem = "is no directory"
    named = run_cli("run", "-name", "vm")
    assert (named.returncode, named.stdout) == (1, "")
    assert re.fullmatch(rf"pyvmm: .*{re.escape(problem)}.*\n", named.stderr)
    machine = vm(append="ticker period=20")
    machine.expect("tick 10\\b")
    assert machine.status == "running"
    assert "'pyvmm list' does not show this VM" in machine.stderr()
    assert problem in machine.stderr()
    machine.update()
    machine.expect("tick ")
    machine.hmp_send("quit")
    assert machine.wait_exit() == 0
    assert run_cli("list").returncode == 1


def test_an_entry_that_somebody_removed_is_made_again_by_an_update(ticking, base):
    machine = ticking("vm")
    stream = client(base, "vm")
    read_until(stream, PROMPT)
    for path in (base / "vm").iterdir():
        path.unlink()
    assert listed() == {}
    machine.update()
    wait_until(lambda: "vm" in listed(), "the entry")
    assert run_cli("monitor", "vm", "info", "status").stdout == "VM status: running\n"
    stream.sendall(b"info name\n")
    assert read_until(stream, PROMPT) == b"vm\r\n" + PROMPT
    stream.close()


def test_a_path_too_long_for_a_socket(vm, base, monkeypatch):
    machine = vm("-name", "n" * 150, append="ticker period=20")
    machine.expect("tick 5\\b")
    wait_until(lambda: "a socket's has 1 to 107" in machine.stderr(), "the warning")
    assert run_cli("run", "-name", "n" * 150).returncode == 2
    assert listed()["n" * 150]["state"] == "unknown"


# list.


def test_list(ticking):
    first, second = ticking("first", memory="64M", smp=2), ticking(None, memory="32M")
    second.hmp("stop")
    first.update()
    wait_until(lambda: listed()["first"]["updates"] == 1, "one update")
    rows = listed()
    uptimes = [row.pop("uptime") for row in rows.values()]
    assert all(0 < uptime < DEADLINE_S for uptime in uptimes)
    row = {"state": "running", "memory": 64 << 20, "vcpus": 2, "updates": 1, "version": "0.1.0"}
    assert rows == {
        "first": {"name": "first", "pid": first.pid, **row},
        second.name: {
            "name": second.name,
            "pid": second.pid,
            "state": "paused",
            "memory": 32 << 20,
            "vcpus": 1,
            "updates": 0,
            "version": row["version"],
        },
    }
    table = run_cli("list").stdout.splitlines()
    assert table[0].split() == ["NAME", "PID", "STATE", "MEMORY", "VCPUS", "UPTIME", "UPDATES"]
    assert table[1].split()[:6] == ["first", str(first.pid), "running", "64", "MiB", "2"]


def test_a_vm_that_does_not_answer_does_not_hold_up_list(ticking):
    machine = ticking("hung")
    ticking("fine")
    machine.kill(signal.SIGSTOP)
    rows = listed()
    machine.kill(signal.SIGCONT)
    assert {name: row["state"] for name, row in rows.items()} == {
        "fine": "running",
        "hung": "unknown",
    }


# monitor.


def test_monitor_command(ticking):
    machine = ticking("vm")
    done = run_cli("monitor", "vm", "info", "status")
    assert (done.returncode, done.stdout, done.stderr) == (0, "VM status: running\n", "")
    for command in (["bogus"], ["info", "bogus"], ["migrate"], ["cpu", "7"]):
        done = run_cli("monitor", "vm", *command)
        assert done.returncode == 1
        assert done.stdout
    assert run_cli("monitor", "vm", "stop").returncode == 0
    assert machine.status == "paused"
    assert run_cli("monitor", "vm", "quit").returncode == 0
    assert machine.wait_exit() == 0


def test_monitor_script(ticking, tmp_path):
    ticking("vm")
    script = tmp_path / "script"
    script.write_text("info name\nbogus\ninfo version\n")
    with open(script) as stdin:
        done = run_cli("monitor", "vm", stdin=stdin)
    assert done.stdout == "vm\nunknown command: 'bogus'\n0.1.0\n"
    assert done.returncode == 1


@contextlib.contextmanager
def monitor_session(name, state_home):
    """``pyvmm monitor NAME`` on a terminal."""
    environment = process.environment(TERM="xterm", XDG_STATE_HOME=str(state_home))
    terminal = pexpect.spawn(pyvmm(), ["monitor", name], env=environment, timeout=DEADLINE_S)
    try:
        yield terminal
    finally:
        process.end_session(terminal)


def test_monitor_session_lives_through_an_update(ticking, tmp_path):
    machine = ticking("vm")
    with monitor_session("vm", tmp_path) as terminal:
        terminal.expect_exact("Ctrl-D leaves; the VM runs on.")
        terminal.expect_exact("(pyvmm)")
        terminal.send("info sta\t\r")
        terminal.expect_exact("VM status: running")
        terminal.expect_exact("(pyvmm)")
        terminal.send("info na")
        machine.update()
        terminal.send("me\r")
        terminal.expect("\r\n[^\r]*vm\r\n")
        terminal.send("\x04")
        terminal.expect(pexpect.EOF)
        terminal.wait()
        assert terminal.exitstatus == 0
    assert machine.status == "running"
    assert "info name" in (tmp_path / "pyvmm" / "history").read_text()


def test_monitor_session_ends_with_the_vm(ticking, tmp_path):
    machine = ticking("vm")
    with monitor_session("vm", tmp_path) as terminal:
        terminal.expect_exact("Ctrl-D leaves")
        terminal.expect_exact("(pyvmm)")
        machine.hmp_send("quit")
        terminal.expect_exact("pyvmm: vm: the VM closed the connection")
        terminal.expect(pexpect.EOF)
        terminal.wait()
        assert terminal.exitstatus == 1


# Several clients.


def test_clients_have_a_monitor_each_also_after_an_update(ticking, base):
    machine = ticking("vm", smp=4)
    sockets = machine.footprint()[0].count("socket")
    streams = [client(base, "vm") for _ in range(4)]
    for number, stream in enumerate(streams):
        read_until(stream, PROMPT)
        stream.sendall(f"cpu {number}\n".encode())
        assert read_until(stream, PROMPT) == PROMPT
        stream.sendall(b"info cp")
    machine.update()
    for number, stream in enumerate(streams):
        stream.sendall(b"us\n")
        assert f"* CPU #{number}:".encode() in read_until(stream, PROMPT)
        stream.close()
    # Until they have gone there, too.
    wait_until(lambda: machine.fds().count("socket") == sockets, "the end of the clients")
    footprint = machine.footprint()
    assert run_cli("monitor", "vm", "info", "status").returncode == 0
    wait_until(lambda: machine.footprint() == footprint, "no client left behind")


def test_clients_stay_when_the_info_cannot_be_written(ticking, base):
    machine = ticking("vm")
    (base / "vm" / "info~").mkdir()
    with client(base, "vm") as stream:
        read_until(stream, PROMPT)
        machine.update()
        stream.sendall(b"info status\n")
        assert b"running" in read_until(stream, PROMPT)
        assert "run directory, info: Is a directory" in machine.stderr()
    assert run_cli("monitor", "vm", "info", "status").stdout == "VM status: running\n"
    (base / "vm" / "info~").rmdir()


def test_a_client_over_the_limit_waits_for_one_to_go(ticking, base):
    ticking("vm")
    streams = [client(base, "vm", "qmp.sock") for _ in range(33)]
    for stream in streams[:32]:
        assert b"QMP" in read_until(stream, b"\n")
    assert not select.select([streams[32]], [], [], 0.2)[0]
    streams[7].close()
    assert b"QMP" in read_until(streams[32], b"\n")
    for stream in streams:
        stream.close()
    wait_until(lambda: listed()["vm"]["state"] == "running", "room for another client")


def test_nobody_is_refused_during_updates(ticking, base):
    machine = ticking("vm")
    stop, problems, served = threading.Event(), [], []

    def connect_again_and_again():
        try:
            while not stop.is_set():
                stream = client(base, "vm")
                with stream:
                    read_until(stream, PROMPT)
                    stream.sendall(b"info name\n")
                    assert read_until(stream, PROMPT) == b"vm\r\n" + PROMPT
                served.append(1)
        except Exception as error:
            problems.append(error)

    threads = [threading.Thread(target=connect_again_and_again) for _ in range(3)]
    for thread in threads:
        thread.start()
    for _ in range(10):
        machine.update()
    stop.set()
    for thread in threads:
        thread.join()
    assert not problems
    assert len(served) > 20


# update.


def test_update(ticking, base):
    machine = ticking("vm")
    done = run_cli("update", "vm")
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    names = [line.split()[0] for line in lines[:-1]]
    assert names[:3] == ["preflight", "quiesce", "stop"]
    assert {"save", "exec", "load"} < set(names)
    told = re.fullmatch(
        r"vm: updated, the guest stood for ([0-9.]+) ms and ran meanwhile; "
        r"its devices answered again after ([0-9.]+) ms",
        lines[-1],
    )
    stood, devices = map(float, told.groups())
    phases = sum(float(line.split()[1]) for line in lines[2:-1])
    assert 0 < stood < devices <= phases + 1
    assert machine.cmdline[-2] == "-incoming"
    seen = len(machine.serial)
    machine.expect("tick ")
    assert b"FAIL" not in machine.serial[seen:]
    assert listed()["vm"]["updates"] == 1
    assert {path.name for path in (base / "vm").iterdir()} == FILES


def test_update_tells_what_took_how_long(ticking, tmp_path):
    machine = ticking("vm")
    events, picture = tmp_path / "trace.json", tmp_path / "trace.svg"
    for path in (events, picture):
        done = run_cli("update", "--trace", str(path), "vm")
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout.endswith(f"vm: what took how long is in {path}\n")
    found = json.loads(events.read_text())["traceEvents"]
    assert {event["pid"] for event in found} == {machine.pid}
    main = [event for event in found if event["ph"] == "X" and event["tid"] == 0]
    assert [event["name"] for event in main] == list(STEPS[:-1])
    assert {event["tid"] for event in found} == {0, 1}
    assert all(event["dur"] >= 0 for event in main)
    title = ElementTree.parse(picture).getroot().find("{http://www.w3.org/2000/svg}title")
    assert title.text == "vm updated"


def test_update_that_is_refused_has_no_trace(ticking, tmp_path):
    machine = ticking("vm")
    path = tmp_path / "trace.json"
    done = run_cli("update", "--trace", str(path), "vm", "--", "/bin/false")
    assert (done.returncode, done.stdout) == (1, "")
    *_, last = done.stderr.splitlines()
    assert last == f"pyvmm: --trace {path}: the VM tells no times of it"
    assert not path.exists()
    # Nothing was begun for a file that cannot be written.
    assert run_cli("update", "--trace", str(tmp_path), "vm").returncode == 2
    assert listed()["vm"]["updates"] == 0
    assert machine.status == "running"


def test_update_to_another_command(ticking):
    machine = ticking("vm")
    words = [*machine.argv, "-action", "panic=none"]
    done = run_cli("update", "--timeout", "50", "vm", "--", *words)
    assert (done.returncode, done.stderr) == (0, "")
    assert machine.cmdline[-4:-1] == ["-action", "panic=none", "-incoming"]
    # A name is for as long as the VM runs.
    named = [word if word != "vm" else "renamed" for word in words]
    assert run_cli("update", "vm", "--", *named).returncode == 0
    assert list(listed()) == ["vm"]
    wait_until(lambda: "the VM keeps the name vm" in machine.stderr(), "the warning")


@pytest.mark.parametrize(
    ("command", "reason"),
    [
        (["/nonexistent/pyvmm", "run"], "/nonexistent/pyvmm"),
        (["/bin/false"], "/bin/false"),
        (["PYVMM", "run", "-m", "32M"], "-m is 33554432, this machine has 67108864"),
        (["PYVMM", "run", "-bogus"], "-bogus"),
    ],
)
def test_update_that_is_refused(ticking, command, reason):
    machine = ticking("vm")
    before = machine.cmdline
    command = [pyvmm() if word == "PYVMM" else word for word in command]
    done = run_cli("update", "vm", "--", *command)
    assert (done.returncode, done.stdout) == (1, "")
    assert re.fullmatch(rf"pyvmm: vm was not updated: .*{re.escape(reason)}.*\n", done.stderr)
    assert machine.cmdline == before
    assert machine.status == "running"
    assert listed()["vm"]["updates"] == 0
    assert run_cli("update", "vm").returncode == 0


def test_update_that_is_rolled_back(ticking, base):
    machine = ticking("vm")
    stream = client(base, "vm")
    read_until(stream, PROMPT)
    # The preflight opens nothing, so this is found out after the exec.
    words = [*machine.argv, "-chardev", "file,id=log,path=/nonexistent/log"]
    done = run_cli("update", "vm", "--", *words)
    assert (done.returncode, done.stdout) == (1, "")
    assert re.fullmatch(r"pyvmm: vm was not updated: .*/nonexistent/log.*\n", done.stderr)
    assert "/nonexistent" not in " ".join(machine.cmdline)
    assert run_cli("run", "-name", "vm").returncode == 2
    stream.sendall(b"info name\n")
    assert read_until(stream, PROMPT) == b"vm\r\n" + PROMPT
    stream.close()
    assert listed()["vm"]["updates"] == 0
    assert run_cli("update", "vm").returncode == 0
    assert listed()["vm"]["updates"] == 1


def test_update_that_takes_too_long_is_given_up(ticking, tmp_path):
    machine = ticking("vm")
    sleeper = tmp_path / "sleeper"
    sleeper.write_text("#!/bin/sh\nexec sleep 1000\n")
    sleeper.chmod(0o755)
    done = run_cli("update", "vm", "--timeout", "0.5", "--", str(sleeper), "run")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.endswith("cancelled; a timeout of 0.5 s was given\n")
    assert machine.status == "running"
    assert not machine.children()


def test_update_shows_its_progress_on_a_terminal(ticking):
    ticking("vm")
    text, code = pexpect.run(
        f"{pyvmm()} update vm",
        withexitstatus=True,
        timeout=DEADLINE_S,
        env=process.environment(),
    )
    assert code == 0
    assert b"vm: preflight ..." in text
    assert text.endswith(b" ms\r\n")


def test_update_of_a_vm_that_ends_meanwhile(ticking, tmp_path):
    machine = ticking("vm")
    killer = tmp_path / "killer"
    killer.write_text("#!/bin/sh\nkill -9 $PPID\n")
    killer.chmod(0o755)
    done = run_cli("update", "vm", "--", str(killer), "run")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "pyvmm: vm: the VM closed the connection\n"
    assert machine.wait_exit() == -signal.SIGKILL
