"""The way back after the exec: the new image hands everything to the old one again.

The CPR state names the old command and carries a descriptor of the old executable. As long
as the guest has not run, the state and the guest's memory are untouched, so an image that
cannot take over (any exception, or a deadline that passed) executes the old command with the
same state and the same descriptors. Once: an old image that fails too has nowhere to go.
"""

from __future__ import annotations

import os
import sys

from pyvmm._util import log
from pyvmm.cpr import state as cpr_state
from pyvmm.errors import PyvmmError, place

TYPE_CHECKING = False
if TYPE_CHECKING:
    import signal as _signal

    from pyvmm.cpr.fdstore import FdStore
    from pyvmm.cpr.state import CprState
else:
    import _signal  # what signal wraps in enums, at the cost of importing enum

EXE_FD = "cpr/exe"
COMMAND = "rollback/command"
ERROR = "rollback/error"
WHERE = "rollback/where"
DEADLINE_S = 10.0
REPEAT_S = 1.0  # should something have swallowed the first alarm

# What would end the new image before it can end in order; they wait until it can.
_DEFERRED = (_signal.SIGINT, _signal.SIGTERM, _signal.SIGHUP)


class DeadlineError(PyvmmError):
    """The new image took too long to take over."""


def own_command(incoming: str) -> list[str]:
    """The command that this process was started with, made to load its state.

    Without -S: whether the guest runs is part of the state.

    :param incoming: URI of the state; replaces an earlier one
    """
    # Not with this module: a new image opens its way back before it imports that much.
    from pyvmm.machine.options import OPTIONS

    words = list(sys.orig_argv)
    start = words.index("run") + 1 if "run" in words else len(words)
    kept = words[:start]
    rest = iter(words[start:])
    for word in rest:
        name = word.lstrip("-")
        argument = [next(rest, "")] if OPTIONS[name][0] else []
        if name not in ("incoming", "S"):
            kept += [word, *argument]
    return [*kept, "-incoming", incoming]


def arm(fds: FdStore, incoming: str) -> dict[str, bytes]:
    """In the old image: what the new one needs for the way back, as CPR values."""
    fds.keep(EXE_FD, os.open("/proc/self/exe", os.O_RDONLY | os.O_CLOEXEC))
    # The timer goes on through the exec, and kills an image that does not handle it.
    _signal.setitimer(_signal.ITIMER_REAL, DEADLINE_S, REPEAT_S)
    _signal.pthread_sigmask(_signal.SIG_BLOCK, _DEFERRED)
    return {COMMAND: "\0".join(own_command(incoming)).encode("utf-8", "surrogateescape")}


def disarm(fds: FdStore) -> None:
    """In the old image: undo :func:`arm`, after an exec that failed."""
    _signal.setitimer(_signal.ITIMER_REAL, 0)
    _signal.pthread_sigmask(_signal.SIG_UNBLOCK, _DEFERRED)
    exe = fds.kept().get((EXE_FD, 0))
    if exe is not None:
        fds.forget(EXE_FD)
        os.close(exe)


class WayBack:
    """In the new image: the way back, open until :meth:`close`.

    :param carried: the CPR state as it was inherited
    """

    def __init__(self, carried: CprState) -> None:
        self._carried: CprState | None = carried
        _signal.signal(_signal.SIGALRM, self._handle_alarm)

    def close(self) -> None:
        """The guest runs, and changes its memory: there is no way back any more."""
        self.stop_timer()
        self._carried = None

    def stop_timer(self) -> None:
        """Take as long as it takes (somebody types where the state is)."""
        _signal.setitimer(_signal.ITIMER_REAL, 0)

    def attempt(self, error: BaseException) -> None:
        """Execute the old command on the untouched state; returns only if that cannot be.

        :param error: why this image cannot take over
        """
        carried = self._carried
        self.stop_timer()
        if carried is None or COMMAND not in carried.values:
            return
        text = str(error) if isinstance(error, PyvmmError) else f"{type(error).__name__}: {error}"
        # Without the command: if the old image fails too, it does not come back here.
        values = {name: value for name, value in carried.values.items() if name != COMMAND}
        values[ERROR] = text.encode("utf-8", "replace")
        values[WHERE] = place(error).encode("utf-8", "replace")
        command = carried.values[COMMAND].decode("utf-8", "surrogateescape").split("\0")
        try:
            state_fd = cpr_state.publish(carried.fds, values)
            for fd in (state_fd, *carried.fds.values()):
                os.set_inheritable(fd, True)
            environment = os.environ | {cpr_state.ENVIRONMENT: str(state_fd)}
            os.execve(carried.fds[(EXE_FD, 0)], command, environment)
        except (OSError, KeyError) as problem:
            log.say(f"the way back failed too: {problem}")

    def _handle_alarm(self, _number: int, _frame: object) -> None:
        raise DeadlineError(f"the new image did not take over within {DEADLINE_S:.0f} s")
