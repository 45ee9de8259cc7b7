"""The task that keeps the old address space: what it keeps, and that it ends."""

import gc
import os
import signal
from pathlib import Path

import pytest
from harness import process, wait_until

from pyvmm import _native
from pyvmm.errors import HostError

_WALL = 0x40000000


@pytest.mark.parametrize("count", [0, 62, 63, 64, 300])
def test_keeps_any_number_of_descriptors_and_no_others(count):
    kept = [os.memfd_create("kept") for _ in range(count)]
    other = os.memfd_create("other")
    read_fd, write_fd = os.pipe2(os.O_CLOEXEC)
    pid = _native.hold_memory(kept[::-1], read_fd)
    try:
        wait_until(lambda: other not in process.descriptors(pid), "the others closed")
        # The list is read by the task, whatever this process does to its memory meanwhile.
        gc.collect()
        assert list(process.descriptors(pid)) == sorted([*kept, read_fd])
    finally:
        os.close(write_fd)
        assert os.waitpid(pid, _WALL) == (pid, 0)
        for fd in (*kept, other, read_fd):
            os.close(fd)


def test_no_signal_reaches_it():
    before = status("self", "SigBlk")
    read_fd, write_fd = os.pipe2(os.O_CLOEXEC)
    pid = _native.hold_memory([], read_fd)
    try:
        assert status("self", "SigBlk") == before
        unblockable = {signal.SIGKILL, signal.SIGSTOP}
        blocked = int(status(pid, "SigBlk"), 16)
        assert blocked == (1 << 64) - 1 - sum(1 << number - 1 for number in unblockable)
        assert status(pid, "Threads") == "1"
    finally:
        os.close(write_fd)
        assert os.waitpid(pid, _WALL) == (pid, 0)
        os.close(read_fd)


def status(pid, name):
    """A line of a task's status, as the kernel tells it."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return dict(line.split(":\t", 1) for line in lines if ":\t" in line)[name]


def test_refused_by_the_host(monkeypatch):
    class Lib:
        def pyvmm_hold_memory(self, fds, count, release_fd):
            return -11

    monkeypatch.setattr(_native, "lib", Lib())
    with pytest.raises(HostError, match="Resource temporarily unavailable"):
        _native.hold_memory([0], 1)
