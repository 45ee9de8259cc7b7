"""Both images can die at any step: what must not be left behind, and signals that must wait. Where
the guest runs through the exec it is back after most of that: ``test_rescue.py``."""

import os
import pty
import signal
import termios
from pathlib import Path

import pytest
from faults.tools import (
    QMP,
    TICKER,
    Qmp,
    armed,
    check_alive,
    check_lost,
    check_ticking,
    faulty,
    options,
    replaced,
    send_update,
    update,
)
from harness import Vm, wait_until
from harness import pyvmm as pyvmm_command
from harness.process import others_at_work

OLD = [
    "pyvmm.migration.preflight:compare",
    "pyvmm.kvm.carrier:Control.make",
    "pyvmm.kvm.carrier:Carrier.start",
    "pyvmm.kvm.carrier:Carrier.hand_over",
    "pyvmm.machine.machine:Machine.drain",
    "pyvmm.migration.savevm:save",
    "pyvmm.migration.channel:MemoryChannel.write",
    "pyvmm.migration.rollback:arm",
    "pyvmm.cpr.state:write",
]
OLD_PLAIN = [
    "pyvmm.machine.machine:Machine.pause_cpus",
    "pyvmm._native:hold_memory",
    "os:execve",
]
NEW = [
    "pyvmm.cli:main",
    "pyvmm.cli:serve",
    "pyvmm.machine.builder:add_devices",
    "pyvmm.machine.machine:Machine.start",
    "pyvmm.migration.savevm:read",
    "pyvmm.migration.savevm:apply",
    "pyvmm.wayback:close",
]
NEW_PLAIN = [
    "pyvmm.x86.vcpu_state:write",
    "pyvmm.x86.irqchip:load_clock",
    "pyvmm.machine.machine:Machine.set_running",
]
NEW_RUNNING = [
    "pyvmm.machine.machine:Machine.await_cpus",
    "pyvmm.migration.takeover:Takeover.finish",
    "pyvmm.machine.machine:Machine.go_on",
]
KILL = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
LISTENING = ("-serial", "unix:serial.server,server=on,wait=off", "-name", "mortal")


def start_again(vm, folder, **arguments):
    """A VM of the same name with the same sockets starts where the dead one was."""
    again = Vm(folder, *LISTENING, append=TICKER, serial=False, monitor=False, **arguments)
    with again as machine:
        wait_until((folder / "serial.server").exists, "the socket")
        wait_until(lambda: len(machine.threads()) >= 2, "the vCPU's thread")
        machine.kill()
        assert machine.wait_exit() == 128 + signal.SIGTERM


@pytest.mark.parametrize(
    ("step", "is_plain"), [(step, False) for step in OLD] + [(step, True) for step in OLD_PLAIN]
)
def test_old_image_killed(vm, tmp_path, step, is_plain):
    runtime = {"XDG_RUNTIME_DIR": str(tmp_path)}
    fault = armed(step, KILL)
    machine = vm(*LISTENING, append=TICKER, serial=False, program=fault, **runtime)
    assert machine.status == "running"
    if is_plain:
        machine.plain()
    (machine.folder / "armed").touch()
    send_update(machine)
    check_lost(machine, -signal.SIGKILL)
    start_again(vm, machine.folder, **runtime)


@pytest.mark.parametrize("step", [*NEW, *NEW_PLAIN])
def test_new_image_killed(vm, tmp_path, step):
    runtime = {"XDG_RUNTIME_DIR": str(tmp_path)}
    machine = vm(*LISTENING, append=TICKER, serial=False, **runtime)
    assert machine.status == "running"
    machine.plain()
    send_update(machine, replaced(machine, step, KILL))
    check_lost(machine, -signal.SIGKILL)
    start_again(vm, machine.folder, **runtime)


@pytest.mark.parametrize(
    ("fault", "exit_code"),
    [
        ("import os; os._exit(7)", 7),
        ("import os; os.abort()", -signal.SIGABRT),
        ("import ctypes; ctypes.string_at(0)", -signal.SIGSEGV),
    ],
    ids=["exit", "abort", "segfault"],
)
def test_new_image_crashes(ticker, fault, exit_code):
    # Nobody is left who could go back: the plain way's limit.
    machine = ticker().plain()
    send_update(machine, replaced(machine, "pyvmm.cli:serve", fault))
    check_lost(machine, exit_code)


def test_elf_corrupted_after_the_preflight(ticker):
    # execve gives no error for it: the process dies on its way into the program.
    machine = ticker().plain()
    program = machine.folder / "program"
    elf = os.path.realpath(f"/proc/{machine.pid}/exe")
    # The environment's python: the one that it links to may have no cffi.
    program.write_text(
        f"#!{Path(pyvmm_command()).with_name('python')}\nimport os, sys\n"
        "from pyvmm import cli\n"
        "code = cli.main()\n"
        f"data = open({elf!r}, 'rb').read()\n"
        "os.unlink(sys.argv[0])\n"
        "open(sys.argv[0], 'wb').write(data[:len(data) // 2])\n"
        "os.chmod(sys.argv[0], 0o755)\n"
        "os._exit(code)\n"
    )
    program.chmod(0o755)
    send_update(machine, [str(program), "run", *options(machine)])
    check_lost(machine, -signal.SIGSEGV)


def test_hang_before_python_is_there(ticker):
    # The alarm that was set before the exec ends a program that does not handle it.
    quick = "import pyvmm.migration.rollback as r; r.DEADLINE_S = 0.5"
    machine = ticker(program=faulty("pyvmm:", quick)).plain()
    fault = "import signal; signal.signal(signal.SIGALRM, signal.SIG_DFL); signal.pause()"
    send_update(machine, replaced(machine, "pyvmm:", fault))
    check_lost(machine, -signal.SIGALRM)


def test_both_images_fail(ticker):
    machine = ticker(program=armed("pyvmm.x86.irqchip:load_pit", "raise ValueError('old')"))
    machine.plain()
    (machine.folder / "armed").touch()
    send_update(machine, replaced(machine, "pyvmm.x86.irqchip:load_pic", "raise ValueError('new')"))
    assert machine.wait_exit() != 0
    assert "ValueError: old" in machine.stderr()


def test_terminal_is_restored_when_both_images_fail(vm):
    master, slave = pty.openpty()
    try:
        before = termios.tcgetattr(slave)
        machine = vm(
            *("-chardev", "stdio,id=tty", "-device", "isa-debugcon,chardev=tty"),
            append=TICKER,
            program=armed("pyvmm.cli:serve", "raise ValueError('old')"),
            stdin=slave,
        )
        machine.expect(r"tick 2\r\n")
        assert termios.tcgetattr(slave) != before
        assert update(machine) == ""
        raw = termios.tcgetattr(slave)
        assert raw != before
        assert "ValueError" in update(
            machine, replaced(machine, "pyvmm.cli:serve", "raise ValueError")
        )
        assert termios.tcgetattr(slave) == raw
        (machine.folder / "armed").touch()
        send_update(machine, replaced(machine, "pyvmm.cli:serve", "raise ValueError('new')"))
        assert machine.wait_exit() != 0
        wait_until(lambda: not list(others_at_work(machine.folder)), "the end of the other tries")
        assert termios.tcgetattr(slave) == before
    finally:
        os.close(master)
        os.close(slave)


# ---- signals and quit at each step: the update is finished or undone, then the VMM ends -----


@pytest.mark.parametrize(
    ("step", "is_plain"),
    [(step, False) for step in (*OLD, "os:execve")] + [(step, True) for step in OLD_PLAIN],
)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_in_the_old_image(ticker, step, is_plain, number):
    fault = f"import os; os.kill(os.getpid(), {number:d})"
    machine = ticker(program=armed(step, fault))
    if is_plain:
        machine.plain()
    (machine.folder / "armed").touch()
    send_update(machine)
    assert machine.wait_exit() == 128 + number
    assert machine.stderr().count("Traceback") == 0


@pytest.mark.parametrize(
    ("step", "is_plain"),
    [(step, False) for step in (*NEW, *NEW_RUNNING)] + [(step, True) for step in NEW_PLAIN],
)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_in_the_new_image(ticker, step, is_plain, number):
    fault = f"import os; os.kill(os.getpid(), {number:d})"
    machine = ticker()
    if is_plain:
        machine.plain()
    send_update(machine, replaced(machine, step, fault))
    assert machine.wait_exit() == 128 + number
    assert machine.stderr() == ""


def test_signal_while_the_interpreter_starts(ticker):
    # Before any handler is there: it waits.
    machine = ticker()
    launcher = machine.folder / "launcher.sh"
    launcher.write_text(
        f'#!/bin/sh\n[ "$PYVMM_CPR_PROBE" ] || kill -TERM $$\nexec {pyvmm_command()} "$@"\n'
    )
    launcher.chmod(0o755)
    send_update(machine, [str(launcher), "run", *options(machine)])
    assert machine.wait_exit() == 128 + signal.SIGTERM


def test_signal_and_rollback(ticker):
    machine = ticker()
    fault = "import os; os.kill(os.getpid(), 15); raise ValueError('and more')"
    send_update(machine, replaced(machine, "pyvmm.kvm.carrier:Takeover.take", fault))
    assert machine.wait_exit() == 128 + signal.SIGTERM


def test_signals_are_not_blocked_afterwards(ticker):
    machine = ticker()
    assert "ValueError" in update(machine, replaced(machine, "pyvmm.cli:serve", "raise ValueError"))
    check_alive(machine)
    status = Path(f"/proc/{machine.pid}/status").read_text()
    fields = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
    assert int(fields["SigBlk"], 16) == 0
    machine.kill(signal.SIGTERM)
    assert machine.wait_exit() == 128 + signal.SIGTERM


@pytest.mark.parametrize("kick", ["blocked", "ignored", "pending"])
def test_inherited_signal_state(ticker, kick):
    # Masks, ignored and pending signals go through an exec; the vCPUs must stay kickable.
    fault = {
        "blocked": "import signal as s; s.pthread_sigmask(s.SIG_BLOCK, {s.SIGURG})",
        "ignored": "import signal as s; s.signal(s.SIGURG, s.SIG_IGN)",
        "pending": "import signal as s, os; s.pthread_sigmask(s.SIG_BLOCK, {s.SIGURG}); "
        "os.kill(os.getpid(), s.SIGURG)",
    }[kick]
    machine = ticker()
    assert update(machine, replaced(machine, "pyvmm:", fault)) == ""
    for _ in range(10):
        assert machine.hmp("stop") == ""
        assert machine.hmp("cont") == ""
    check_alive(machine)


@pytest.mark.parametrize("delay", range(6))
def test_quit_right_behind_an_update(ticker, delay):
    machine = ticker()
    send_update(machine)
    for _ in range(delay):
        machine.hmp_send("info status")
    machine.hmp_send("quit")
    assert machine.wait_exit() == 0


# ---- the guest's own end -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("typed", "arguments", "end"),
    [
        ("poweroff", (), 0),
        ("reset", ("-no-reboot",), 0),
        ("triplefault", ("-no-reboot",), 0),
        ("exit 5", ("-device", "isa-debug-exit,iobase=0xf4"), 11),
        ("panic", ("-device", "pvpanic", "-action", "panic=exit-failure"), 1),
    ],
)
@pytest.mark.parametrize("first", ["guest", "update"])
def test_end_of_the_guest_races_with_an_update(vm, typed, arguments, end, first):
    machine = vm(*arguments)
    machine.expect("guest> ")
    if first == "guest":
        machine.type(f"{typed}\n")
        send_update(machine)
    else:
        send_update(machine)
        machine.type(f"{typed}\n")
    assert machine.wait_exit() == end


@pytest.mark.parametrize("typed", ["reset", "triplefault"])
def test_reset_races_with_an_update(vm, typed):
    machine = vm()
    for _ in range(6):
        machine.expect("guest> ")
        machine.type(f"{typed}\n")
        update(machine)
    machine.expect("guest> ")
    wait_until(lambda: machine.status == "running", "the guest")
    assert machine.shell("echo on") == "on\n"


@pytest.mark.parametrize(
    ("asked", "code"),
    [
        ("request_power_off", 0),
        ("request_exit", 9),
    ],
)
def test_end_of_the_guest_right_before_the_pause(ticker, asked, code):
    """What the guest asks for in its last moments counts."""
    argument = "" if code == 0 else "9"
    fault = (
        "import gc\n"
        "m = next(o for o in gc.get_objects() if type(o).__name__ == 'Machine')\n"
        f"m.end.{asked}({argument})"
    )
    machine = ticker(program=armed("pyvmm.machine.machine:Machine.drain", fault))
    (machine.folder / "armed").touch()
    send_update(machine)
    assert machine.wait_exit() == code


@pytest.mark.parametrize(
    ("prepare", "arguments", "status"),
    [
        (["stop"], (), "paused"),
        ([], ("-S",), "paused (prelaunch)"),
        (["poweroff"], ("-no-shutdown",), "paused (shutdown)"),
        (["panic"], ("-device", "pvpanic", "-action", "panic=pause"), "paused (guest-panicked)"),
    ],
    ids=["paused", "prelaunch", "shutdown", "guest-panicked"],
)
def test_state_is_kept(vm, prepare, arguments, status):
    machine = vm(*arguments)
    if "-S" not in arguments:
        machine.expect("guest> ")
    for command in prepare:
        if command == "stop":
            machine.hmp(command)
        else:
            machine.type(f"{command}\n")
    machine.wait_status(status)
    for _ in range(2):
        assert update(machine) == ""
        assert machine.status == status
    # And over an update that fails on either side of the exec.
    command = replaced(machine, "pyvmm.devices.rtc:Rtc.load", "raise ValueError('injected')")
    assert "ValueError: injected" in update(machine, command)
    assert machine.status == status
    program = machine.folder / "program"
    program.write_text(f'#!/bin/sh\nrm "$0"\nexec {pyvmm_command()} "$@"\n')
    program.chmod(0o755)
    assert "No such file" in update(machine, [str(program), "run", *options(machine)])
    assert machine.status == status
    if status in ("paused", "paused (prelaunch)"):
        assert machine.hmp("cont") == ""
        if prepare:
            machine.type("echo on\n")
            machine.expect("\non\r\n")
        else:
            machine.expect("guest> ")


def test_paused_and_continued_in_the_preflight(ticker):
    machine = ticker()
    machine.hmp("update -d")
    machine.hmp_send("stop")
    machine.hmp_send("cont")
    machine.hmp_reply(), machine.hmp_reply()
    wait_until(lambda: "completed" in machine.hmp("info migrate"), "the end of the update")
    check_alive(machine)


def test_lost_client_of_a_rollback(ticker):
    # The client that waits for the update's end goes away meanwhile.
    machine = ticker(*QMP)
    with Qmp(machine.folder / "qmp.sock") as qmp:
        command = replaced(machine, "pyvmm.cli:serve", "raise ValueError('alone')")
        qmp.send({"execute": "update", "arguments": {"command": command}})
    wait_until(lambda: "ValueError: alone" in machine.hmp("info migrate"), "the rollback")
    check_ticking(machine)
    check_alive(machine)
