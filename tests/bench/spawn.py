"""How long a command takes from its start to what it prints."""

import os
import select
import time

from harness.process import environment

from bench.machines import BenchError

TIMEOUT_S = 30.0


def first_output(command, wanted=b"", timeout=TIMEOUT_S, *, errors=False, **changes):
    """Start ``command``, wait until it has printed ``wanted`` (default: anything), and end it.

    :param errors: whether its standard error counts, too
    :param changes: of its environment
    :return: seconds from the start, and what was printed until then
    :raises BenchError: it ends before, or does not get there in time
    """
    read_fd, write_fd = os.pipe()
    actions = [
        (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
        (os.POSIX_SPAWN_DUP2, write_fd, 1),
        *([(os.POSIX_SPAWN_DUP2, write_fd, 2)] if errors else []),
        (os.POSIX_SPAWN_CLOSE, read_fd),
        (os.POSIX_SPAWN_CLOSE, write_fd),
    ]
    own = environment(**changes)
    start = time.monotonic_ns()
    pid = os.posix_spawnp(command[0], command, own, file_actions=actions)
    os.close(write_fd)
    output = b""
    try:
        while not output or wanted not in output:
            left = timeout - (time.monotonic_ns() - start) / 1e9
            if left <= 0 or not select.select([read_fd], [], [], left)[0]:
                raise BenchError(f"{command[0]}: no {wanted!r} within {timeout:.0f} s: {output!r}")
            data = os.read(read_fd, 65536)
            if not data:
                raise BenchError(f"{command[0]} ended without {wanted!r}: {output!r}")
            output += data
        return (time.monotonic_ns() - start) / 1e9, output
    finally:
        os.close(read_fd)
        os.kill(pid, 9)
        os.waitpid(pid, 0)
