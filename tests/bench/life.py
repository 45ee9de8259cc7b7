"""A process from its start to its end: seconds, seconds of processor time, and peak memory.

As a program: ``life.py COMMAND...`` runs the command, whose output nobody reads, and prints what
it took as JSON. A program of its own, and a small one, because Linux counts into a process's peak
what its parent had when it was started.
"""

import json
import os
import subprocess
import sys
import time

TIMEOUT_S = 60.0


class Life:
    """What one process took.

    :ivar wall_ms: from its spawn until it was waited for
    :ivar processor_ms: of it, in user space and in the kernel
    :ivar peak_mib: the most that was resident, guest memory counted
    :ivar code: what it exited with, negative: the signal that ended it
    """

    def __init__(self, wall_ms, processor_ms, peak_mib, code):
        self.wall_ms = wall_ms
        self.processor_ms = processor_ms
        self.peak_mib = peak_mib
        self.code = code

    @classmethod
    def of(cls, command, environment):
        """Run a command to its end; what it took."""
        watcher = [sys.executable, "-I", "-S", __file__, *command]
        done = subprocess.run(
            watcher, env=environment, stdout=subprocess.PIPE, check=True, timeout=TIMEOUT_S
        )
        return cls(*json.loads(done.stdout))


def _watch(command):
    null = [(os.POSIX_SPAWN_OPEN, fd, os.devnull, os.O_RDWR, 0) for fd in range(3)]
    start = time.monotonic_ns()
    pid = os.posix_spawnp(command[0], command, os.environ, file_actions=null)
    _, status, used = os.wait4(pid, 0)
    wall_ms = (time.monotonic_ns() - start) / 1e6
    code = os.waitstatus_to_exitcode(status)
    return wall_ms, (used.ru_utime + used.ru_stime) * 1e3, used.ru_maxrss / 1024, code


if __name__ == "__main__":
    print(json.dumps(_watch(sys.argv[1:])))
