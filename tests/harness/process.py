"""The command under test, deadlines, and what /proc tells about a process."""

import contextlib
import os
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

#: How long anything may take on a loaded host; nothing here measures speed. An emulated machine
#: needs longer.
DEADLINE_S = float(os.environ.get("PYVMM_TEST_DEADLINE", "30"))
POLL_S = 0.005


def pyvmm():
    """Path of the command: PYVMM, or what was installed beside the running interpreter."""
    if "PYVMM" in os.environ:
        return os.environ["PYVMM"]
    beside = Path(sys.executable).parent / "pyvmm"
    found = str(beside) if beside.exists() else shutil.which("pyvmm")
    assert found, "pyvmm is not installed; make build"
    return found


def environment(**changes):
    """The environment for the command: byte code is cached whatever the caller's says."""
    return os.environ | {"PYTHONDONTWRITEBYTECODE": ""} | changes


def run_cli(*arguments, timeout=DEADLINE_S, cwd=None, stdin=subprocess.DEVNULL, **changes):
    """Run ``pyvmm ARGUMENTS`` to its end; a CompletedProcess with text."""
    return subprocess.run(
        [pyvmm(), *arguments],
        cwd=cwd,
        stdin=stdin,
        capture_output=True,
        text=True,
        timeout=timeout,
        env=environment(**changes),
    )


def end_session(child):
    """End what a pexpect.spawn started, which itself waits a tenth of a second for that and then
    raises an error.
    """
    if child.isalive():
        child.kill(signal.SIGKILL)
        child.wait()
    child.close()


class Deadline:
    """A point in time that everything on the way to it counts against."""

    def __init__(self, seconds=DEADLINE_S):
        self._end = time.monotonic() + seconds

    @property
    def left(self):
        """Seconds that are left, never negative."""
        return max(0.0, self._end - time.monotonic())

    @property
    def over(self):
        return time.monotonic() >= self._end


def wait_until(condition, what, timeout=DEADLINE_S):
    """Poll until ``condition()`` is true, for what has no descriptor to wait on; its value."""
    deadline = Deadline(timeout)
    while not (value := condition()):
        assert not deadline.over, f"not within {timeout} s: {what}"
        select.select([], [], [], POLL_S)
    return value


def cmdline(pid):
    """The words that the present image of a process was started with."""
    return Path(f"/proc/{pid}/cmdline").read_bytes().decode().rstrip("\0").split("\0")


def _each(folder, read):
    # What goes away between being listed and being looked at is not there.
    for entry in Path(folder).iterdir():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            yield entry.name, read(entry)


def descriptors(pid):
    """The open descriptors of a process, or of "self": number -> link target."""
    return {int(name): target for name, target in _each(f"/proc/{pid}/fd", os.readlink)}


def memfd(pid, name):
    """Path by which a process's memfd of that name can be opened."""
    target = f"/memfd:{name} "
    fd = next(fd for fd, found in descriptors(pid).items() if found.startswith(target))
    return Path(f"/proc/{pid}/fd/{fd}")


def fds(pid):
    """Sorted link targets of the open descriptors, numbers that change at will masked."""
    targets = []
    for target in descriptors(pid).values():
        target = re.sub(r"^(socket|pipe):\[\d+\]$", r"\1", target)
        target = re.sub(r"/vm-\d+/lock$", "/vm-N/lock", target)
        targets.append(re.sub(r"^/dev/pts/\d+$", "/dev/pts/N", target))
    return sorted(targets)


def threads(pid):
    """Sorted names of the threads."""
    tasks = _each(f"/proc/{pid}/task", lambda task: (task / "comm").read_text().strip())
    return sorted(name for _, name in tasks)


def children(pid):
    """Ids of the child processes, those not waited for yet among them."""
    tasks = _each(f"/proc/{pid}/task", lambda task: (task / "children").read_text().split())
    return [int(child) for _, ids in tasks for child in ids]


def memory_kib(pid, kind="Pss", ram_names=("/memfd:",)):
    """How much memory a process has beside guest RAM, in KiB.

    :param kind: a line of smaps: ``Pss`` shares what is shared among its users; ``Anonymous``
        does not depend on what other processes run
    :param ram_names: what the paths of the mappings of guest RAM begin with
    """
    total, is_ram = 0, False
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        words = line.split()
        if "-" in words[0]:
            is_ram = len(words) > 5 and words[5].startswith(tuple(ram_names))
        elif words[0] == f"{kind}:" and not is_ram:
            total += int(words[1])
    return total
