"""What tests of the rescue share: a guest that is back in the old image, and what holds then."""

import json
import os
from pathlib import Path

from faults.tools import BACK, TICKER, check_alive, options, send_update
from harness import process, run_cli, wait_until
from harness import pyvmm as pyvmm_command

from pyvmm import cli, wayback

COUNTER = 0x200000  # where the built-in guest counts
NAMED = ("-name", "victim")
KILL = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
BLOCK = "import signal as s; s.pthread_sigmask(s.SIG_BLOCK, s.valid_signals())"
#: Ends the carrier of the process that executes it.
KILL_CARRIER = """import os, pathlib
proc = pathlib.Path('/proc')
for thread in (proc / 'self/task').iterdir():
 for child in (thread / 'children').read_text().split():
  if (proc / child / 'comm').read_text() == 'pyvmm-carrier\\n':
   os.kill(int(child), 9)
   os.waitid(os.P_PID, int(child), os.WEXITED | os.WNOWAIT | 0x40000000)"""
#: Of the new image, until it asks the carrier for the guest.
STEPS = [
    "pyvmm:",
    "pyvmm.cli:serve",
    "pyvmm.machine.builder:add_devices",
    "pyvmm.kvm.vm:Vm.create_vcpu",
    "pyvmm.machine.machine:Machine.start",
    "pyvmm.devices.serial:Serial.load",
    "pyvmm.migration.savevm:apply",
    "pyvmm.machine.machine:Machine.await_cpus",
]
#: Append, vCPUs, what it prints, in steps of.
GUESTS = {
    "ticker": (TICKER, 1, "tick", 1),
    "ticker-4": (TICKER, 4, "tick", 1),
    "pit": (f"{TICKER} timer=pit irq=ioapic", 1, "tick", 1),
    "ports": ("piospin", 1, "piospin", 4096),
    "pingpong": ("pingpong", 2, "pingpong", 512),
    "torture": ("torture", 2, "torture", None),
}
#: An image's patience, and so the carrier's, of old images that shall not wait for long.
QUICK = ("pyvmm:", "import pyvmm.migration.rollback as r; r.DEADLINE_S = 1.5")


def own_words(machine):
    """The words that its image was started with, without where its state was."""
    words = machine.cmdline
    if "-incoming" in words:
        at = words.index("-incoming")
        words = words[:at] + words[at + 2 :]
    return words


def ram_inode(machine):
    """The inode of the guest's RAM."""
    return process.memfd(machine.pid, "pc.ram").stat().st_ino


def bring_back(machine, command=None):
    """Update to a ``command`` that dies, and follow the guest to where it is back; the dead image's
    exit code."""
    before, pid = own_words(machine), machine.pid
    send_update(machine, command)
    ended = machine.follow()
    reply = machine.hmp_reply()
    assert reply.startswith("Error: "), reply
    assert reply.endswith(f" {BACK}\n"), reply
    assert reply.removeprefix("Error: ").strip() in machine.hmp("info migrate")
    assert machine.pid != pid
    assert own_words(machine) == before
    return ended


def check_gone(machine, inode):
    """Nothing is left of a VM that ended, whatever it went through."""
    entry = Path(os.environ["XDG_RUNTIME_DIR"]) / "pyvmm" / machine.name
    wait_until(
        lambda: not process.mappers(inode) and not list(process.others_at_work(machine.folder)),
        "the end of all tasks with the guest's memory",
    )
    assert machine.name not in [row["name"] for row in listed()]
    assert not entry.exists()


def listed():
    """What ``pyvmm list --json`` shows."""
    done = run_cli("list", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    return json.loads(done.stdout)


def check_whole(machine, *line):
    """The guest goes on, the VM is found and can be updated, and nothing is left when it ends."""
    inode = ram_inode(machine)
    check_alive(machine, *line)
    machine.footprint()
    assert process.mappers(inode) == [machine.pid]
    (row,) = [row for row in listed() if row["name"] == machine.name]
    assert (row["pid"], row["state"]) == (machine.pid, "running")
    assert machine.hmp_quit() == 0
    check_gone(machine, inode)


def wrapper(machine, script):
    """The machine's command by way of a shell script that does ``script`` in the update only."""
    text = f'#!/bin/sh\n[ "${cli.PROBE}" ] || {{ {script}; }}\nexec {pyvmm_command()} "$@"\n'
    path = machine.folder / "wrapper.sh"
    path.write_text(text)
    path.chmod(0o755)
    return [str(path), "run", *options(machine)]


def check_counting(counter):
    """The guest counts on."""
    before = counter[0]
    wait_until(lambda: counter[0] > before, "a higher count")


def check_told_lost(machine, inode):
    """The VMM ends at once with an error that says what became of the guest, and by what: it does
    not wait for its alarm."""
    assert machine.wait_exit(timeout=0.8 * wayback.DEADLINE_S) == 1
    lines = [line for line in machine.stderr().splitlines() if "lost" in line]
    assert lines, machine.stderr()
    assert "carrier" in lines[-1]
    assert "Traceback" not in machine.stderr()
    check_gone(machine, inode)
