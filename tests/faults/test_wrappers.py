"""Update commands that reach pyvmm by way of another program.

Those that become it are fine. The others would leave the guest in a process that is not the
VM's, or a new image that does not find what it takes over; the preflight tells them apart.
"""

import os
import sys
import time

import pytest
from faults.tools import QMP, check_alive, check_refused, strangers, update
from harness import run_cli, wait_until

PYTHON = sys.executable
EXECV = "import os, sys; {}; os.execvp(sys.argv[1], sys.argv[1:])"
RUN = "import subprocess, sys; sys.exit(subprocess.run(sys.argv[1:]{}).returncode)"


def sh(script):
    return ["sh", "-c", script, "sh"]


@pytest.mark.parametrize(
    "wrapper",
    [
        ["env"],
        ["nice"],
        ["nohup"],
        ["taskset", "3"],
        ["setpriv", "--nnp"],
        sh('exec "$@"'),
        sh('cd . && exec env A=b nice "$@" 2>/dev/null'),
        [PYTHON, "-c", EXECV.format("os.environ['A'] = 'b'")],
    ],
    ids=lambda words: " ".join(words)[:40],
)
def test_that_becomes_pyvmm(ticker, wrapper):
    machine = ticker()
    assert update(machine, [*wrapper, *machine.argv]) == ""
    check_alive(machine)


CHILD = "does not become pyvmm: another process.*exec"
LOST = "lacks the environment"
CLOSED = "descriptor"


@pytest.mark.parametrize(
    ("wrapper", "why"),
    [
        (sh('"$@"; echo'), CHILD),
        (sh('"$@" & wait'), CHILD),
        (sh('"$@"; sleep 600'), CHILD),
        (sh('("$@"; echo) | cat'), CHILD),
        (["timeout", "600"], CHILD),
        (["setsid", "--wait"], CHILD),
        (["setsid"], f"{CHILD}|without answering"),
        (["unshare", "--fork"], CHILD),
        (["unshare", "--fork", "--pid"], CHILD),
        (["unshare", "--fork", "--pid", "--mount-proc"], CHILD),
        (["unshare", "--fork", "--pid", "--mount", *sh('umount -l /proc; exec "$@"')], CHILD),
        (["strace", "-o", "/dev/null"], CHILD),
        ([PYTHON, "-c", RUN.format(", close_fds=False")], CHILD),
        ([PYTHON, "-c", RUN.format("")], CLOSED),
        ([PYTHON, "-c", RUN.format(", env={}")], LOST),
        ([PYTHON, "-c", RUN.format(", env={}, close_fds=False, stderr=-3")], CHILD),
        (["env", "-i"], LOST),
        (["env", "-u", "PYVMM_CPR_PROBE"], LOST),
        (["setsid", "--wait", "env", "-i"], CHILD),
        (sh('exec env -i "$@" 2>/dev/null'), LOST),
        (sh('exec 3>&-; exec "$@"'), CLOSED),
        (sh('exec 4>&-; exec "$@"'), CLOSED),
        (sh('exec 4>/dev/null; exec "$@"'), CLOSED),
        ([PYTHON, "-c", EXECV.format("os.closerange(4, 256)")], CLOSED),
        ([PYTHON, "-c", EXECV.format("os.closerange(3, 256)")], CLOSED),
        (sh('sleep 600 & exec "$@"'), "would inherit the guest's memory"),
        (sh('setsid setsid sleep 600 & exec "$@"'), "would inherit the guest's memory"),
        (sh('ulimit -n 24; exec "$@"'), "Too many open files.*descriptors.*ulimit -n"),
        (["unshare", "--pid"], "threads"),
    ],
    ids=lambda value: " ".join(value)[-60:] if isinstance(value, list) else "",
)
def test_that_does_not(ticker, wrapper, why):
    machine = ticker(*QMP, "-serial", "file:log")
    (machine.folder / "log").write_text("not truncated")
    files = sorted(os.listdir(machine.folder))
    began = time.monotonic()
    check_refused(machine, [*wrapper, *machine.argv], why)
    assert time.monotonic() - began < 15
    assert sorted(os.listdir(machine.folder)) == files
    assert (machine.folder / "log").read_text() == "not truncated"
    wait_until(lambda: not strangers(machine), "the end of all that the preflight started")


@pytest.mark.parametrize(
    ("uri", "why"),
    [("memfd:", "no state was handed over"), ("file:none", "No such file or directory")],
)
def test_state_that_is_not_there(tmp_path, uri, why):
    """A process of its own sees that before it opens anything: a wrapper may close it all."""
    (tmp_path / "log").write_text("not truncated")
    options = ("-serial", "file:log", "-monitor", "none", "-incoming", uri)
    done = run_cli("run", *options, cwd=tmp_path)
    assert done.returncode == 1
    assert why in done.stderr
    assert (tmp_path / "log").read_text() == "not truncated"
