"""The command under test, deadlines, and what /proc tells about a process."""

import contextlib
import ctypes
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
#: What the tasks are called that run a guest while its process executes the next image.
CARRIER = "pyvmm-carrier"
#: In the environment of an update's probe alone.
PROBE = b"PYVMM_CPR_PROBE="
PR_SET_CHILD_SUBREAPER = 36
WALL = 0x40000000  # waitid(2): children of clone that send no signal, too


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


def probes(pid):
    """Those of the child processes that are probes of an update: they execute its command."""
    found = []
    for child in children(pid):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            if PROBE in Path(f"/proc/{child}/environ").read_bytes():
                found.append(child)
    return found


def others_at_work(folder):
    """Id and name of each process that works in a folder, this one left out."""
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if int(entry.name) != os.getpid() and os.readlink(entry / "cwd") == str(folder):
                yield int(entry.name), (entry / "comm").read_text().strip()


def carriers(folder):
    """Ids of the carriers of the VM whose folder that is, which may have lost its process."""
    return [pid for pid, name in others_at_work(folder) if name == CARRIER]


def mappers(inode):
    """Ids of the processes whose memory has the file of that inode in it, of guest RAM, say; this
    one left out. One that ended and was not waited for has no memory."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            lines = (entry / "maps").read_text().splitlines()
            is_other = int(entry.name) != os.getpid()
            if is_other and any(line.split(maxsplit=5)[4] == str(inode) for line in lines):
                found.append(int(entry.name))
    return found


def kill(pid):
    """Kill a process, which may have ended."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def adopt_orphans(adopt):
    """Whether processes whose parent ends become children of this one."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_CHILD_SUBREAPER, int(adopt), 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl")


class Adopted:
    """A process that a child has started, with the methods of subprocess.Popen that are in use
    here. To have its exit code, this process must adopt orphans."""

    def __init__(self, pid):
        self.pid = pid
        self.returncode = None
        self._fd = os.pidfd_open(pid)

    def poll(self):
        if self.returncode is None and select.select([self._fd], [], [], 0)[0]:
            self.wait()
        return self.returncode

    def wait(self, timeout=DEADLINE_S):
        if self.returncode is None:
            if not select.select([self._fd], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(f"process {self.pid}", timeout)
            # Its parent may be just about to end.
            result = wait_until(self._reap, f"the exit code of {self.pid}", timeout)
            self.returncode = result.si_status
            if result.si_code != os.CLD_EXITED:
                self.returncode = -result.si_status
            os.close(self._fd)
        return self.returncode

    def kill(self):
        signal.pidfd_send_signal(self._fd, signal.SIGKILL)

    def _reap(self):
        with contextlib.suppress(ChildProcessError):
            return os.waitid(os.P_PIDFD, self._fd, os.WEXITED | WALL)


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
