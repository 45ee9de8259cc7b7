"""The processes that a probe started, found by a variable of its environment.

Its process group ends with it in any case; this finds what has left the group, too, on a host
whose /proc is there. Main loop thread, guest running: it takes a millisecond or two for a hundred
processes.
"""

from __future__ import annotations

import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    import signal as _signal
    from collections.abc import Iterable
else:
    import _signal  # what signal wraps in enums, at the cost of importing enum

# What is killed may just be starting others.
_ROUNDS = 8


def find(mark: bytes) -> list[int]:
    """Return the ids of the processes that have ``mark`` in their environment."""
    try:
        names = os.listdir("/proc")
    except OSError:
        return []
    return [int(name) for name in names if name.isdecimal() and _has(int(name), mark)]


def kill(mark: bytes) -> None:
    """Kill the processes that :func:`find` finds."""
    for _ in range(_ROUNDS):
        found = find(mark)
        for pid in found:
            try:
                fd = os.pidfd_open(pid)
                try:
                    # The number may be another's since it was looked at.
                    if _has(pid, mark):
                        _signal.pidfd_send_signal(fd, _signal.SIGKILL)
                finally:
                    os.close(fd)
            except OSError:
                pass
        if not found:
            return


def holder(mark: bytes, file: int, fds: Iterable[int]) -> int | None:
    """Return the id of a process with ``mark`` that has the file behind our descriptor ``file``
    open under one of the numbers ``fds``; None if there is none."""
    status = os.fstat(file)
    for pid in find(mark):
        for fd in fds:
            try:
                if os.path.samestat(os.stat(f"/proc/{pid}/fd/{fd}"), status):
                    return pid
            except OSError:
                pass
    return None


def _has(pid: int, mark: bytes) -> bool:
    # Empty for those that have ended, and not to be read of other users' processes.
    try:
        with open(f"/proc/{pid}/environ", "rb", buffering=0) as file:
            return mark in file.read()
    except OSError:
        return False
