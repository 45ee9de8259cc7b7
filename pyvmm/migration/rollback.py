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
from pyvmm.cpr.handover import CPR, ROLLBACK

TYPE_CHECKING = False
if TYPE_CHECKING:
    import signal as _signal

    from pyvmm.cpr.handover import Handover
    from pyvmm.cpr.state import CprState
else:
    import _signal  # what signal wraps in enums, at the cost of importing enum

# Names on the wire: for images before version 1 of the record, which went back by these alone.
COMMAND, ERROR = f"{ROLLBACK}/command", f"{ROLLBACK}/error"
EXE = (f"{CPR}/exe", 0)
DEADLINE_S = wayback.DEADLINE_S
REPEAT_S = 1.0  # should something have swallowed the first alarm

#: What would end the new image before it can end in order; they wait until it can.
DEFERRED = (_signal.SIGINT, _signal.SIGTERM, _signal.SIGHUP)


def own_command(incoming: str) -> list[str]:
    """Return the command that this process was started with, made to load its state.

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


def prepare(handover: Handover) -> int:
    """In the old image: open what the way back needs; return the descriptor of the CPR state, which
    :func:`publish` writes.

    :raises OSError: the host refuses
    """
    handover.parcel(CPR, "exe").keep(os.open("/proc/self/exe", os.O_RDONLY | os.O_CLOEXEC))
    handover.parcel(CPR, "way-back").keep(os.memfd_create("way-back", os.MFD_CLOEXEC))
    return cpr_state.reserve()


def close(handover: Handover, state: int | None) -> None:
    """In the old image: undo :func:`prepare`, also half of it."""
    for id in ("exe", "way-back"):
        parcel = handover.parcel(CPR, id)
        fd = parcel.kept()
        if fd is not None:
            parcel.close(fd)
    if state is not None:
        os.close(state)


def arm() -> None:
    """In the old image: start the deadline."""
    # The timer goes on through the exec, and kills an image that does not handle it.
    _signal.setitimer(_signal.ITIMER_REAL, DEADLINE_S, REPEAT_S)
    _signal.pthread_sigmask(_signal.SIG_BLOCK, DEFERRED)


def disarm() -> None:
    """In the old image: undo :func:`arm`, after an exec that failed."""
    wayback.stop_timer()
    _signal.pthread_sigmask(_signal.SIG_UNBLOCK, DEFERRED)


def publish(handover: Handover, incoming: str, state: int) -> dict[str, str]:
    """In the old image, after :func:`arm`: write the CPR state and the record of the way back.
    Return what the new image's environment must say.

    :param incoming: URI of the state for the way back
    :param state: descriptor of the CPR state
    """
    command = [os.fsencode(word) for word in own_command(incoming)]
    handover.parcel(ROLLBACK, "command").give(b"\0".join(command))
    kept = handover.kept()
    cpr_state.write(state, kept, handover.states())
    record = kept[(f"{CPR}/way-back", 0)]
    program = kept[EXE]
    wayback.write(record, wayback.Record(program, state, [state, *kept.values()], command))
    return {cpr_state.ENVIRONMENT: str(state), wayback.RECORD: str(record)}


def adopt(carried: CprState) -> None:
    """In the new image: open the way back to an image that wrote no record, from the CPR state.

    It reads why it is back in the state, not in the environment, so the state says so already.
    """
    words = carried.values.get(COMMAND)
    program = carried.fds.get(EXE)
    if wayback.is_open() or not words or program is None or wayback.FAILURE in os.environ:
        return
    values = {name: value for name, value in carried.values.items() if name != COMMAND}
    values[ERROR] = b"the new image did not take over; its standard error says why"
    state = cpr_state.publish(carried.fds, values)
    fds = [state, *carried.fds.values()]
    wayback.adopt(wayback.Record(program, state, fds, words.split(b"\0"), is_told=False))
