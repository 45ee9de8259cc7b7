"""The way back after the exec, as the old image prepares it, and the image before this version.

The CPR state names the old command and carries a descriptor of the old executable and of the
record that ``pyvmm.wayback`` reads. As long as the guest has not run, the state and the guest's
memory are untouched, so a new image that cannot take over executes the old command with the same
state and the same descriptors.
"""

from __future__ import annotations

import os
import sys

from pyvmm import wayback
from pyvmm.cpr import state as cpr_state
from pyvmm.cpr.state import ERROR, EXE_FD, RECORD_FD

TYPE_CHECKING = False
if TYPE_CHECKING:
    import signal as _signal

    from pyvmm.cpr.fdstore import FdStore
    from pyvmm.cpr.state import CprState
else:
    import _signal  # what signal wraps in enums, at the cost of importing enum

# For images before version 1 of the record, which went back by this value alone.
COMMAND = "rollback/command"
DEADLINE_S = wayback.DEADLINE_S
REPEAT_S = 1.0  # should something have swallowed the first alarm

# What would end the new image before it can end in order; they wait until it can.
_DEFERRED = (_signal.SIGINT, _signal.SIGTERM, _signal.SIGHUP)


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


def arm(fds: FdStore) -> None:
    """In the old image: keep what the way back needs, and start the deadline."""
    fds.keep(EXE_FD, os.open("/proc/self/exe", os.O_RDONLY | os.O_CLOEXEC))
    fds.keep(RECORD_FD, os.memfd_create("way-back", os.MFD_CLOEXEC))
    # The timer goes on through the exec, and kills an image that does not handle it.
    _signal.setitimer(_signal.ITIMER_REAL, DEADLINE_S, REPEAT_S)
    _signal.pthread_sigmask(_signal.SIG_BLOCK, _DEFERRED)


def publish(fds: FdStore, values: dict[str, bytes], incoming: str) -> tuple[int, dict[str, str]]:
    """In the old image, after :func:`arm`: write the CPR state and the record of the way back.
    Return the state's descriptor, and what the new image's environment must say.

    :param incoming: URI of the state for the way back
    """
    command = [os.fsencode(word) for word in own_command(incoming)]
    kept = fds.kept()
    state = cpr_state.publish(kept, values | {COMMAND: b"\0".join(command)})
    try:
        record = kept[(RECORD_FD, 0)]
        program = kept[(EXE_FD, 0)]
        wayback.write(record, wayback.Record(program, state, [state, *kept.values()], command))
    except BaseException:
        os.close(state)
        raise
    return state, {cpr_state.ENVIRONMENT: str(state), wayback.RECORD: str(record)}


def disarm(fds: FdStore) -> None:
    """In the old image: undo :func:`arm`, after an exec that failed."""
    wayback.stop_timer()
    _signal.pthread_sigmask(_signal.SIG_UNBLOCK, _DEFERRED)
    for name in (EXE_FD, RECORD_FD):
        fd = fds.kept().get((name, 0))
        if fd is not None:
            fds.forget(name)
            os.close(fd)


def adopt(carried: CprState) -> None:
    """In the new image: open the way back to an image that wrote no record, from the CPR state.

    It reads why it is back in the state, not in the environment, so the state says so already.
    """
    words = carried.values.get(COMMAND)
    program = carried.fds.get((EXE_FD, 0))
    if wayback.is_open() or not words or program is None or wayback.FAILURE in os.environ:
        return
    values = {name: value for name, value in carried.values.items() if name != COMMAND}
    values[ERROR] = b"the new image did not take over; its standard error says why"
    state = cpr_state.publish(carried.fds, values)
    fds = [state, *carried.fds.values()]
    wayback.adopt(wayback.Record(program, state, fds, words.split(b"\0"), is_told=False))
