"""The new image dies, hangs or gives up before it has the guest: which is back in the old image.

One that fails in Python executes the old command itself, in the same process. In place of one that
is gone the carrier starts the old program, which is another process with the same connections.
"""

import contextlib
import os
import pty
import signal
import socket
from pathlib import Path

import pytest
from faults.rescue import (
    GUESTS,
    KILL,
    NAMED,
    STEPS,
    bring_back,
    check_gone,
    check_whole,
    own_words,
    ram_inode,
)
from faults.tools import (
    BACK,
    QMP,
    Qmp,
    armed,
    check_ticking,
    check_updated,
    once,
    replaced,
    send_update,
    update,
)
from harness import process, run_cli, wait_until
from harness import pyvmm as pyvmm_command

from pyvmm import rundir

pytestmark = pytest.mark.usefixtures("orphans")

#: What a new image may do as its last act: code, exit code.
DEATHS = {
    "exit": ("import os; os._exit(7)", 7),
    "kill": (KILL, -signal.SIGKILL),
    "abort": ("import os; os.abort()", -signal.SIGABRT),
    "segfault": ("import ctypes; ctypes.string_at(0)", -signal.SIGSEGV),
}


# ---- the new image ends ----------------------------------------------------------------------


@pytest.mark.parametrize("step", STEPS)
def test_killed_at(ticker, step):
    machine = ticker(*NAMED)
    assert bring_back(machine, replaced(machine, step, KILL)) == -signal.SIGKILL
    check_whole(machine)


@pytest.mark.parametrize("step", ["pyvmm.cli:serve", "pyvmm.migration.savevm:apply"])
@pytest.mark.parametrize("death", DEATHS)
def test_dies_of(ticker, step, death):
    machine = ticker(*NAMED)
    fault, exit_code = DEATHS[death]
    assert bring_back(machine, replaced(machine, step, fault)) == exit_code
    check_whole(machine)


@pytest.mark.parametrize("guest", GUESTS)
def test_whatever_the_guest_does(vm, guest):
    append, smp, word, step = GUESTS[guest]
    machine = vm(*NAMED, append=append, smp=smp)
    # torture counts checks, which come in any steps.
    check = (
        (lambda: machine.expect(r"torture \d+ ok"))
        if step is None
        else (lambda: check_ticking(machine, word, step))
    )
    check()
    for _ in range(2):
        bring_back(machine, replaced(machine, "pyvmm.devices.serial:Serial.load", KILL))
        check()
        check_updated(machine)
        check()
    assert b"FAIL" not in machine.serial


@pytest.mark.parametrize("smp", [1, 4])
def test_connections_are_kept(vm, smp):
    """Clients are still connected, and answered: the guest's shell and both monitors."""
    machine = vm(*NAMED, *QMP, smp=smp)
    machine.shell("help")
    with Qmp(machine.folder / "qmp.sock") as qmp:
        assert qmp.execute("query-status")["status"] == "running"
        bring_back(machine, replaced(machine, "pyvmm.cli:serve", KILL))
        assert qmp.execute("query-status")["status"] == "running"
        assert qmp.execute("query-migrate")["status"] == "failed"
        first = int(machine.shell("counter").split()[1])
        wait_until(lambda: int(machine.shell("counter").split()[1]) > first, "a higher count")
        # Nor is the one that is found by name another.
        with Qmp(Path(os.environ["XDG_RUNTIME_DIR"], "pyvmm", machine.name, "qmp.sock")) as found:
            assert found.execute("query-name")["name"] == machine.name
    check_updated(machine)
    assert "counter" in machine.shell("counter")


def test_command_of_another_version_is_forgotten(ticker):
    """What comes after goes to the old code, also by the verb for the shell."""
    machine = ticker(*NAMED)
    bring_back(machine, replaced(machine, "pyvmm.cli:serve", KILL))
    done = run_cli("update", machine.name)
    assert (done.returncode, done.stderr) == (0, "")
    check_whole(machine)


def test_paused_guest_stays_paused(ticker):
    machine = ticker(*NAMED)
    assert machine.hmp("stop") == ""
    shown = len(machine.serial)
    for step in ("pyvmm.cli:serve", "pyvmm.migration.savevm:apply"):
        bring_back(machine, replaced(machine, step, KILL))
        assert machine.status == "paused"
        assert len(machine.serial) == shown
    check_updated(machine)
    assert machine.status == "paused"
    assert len(machine.serial) == shown
    assert machine.hmp("cont") == ""
    check_whole(machine)


def test_twice_in_a_row(ticker):
    machine = ticker(*NAMED)
    for step in ("pyvmm.cli:serve", "pyvmm.migration.savevm:apply"):
        bring_back(machine, replaced(machine, step, KILL))
    check_whole(machine)


def test_after_updates_and_ways_back(ticker):
    """The four ways to be updated, one after the other."""
    machine = ticker(*NAMED)
    for _ in range(2):
        assert update(machine) == ""
        bring_back(machine, replaced(machine, "pyvmm.cli:serve", KILL))
        pid = machine.pid
        fault = replaced(machine, "pyvmm.cli:serve", "raise ValueError('injected')")
        assert update(machine, fault) == f"Error: ValueError: injected {BACK}\n"
        assert machine.pid == pid
    check_whole(machine)


def test_state_in_a_file(ticker):
    """The way back is with the copy in memory."""
    machine = ticker(*NAMED)
    uri = "file:vm.state"
    fault = f"open('vm.state', 'w').close(); {KILL}"
    dies = replaced(machine, "pyvmm.migration.savevm:apply", fault)
    machine.set_update([*dies, "-incoming", uri])
    machine.hmp_send(f"migrate {uri}")
    machine.follow()
    assert BACK in machine.hmp_reply()
    check_whole(machine)


# ---- what comes in its place dies, too -------------------------------------------------------


@pytest.mark.parametrize("step", ["pyvmm:", "pyvmm.cli:serve", "pyvmm.migration.savevm:apply"])
@pytest.mark.parametrize("fault", ["kill", "exit"])
def test_rescued_image_dies(ticker, step, fault):
    """Once: the next one has the guest."""
    machine = ticker(*NAMED, program=armed(step, once(DEATHS[fault][0])))
    dies = f"open('armed', 'w').close(); {KILL}"
    bring_back(machine, replaced(machine, "pyvmm.cli:serve", dies))
    assert not (machine.folder / "armed").exists()
    check_whole(machine)


def test_rescued_image_raises(ticker):
    machine = ticker(*NAMED, program=armed("pyvmm.cli:serve", once("raise ValueError('once')")))
    dies = f"open('armed', 'w').close(); {KILL}"
    bring_back(machine, replaced(machine, "pyvmm.cli:serve", dies))
    check_whole(machine)


def test_old_image_of_the_way_back_dies(ticker):
    """The new one raises, and the old one that it executes in the same process is killed."""
    machine = ticker(*NAMED, program=armed("pyvmm.cli:serve", once(KILL)))
    fault = "open('armed', 'w').close(); raise ValueError('injected')"
    assert bring_back(machine, replaced(machine, "pyvmm.cli:serve", fault)) == -signal.SIGKILL
    check_whole(machine)


def test_no_image_takes_it_over(ticker):
    """There is an end to it: nothing is started for ever, and nothing is left."""
    machine = ticker(*NAMED, program=armed("pyvmm.cli:serve", KILL))
    inode = ram_inode(machine)
    (machine.folder / "armed").touch()
    send_update(machine)
    assert machine.wait_exit() == -signal.SIGKILL
    check_gone(machine, inode)
    assert "lost" in machine.stderr()


# ---- the new image gives up ------------------------------------------------------------------


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("fault", ["raise ValueError('injected')", "import sys; sys.exit(3)"])
def test_gives_up(ticker, step, fault):
    """In the same process, with the same process id."""
    machine = ticker(*NAMED)
    pid, words = machine.pid, own_words(machine)
    assert BACK in update(machine, replaced(machine, step, fault))
    assert machine.pid == pid
    assert own_words(machine) == words
    check_whole(machine)


# ---- the operator ends it --------------------------------------------------------------------


@pytest.mark.parametrize("before", ["nothing", "an update", "a rescue"])
def test_killed_when_no_update_runs(ticker, before):
    """Whoever kills the VMM means the guest: nobody brings it back."""
    machine = ticker(*NAMED)
    inode = ram_inode(machine)
    if before == "an update":
        assert update(machine) == ""
    elif before == "a rescue":
        bring_back(machine, replaced(machine, "pyvmm.cli:serve", KILL))
    machine.footprint()
    machine.kill(signal.SIGKILL)
    assert machine.wait_exit() == -signal.SIGKILL
    wait_until(lambda: not process.mappers(inode), "the end of the guest's memory")
    assert not list(process.others_at_work(machine.folder))


@pytest.mark.parametrize("end", ["quit", "term"])
def test_rescued_process_ends_in_order(ticker, end):
    machine = ticker(*NAMED)
    inode = ram_inode(machine)
    bring_back(machine, replaced(machine, "pyvmm.cli:serve", KILL))
    machine.status  # noqa: B018 (the monitor is there)
    if end == "quit":
        assert machine.hmp_quit() == 0
    else:
        machine.kill()
        assert machine.wait_exit() == 128 + signal.SIGTERM
    check_gone(machine, inode)


def test_signal_meanwhile_waits_for_the_rescue(ticker):
    """SIGTERM at the new image, which dies of something else: it was meant for that process."""
    machine = ticker(*NAMED)
    fault = f"import os; os.kill(os.getpid(), 15); {KILL}"
    bring_back(machine, replaced(machine, "pyvmm.cli:serve", fault))
    check_whole(machine)


# ---- connections end when they end -----------------------------------------------------------


def test_no_end_of_file_is_delayed(ticker):
    """A client sees the end of its connection as soon as the new image closes it."""
    machine = ticker(*NAMED, *QMP)
    path = str(machine.folder / "side.sock")
    backend = {"type": "socket", "data": {"addr": {"type": "unix", "data": {"path": path}}}}
    with Qmp(machine.folder / "qmp.sock") as qmp:
        for rescue in (False, True):
            backend["data"]["wait"] = False
            qmp.execute("chardev-add", id="side", backend=backend)
            with socket.socket(socket.AF_UNIX) as client:
                client.settimeout(process.DEADLINE_S)
                client.connect(path)
                wait_until(
                    lambda: "disconnected:unix" not in machine.hmp("info chardev"), "the client"
                )
                if rescue:
                    bring_back(machine, replaced(machine, "pyvmm.cli:serve", KILL))
                else:
                    assert update(machine) == ""
                qmp.execute("chardev-remove", id="side")
                assert client.recv(1) == b""
                # Nobody else had it either.
                assert not process.carriers(machine.folder)


# ---- the old image is killed -----------------------------------------------------------------


@pytest.mark.parametrize(
    "step",
    [
        "pyvmm.machine.machine:Machine.drain",
        "pyvmm.migration.savevm:save",
        "pyvmm.migration.rollback:arm",
        "pyvmm.cpr.state:write",
        "pyvmm.cpr.handover:Handover.set_inheritable",
    ],
)
def test_old_image_killed(ticker, step):
    """Before all is there that another one needs, the guest ends with its process."""
    machine = ticker(*NAMED, program=armed(step, KILL))
    inode = ram_inode(machine)
    (machine.folder / "armed").touch()
    send_update(machine)
    assert machine.wait_exit() == -signal.SIGKILL
    wait_until(lambda: not process.mappers(inode), "the end of the guest's memory")
    assert not list(process.others_at_work(machine.folder))
    assert machine.stderr() == ""


def test_old_image_killed_in_its_last_moment(ticker):
    machine = ticker(*NAMED, program=armed("os:execve", once(KILL)))
    (machine.folder / "armed").touch()
    assert bring_back(machine) == -signal.SIGKILL
    check_whole(machine)


# ---- the terminal that it was started on -----------------------------------------------------

DEBUGCON = ("-chardev", "stdio,id=tty", "-device", "isa-debugcon,chardev=tty")
#: A shell that makes each command a job, which has the terminal while it runs, and waits then.
SHELL = ("sh", "-c", 'set -m; "$@"; echo back; sleep 600', "sh")


@pytest.fixture
def terminal():
    """A new terminal: both ends."""
    ends = pty.openpty()
    yield ends
    for end in ends:
        with contextlib.suppress(OSError):
            os.close(end)


def test_terminal_of_the_session_hangs_up(ticker, terminal):
    """It does with the process that led the session; the guest does not end for that."""
    _, slave = terminal
    program = ["setsid", "-c", pyvmm_command(), "run"]
    machine = ticker(*NAMED, *DEBUGCON, program=program, stdin=slave)
    assert os.getsid(machine.pid) == machine.pid
    bring_back(machine, replaced(machine, "pyvmm.cli:serve", KILL))
    check_whole(machine)


def test_shell_takes_the_terminal_back(ticker, terminal):
    """The guest runs on in the background, where nobody may read from a terminal."""
    master, slave = terminal
    program = ["setsid", "-c", *SHELL, pyvmm_command(), "run"]
    machine = ticker(*NAMED, *DEBUGCON, program=program, stdin=slave, stdout=slave)
    entry = f"{os.environ['XDG_RUNTIME_DIR']}/pyvmm/{machine.name}"
    shell, before = machine.pid, rundir.read_info(entry)["pid"]
    assert before != shell
    inode = process.memfd(before, "pc.ram").stat().st_ino
    assert os.tcgetpgrp(master) == os.getpgid(before)
    send_update(machine, replaced(machine, "pyvmm.cli:serve", KILL))
    assert BACK in machine.hmp_reply()
    wait_until(lambda: rundir.read_info(entry)["pid"] != before, "another process")
    after = rundir.read_info(entry)["pid"]
    wait_until(lambda: os.tcgetpgrp(master) != os.getpgid(after), "the shell")
    os.write(master, b"typed\n")
    check_ticking(machine)
    check_updated(machine)
    check_ticking(machine)
    state = Path(f"/proc/{after}/stat").read_text().rpartition(")")[2].split()[0]
    assert state in "RS"
    machine.hmp_send("quit")
    wait_until(lambda: not process.mappers(inode), "the end")
