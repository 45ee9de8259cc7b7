"""What a start imports before the guest's first instruction, and what a VM that ends at once leaves
out and leaves behind."""

import subprocess
import sys

import pytest
from bench.startup import END, EXIT_CODE, EXIT_PORT, rom
from harness import process

#: Modules of ours; each is some 0.15 ms of every start, and of a plain update's pause.
MOST_MODULES = 94

# Ends the process where the vCPUs' threads would be started, and names what was imported.
BEFORE_THE_GUEST = """
import os, sys
from pyvmm import cli
from pyvmm.machine.machine import Machine
def start(machine):
    os.write(1, " ".join(sys.modules).encode())
    os._exit(0)
Machine.start = start
cli.main()
"""
# Goes on only when the guest has ended, and names what was imported by the end.
BEHIND_THE_GUEST = """
import sys, time
from pyvmm import cli
from pyvmm.machine.machine import Machine
def start(machine, start=Machine.start):
    start(machine)
    while not machine.end.has_requests:
        time.sleep(0.001)
Machine.start = start
code = cli.main()
print(*sys.modules)
sys.exit(code)
"""


@pytest.fixture
def options(tmp_path, monkeypatch):
    """Options for a guest that ends the VM with its first instructions."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    image = tmp_path / "rom"
    image.write_bytes(rom(END))
    device = f"isa-debug-exit,iobase={EXIT_PORT},iosize=4"
    return ["-bios", str(image), "-device", device, "-serial", "null", "-monitor", "none"]


def imported(program, options):
    """Runs ``pyvmm run`` in a program that prints the names of modules; what it ended with, and
    those of ours."""
    command = [sys.executable, "-c", program, "run", *options]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=process.DEADLINE_S)
    names = {name for name in done.stdout.split() if name.startswith("pyvmm")}
    return done.returncode, names


def test_start_imports_few_modules(options):
    code, names = imported(BEFORE_THE_GUEST, options)
    assert code == 0
    assert "pyvmm.boot.loader" in names
    assert len(names) <= MOST_MODULES, "\n".join(sorted(names))


def test_guest_that_has_ended_waits_for_nothing_that_nobody_needs(options):
    code, names = imported(BEHIND_THE_GUEST, options)
    assert code == EXIT_CODE
    assert not names & {"pyvmm.monitor.server", "pyvmm.migration.outgoing", "pyvmm.machine.backing"}


@pytest.mark.parametrize("name", [[], ["-name", "brief"]])
def test_guest_that_ends_at_once_leaves_nothing(options, tmp_path, name):
    done = process.run_cli("run", *options, *name)
    assert (done.returncode, done.stdout, done.stderr) == (EXIT_CODE, "", "")
    assert [*tmp_path.glob("pyvmm/*")] == []


def test_output_that_nobody_takes_is_an_error_without_a_traceback():
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [process.pyvmm(), "--help"],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            env=process.environment(PYTHONUNBUFFERED=""),
        )
    assert (done.returncode, done.stderr) == (1, "")
