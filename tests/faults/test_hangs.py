"""The new image hangs before it has the guest, the host has no memory for it, or it is no program
after all: the guest, which ran all the time, is back in the old image."""

import os
import signal
import sys
from pathlib import Path

import pytest
from faults.rescue import BLOCK, NAMED, bring_back, check_counting, check_whole, wrapper
from faults.tools import BACK, check_updated, options, replaced, send_update
from harness import pyvmm as pyvmm_command
from harness import wait_until

pytestmark = pytest.mark.usefixtures("orphans")

HANGS = {
    # SIGALRM ends what does not handle it.
    "sleep": "exec sleep 600",
    "shell": "while :; do :; done",
    "deaf": "trap '' ALRM; exec sleep 600",
    "stopped": "kill -STOP $$",
}


@pytest.mark.parametrize("hang", HANGS)
def test_hangs_before_python(impatient, hang):
    machine, counter = impatient()
    send_update(machine, wrapper(machine, f"touch hangs; {HANGS[hang]}"))
    wait_until((machine.folder / "hangs").exists, "the new program")
    check_counting(counter)
    ended = machine.follow()
    assert ended in (-signal.SIGALRM, -signal.SIGKILL)
    assert BACK in machine.hmp_reply()
    check_counting(counter)
    check_updated(machine)
    check_counting(counter)


@pytest.mark.parametrize("smp", [1, 4])
@pytest.mark.parametrize("step", ["pyvmm:", "pyvmm.machine.machine:Machine.await_cpus"])
def test_hangs_in_python(impatient, step, smp):
    """Deaf to all but SIGKILL, which the carrier sends."""
    machine, counter = impatient(smp)
    fault = f"open('hangs', 'w').close(); {BLOCK}; import time; time.sleep(600)"
    send_update(machine, replaced(machine, step, fault))
    wait_until((machine.folder / "hangs").exists, "the new image")
    check_counting(counter)
    assert machine.follow() == -signal.SIGKILL
    assert BACK in machine.hmp_reply()
    check_counting(counter)
    check_updated(machine)
    check_counting(counter)


def test_hangs_where_the_alarm_is_heard(impatient):
    """It goes back by itself, and is the same process."""
    machine, counter = impatient()
    fault = "open('hangs', 'w').close(); import time; time.sleep(600)"
    pid = machine.pid
    send_update(machine, replaced(machine, "pyvmm.cli:serve", fault))
    wait_until((machine.folder / "hangs").exists, "the new image")
    check_counting(counter)
    assert BACK in machine.hmp_reply()
    assert machine.pid == pid
    check_counting(counter)
    check_updated(machine)


def test_no_address_space(ticker):
    """The limit goes through execs, so the old image does not start in this process either."""
    machine = ticker(*NAMED)
    bring_back(machine, wrapper(machine, "ulimit -v 40000"))
    limits = Path(f"/proc/{machine.pid}/limits").read_text()
    assert "Max address space         unlimited" in limits
    check_whole(machine)


def test_killed_for_want_of_memory(ticker, memory_group):
    machine = ticker(*NAMED)
    command = wrapper(machine, f"echo $$ > {memory_group}/cgroup.procs")
    assert bring_back(machine, command) == -signal.SIGKILL
    check_whole(machine)


ELF = os.path.realpath("/bin/sh")
PROGRAMS = {
    # execve gives no error for it: the process dies on its way into the program.
    "cut": f"data = open({ELF!r}, 'rb').read()\nwrite(data[:len(data) // 2])",
    "crashes": "write(b'#!/bin/sh\\nkill -SEGV $$\\n')",
    "ends": "write(b'#!/bin/sh\\nexit 3\\n')",
    "succeeds": "write(b'#!/bin/sh\\n')",
    "asks nobody": f"write(b'#!{sys.executable} -I\\nimport os\\nos._exit(4)\\n')",
}


@pytest.mark.parametrize("program", PROGRAMS)
def test_program_replaced_after_the_preflight(ticker, program):
    machine = ticker(*NAMED)
    path = machine.folder / "program"
    # The environment's python: the one that it links to may have no cffi.
    path.write_text(
        f"#!{Path(pyvmm_command()).with_name('python')}\n"
        "import os, sys\n"
        "from pyvmm import cli\n"
        "code = cli.main()\n"
        "def write(data):\n"
        " os.unlink(sys.argv[0])\n"
        " open(sys.argv[0], 'wb').write(data)\n"
        " os.chmod(sys.argv[0], 0o755)\n"
        f"{PROGRAMS[program]}\n"
        "os._exit(code)\n"
    )
    path.chmod(0o755)
    bring_back(machine, [str(path), "run", *options(machine)])
    check_whole(machine)
