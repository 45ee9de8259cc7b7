"""Live update as its users see it: what goes on, what stays, and what may cross its way."""

import mmap
import os
import re
import shlex
import signal
import threading
from pathlib import Path

import pytest
from faults.tools import replaced
from harness import process, pyvmm, run_cli, wait_until

COUNTER = 0x200000
STATE = "file:vm.state"


class Watcher:
    """Maps guest RAM and looks, in a thread, whether the counter ever goes back."""

    def __init__(self, path):
        with open(path, "r+b") as file:
            self.inode = os.fstat(file.fileno()).st_ino
            self._ram = mmap.mmap(file.fileno(), 0)
        self.back = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()

    @property
    def value(self):
        return int.from_bytes(self._ram[COUNTER : COUNTER + 8], "little")

    def _watch(self):
        last = self.value
        while not self._stop.is_set():
            now = self.value
            if now < last:
                self.back.append((last, now))
            last = now
            self._stop.wait(0.0005)

    def close(self):
        self._stop.set()
        self._thread.join()
        self._ram.close()


@pytest.mark.parametrize("smp", [1, 2])
@pytest.mark.parametrize("backend", ["default", "memfd", "file", "ram"])
def test_counter_in_shared_memory_goes_on(vm, tmp_path, backend, smp):
    options = {
        "default": [],
        "memfd": ["-object", "memory-backend-memfd,id=ram0,size=64M"],
        "file": [
            "-object",
            f"memory-backend-file,id=ram0,size=64M,mem-path={tmp_path}/ram,share=on",
        ],
        "ram": ["-object", "memory-backend-ram,id=ram0,size=64M,share=on"],
    }[backend]
    machine = vm(*options, append="counter", smp=smp)
    machine.expect("counter ready")
    name = "pc.ram" if backend == "default" else "ram0"
    path = tmp_path / "ram" if backend == "file" else process.memfd(machine.pid, name)
    watcher = Watcher(path)
    try:
        for _ in range(5):
            before = watcher.value
            machine.update()
            wait_until(lambda: watcher.value > before, "a higher count")  # noqa: B023
    finally:
        watcher.close()
    assert watcher.back == []
    path = tmp_path / "ram" if backend == "file" else process.memfd(machine.pid, name)
    assert path.stat().st_ino == watcher.inode
    assert b"counter ready" in machine.serial[: machine.seen]
    assert machine.serial.count(b"counter ready") == 1


def test_console_input_arrives_once_whenever_it_is_typed(vm):
    machine = vm()
    machine.expect("guest> ")
    typed = 0
    for _ in range(8):
        machine.set_update(uri=STATE)
        machine.hmp_send(f"migrate {STATE}")
        while not machine.replied:
            # Typed at its own pace: each echo lets the next key go.
            text = f"echo {typed:x}"
            for key in text:
                machine.type(key)
                machine.expect(re.escape(key))
            machine.type("\n")
            machine.expect(rf"\r\n{typed:x}\r\nguest> ")
            typed += 1
        assert machine.hmp_reply() == ""
        assert "completed" in machine.hmp("info migrate")
    shown = re.findall(r"guest> echo ([0-9a-f]+)\r\n([0-9a-f]+)\r\n", machine.serial.decode())
    assert [int(echo, 16) for echo, _ in shown] == list(range(typed))
    assert all(echo == output for echo, output in shown)


def test_console_input_in_bulk_is_neither_lost_nor_doubled(vm):
    machine = vm()
    machine.expect("guest> ")
    for update in range(5):
        machine.set_update(uri=STATE)
        machine.hmp_send(f"migrate {STATE}")
        # More than the FIFO takes, and less than the guest keeps for later (256 bytes).
        words = [f"{update}{number:02}" for number in range(25)]
        machine.type("".join(f"echo {word}\n" for word in words))
        assert machine.hmp_reply() == ""
        for word in words:
            machine.expect(rf"{word}\r\n{word}\r\nguest> ")
    shown = re.findall(r"guest> echo (\d+)\r\n\1\r\n", machine.serial.decode())
    assert shown == [f"{update}{number:02}" for update in range(5) for number in range(25)]


def test_monitor_input_during_an_update_is_answered_afterwards(vm):
    machine = vm(append="ticker")
    machine.set_update(uri=STATE)
    machine.hmp_send(f"migrate {STATE}")
    machine.hmp_send("info status")
    machine.hmp_send("info version")
    assert machine.hmp_reply() == ""
    assert machine.hmp_reply() == "VM status: running\n"
    assert re.fullmatch(r"\d+\.\d+\.\d+.*\n", machine.hmp_reply())


def test_detached_migrate(vm):
    machine = vm(append="ticker period=20")
    machine.set_update(uri=STATE)
    assert machine.hmp(f"migrate -d {STATE}") == ""
    wait_until(lambda: "completed" in machine.hmp("info migrate"), "the update")
    machine.expect(r"tick \d+")
    assert machine.cmdline[-1] == STATE


def test_parameters_are_not_carried_over(vm):
    machine = vm(append="ticker")
    machine.update()
    assert "mode: normal" in machine.hmp("info migrate_parameters")
    assert "mode normal is not supported" in machine.hmp(f"migrate {STATE}")


def test_minus_s_in_the_command_pauses(vm):
    machine = vm("-S", append="ticker period=20")
    machine.hmp("cont")
    machine.expect(r"tick 1\b")
    machine.update()
    assert machine.status == "paused"
    ticks = len(machine.serial)
    machine.hmp("cont")
    wait_until(lambda: machine.status and len(machine.serial) > ticks, "a tick")


def test_update_verb_keeps_a_vm_running_that_began_with_minus_s(vm):
    machine = vm("-S", append="ticker period=20")
    machine.hmp("cont")
    machine.expect(r"tick 1\b")
    assert machine.hmp("update") == ""
    assert "completed" in machine.hmp("info migrate")
    ticks = len(machine.serial)
    wait_until(lambda: machine.status == "running" and len(machine.serial) > ticks, "a tick")


def test_update_right_from_the_first_instruction(vm):
    for _ in range(3):
        machine = vm(append="memhash mb=4", smp=2)
        machine.update()
        machine.update()
        machine.seen = len(machine.serial)
        machine.expect(r"memhash pass \d+ ok\r\n")
        assert b"FAIL" not in machine.serial


def test_state_file_with_an_offset(vm):
    machine = vm(append="ticker period=20")
    uri = "file:vm.state,offset=0x2000"
    machine.set_update(uri=uri)
    assert machine.hmp(f"migrate {uri}") == ""
    assert machine.status == "running"
    state = machine.folder / "vm.state"
    assert state.stat().st_mode & 0o777 == 0o600
    assert not any(state.read_bytes()[:0x2000])


def test_incoming_that_waits_for_its_uri(vm):
    machine = vm(append="ticker period=20")
    machine.set_update([*machine.argv, "-incoming", "defer"])
    assert machine.hmp(f"migrate {STATE}") == ""
    assert machine.status == "paused (inmigrate)"
    assert machine.hmp("migrate_incoming file:nowhere").startswith("Error: ")
    assert "Status: \t\tfailed" in machine.hmp("info migrate")
    assert machine.hmp(f"migrate_incoming {STATE}") == ""
    machine.wait_status("running")
    assert "nowhere" not in machine.hmp("info migrate")
    seen = len(machine.serial)
    wait_until(lambda: machine.status and len(machine.serial) > seen, "a tick")


def test_another_command_for_the_console(vm, tmp_path):
    """What the new command says about the host side holds from then on."""
    machine = vm(append="ticker period=10")
    log = tmp_path / "serial.log"
    words = list(machine.argv)
    words[words.index("chardev:serial")] = f"file:{log}"
    at = words.index("socket,id=serial,path=serial.sock")
    del words[at - 1 : at + 1]
    machine.set_update([*words, "-incoming", STATE])
    assert machine.hmp(f"migrate {STATE}") == ""
    wait_until(lambda: log.read_text().count("tick") >= 2, "ticks in the file")
    # The update may have come in the middle of a line.
    text = machine.serial.decode() + log.read_text()
    numbers = [int(number) for number in re.findall(r"tick (\d+)\r?\n", text)]
    assert numbers == list(range(1, len(numbers) + 1))
    assert "socket" in machine.fds()  # the monitor's


def test_environment_and_command_line_do_not_grow(vm):
    machine = vm(append="ticker")
    machine.update()
    environment = Path(f"/proc/{machine.pid}/environ").read_bytes()
    cmdline = machine.cmdline
    machine.update()
    assert len(machine.cmdline) == len(cmdline)
    names = [entry.split(b"=")[0] for entry in environment.split(b"\0")]
    again = Path(f"/proc/{machine.pid}/environ").read_bytes()
    assert names == [entry.split(b"=")[0] for entry in again.split(b"\0")]


@pytest.mark.parametrize("value", ["", "x", "0", "-1", "999", "2147483648", "9" * 400])
def test_nonsense_in_the_environment_is_refused(value):
    done = run_cli("run", "-m", "16M", "-append", "ticker passes=1", PYVMM_CPR_EXEC_STATE=value)
    assert done.returncode != 0 or value == "", done
    assert "Traceback" not in done.stderr
    assert len(done.stderr.splitlines()) <= 1


# ---- what crosses its way ------------------------------------------------------------------


def gated(machine, folder):
    """A command whose preflight lasts until somebody opens the gate, and the gate."""
    gate = folder / "gate"
    os.mkfifo(gate)
    script = folder / "gated"
    script.write_text(
        f'#!/bin/sh\n[ -z "$PYVMM_CPR_PROBE" ] || read line < {gate}\nexec {pyvmm()} "$@"\n'
    )
    script.chmod(0o755)
    return [str(script), *machine.argv[1:], "-incoming", STATE], gate


def test_second_update_is_refused_while_one_is_under_way(vm, tmp_path):
    machine = vm(append="ticker period=20")
    command, gate = gated(machine, tmp_path)
    machine.set_update(command)
    assert machine.hmp(f"migrate -d {STATE}") == ""
    for _ in range(3):
        assert "There's a migration process in progress" in machine.hmp(f"migrate {STATE}")
    assert "Status: \t\tsetup" in machine.hmp("info migrate")
    machine.expect(r"tick \d+")
    gate.write_text("go\n")
    wait_until(lambda: "completed" in machine.hmp("info migrate"), "the update")
    assert machine.cmdline[-1] == STATE


def test_cancelled_update(vm, tmp_path):
    machine = vm(append="ticker period=20")
    command, _ = gated(machine, tmp_path)
    machine.set_update(command)
    before = machine.footprint()
    assert machine.hmp(f"migrate -d {STATE}") == ""
    assert machine.hmp("migrate_cancel") == ""
    wait_until(lambda: "Status: \t\tcancelled" in machine.hmp("info migrate"), "the end")
    assert machine.footprint() == before
    machine.expect(r"tick \d+")
    machine.update()


@pytest.mark.parametrize("way", ["quit", "SIGTERM", "poweroff"])
def test_end_while_an_update_is_in_its_preflight(vm, tmp_path, way):
    machine = vm()
    machine.expect("guest> ")
    command, gate = gated(machine, tmp_path)
    machine.set_update(command)
    assert machine.hmp(f"migrate -d {STATE}") == ""
    wait_until(machine.probes, "the preflight")
    if way == "quit":
        assert machine.hmp_quit() == 0
    elif way == "SIGTERM":
        machine.kill(signal.SIGTERM)
        assert machine.wait_exit() == 128 + signal.SIGTERM
    else:
        machine.type("poweroff\n")
        assert machine.wait_exit() == 0
    assert machine.stderr() == ""
    # Whoever reads at the gate must not be left behind.
    with pytest.raises(OSError, match="No such device or address"):
        os.open(gate, os.O_WRONLY | os.O_NONBLOCK)


@pytest.mark.parametrize("command", ["poweroff", "exit 3"])
def test_guest_ends_while_it_is_updated(vm, command):
    machine = vm("-device", "isa-debug-exit,iobase=0xf4")
    machine.expect("guest> ")
    machine.set_update(uri=STATE)
    machine.hmp_send(f"migrate {STATE}")
    machine.type(f"{command}\n")
    assert machine.wait_exit() == {"poweroff": 0, "exit 3": 7}[command]
    assert "Traceback" not in machine.stderr()


@pytest.mark.parametrize("passes", range(1, 12, 2))
def test_guest_ends_at_any_moment_of_an_update(vm, passes):
    machine = vm("-S", append=f"ticker period=10 passes={passes * 2}")
    words = [word for word in machine.argv if word != "-S"]
    machine.set_update([*words, "-incoming", STATE])
    machine.hmp("cont")
    machine.hmp_send(f"migrate {STATE}")
    assert machine.wait_exit() == 0
    ticks = re.findall(r"tick (\d+)\r", machine.serial.decode())
    assert [int(tick) for tick in ticks] == list(range(1, passes * 2 + 1))
    assert "Traceback" not in machine.stderr()


def test_quit_right_behind_an_update(vm):
    machine = vm(append="ticker")
    machine.set_update(uri=STATE)
    machine.hmp_send(f"migrate -d {STATE}")
    machine.hmp_send("quit")
    assert machine.wait_exit() == 0
    assert "Traceback" not in machine.stderr()


def test_update_by_python_m(vm):
    import sys

    machine = vm(program=[sys.executable, "-m", "pyvmm", "run"], append="ticker period=20")
    machine.update()
    machine.expect(r"tick \d+")
    assert shlex.join(machine.cmdline).endswith("-incoming file:vm.state.0")


def test_devices_work_before_the_monitors_are_there(vm):
    # What the monitors need takes long to be imported: the guest's console does not wait for it.
    machine = vm()
    machine.expect("guest> ")
    slow = "import os, time; open('begun', 'w'); "
    slow += "[time.sleep(0.01) for _ in iter(lambda: os.path.exists('go-on'), True)]"
    command = replaced(machine, "pyvmm.monitor.front:Front._import", slow)
    machine.hmp_send(f"update {shlex.join(command)}")
    wait_until((machine.folder / "begun").exists, "the new image imports")
    assert machine.shell("echo x") == "x\n"
    assert not machine.replied
    (machine.folder / "go-on").touch()
    assert machine.hmp_reply() == ""
    assert machine.status == "running"


def test_monitors_are_there_though_the_thread_that_imports_ended(vm):
    machine = vm()
    machine.expect("guest> ")
    ends = "import threading as t; t.current_thread() is t.main_thread() or exit(3)"
    command = replaced(machine, "pyvmm.machine.cpu:import_ahead", ends)
    assert machine.hmp(f"update {shlex.join(command)}") == ""
    assert machine.status == "running"
    assert "SystemExit: 3" in machine.stderr()
