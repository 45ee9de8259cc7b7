"""The way back of a live update, as the new image has it: a record of a fixed form.

The old image writes the record before the exec: the descriptor of its own program, the words of
its command, and all descriptors that it will need again. The new image arms it before any other
module of the package is imported (``pyvmm/__init__``), with the standard library alone, and
decodes nothing else for it: whatever ends the new image in Python before :func:`close`, or the
deadline, executes the old command on the untouched CPR state. Once: an old image that fails too
has nowhere to go. Main thread only.
"""

from __future__ import annotations

import atexit
import os
import sys
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    import signal as _signal
    from collections.abc import Iterable
    from types import TracebackType
else:
    import _signal  # what signal wraps in enums, at the cost of importing enum

#: Environment of the new image: the descriptors of the record and of the CPR state.
RECORD = "PYVMM_CPR_WAY_BACK"
STATE = "PYVMM_CPR_EXEC_STATE"
#: Environment of an old image that is back: why, and in which function (two lines).
FAILURE = "PYVMM_CPR_FAILURE"
DEADLINE_S = 10.0

_MAGIC = b"pyvmm way back 1"
_MAX_RECORD = 8 << 20  # a command has at most a quarter of the stack limit, execve(2)
_MAX_TEXT = 4096
# A host that is short of memory for a moment does not cost the guest.
_ATTEMPTS, _INTERVAL_S = 100, 0.1


class Record:
    """What leads back.

    :ivar program: descriptor of the old image's executable
    :ivar state: descriptor of the CPR state
    :ivar fds: all descriptors that go through the exec, with these two
    :ivar command: words of the old command
    :ivar is_told: whether the old image reads in its environment why it is back
    """

    __slots__ = ("command", "fds", "is_told", "program", "state")

    def __init__(
        self,
        program: int,
        state: int,
        fds: Iterable[int],
        command: list[bytes],
        *,
        is_told: bool = True,
    ) -> None:
        self.program = program
        self.state = state
        self.fds = [*fds]
        self.command = command
        self.is_told = is_told


_record: Record | None = None


def write(fd: int, record: Record) -> None:
    """Write ``record`` to the empty memfd ``fd``. Old image."""
    # The number of a descriptor may stand in an environment that outlived it; the inode of the
    # CPR state tells whether the record belongs to it.
    inode = os.fstat(record.state).st_ino
    numbers = " ".join(map(str, (inode, record.program, record.state, *record.fds)))
    data = b"\0".join((_MAGIC, numbers.encode(), *record.command))
    while data:
        data = data[os.write(fd, data) :]


def arm() -> None:
    """Open the way back that the environment names; there may be none. New image."""
    number, state = os.environ.pop(RECORD, ""), os.environ.get(STATE, "")
    try:
        record = _read(int(number), int(state))
    except (OSError, ValueError, OverflowError):
        return  # not of this exec
    adopt(record)


def adopt(record: Record) -> None:
    """Open a way back. From now on whatever ends this process in Python leads there."""
    global _record
    _record = record
    sys.excepthook = _handle_exception
    atexit.register(_handle_exit)
    _signal.signal(_signal.SIGALRM, _handle_alarm)


def is_open() -> bool:
    """Return whether there is a way back."""
    return _record is not None


def close() -> int | None:
    """Give the way back up: the guest is about to change its memory. Return the descriptor of the
    CPR state, which the caller closes when the guest runs."""
    global _record
    # In this order: an alarm in between, or a timer that goes on, finds no way back any more.
    record, _record = _record, None
    try:
        stop_timer()
    except OSError:
        pass
    return record.state if record else None


def stop_timer() -> None:
    """Take as long as it takes (somebody types where the state is)."""
    _signal.setitimer(_signal.ITIMER_REAL, 0)


def attempt(error: BaseException) -> None:
    """Execute the old command on the untouched state; return only if that cannot be.

    :param error: why this image cannot take over
    """
    go(_explain(error), _origin(error))


def go(why: str, where: str = "") -> None:
    """Execute the old command, as :func:`attempt` does, with a reason that is no exception.

    :param why: why this image cannot take over
    :param where: the function that failed
    """
    global _record
    record, _record = _record, None
    if record is None:
        return
    if not record.is_told:
        _say(f"the new image did not take over: {why}")
    problem: BaseException | None = None
    for round in range(_ATTEMPTS):
        try:
            if round:
                time.sleep(_INTERVAL_S)
            stop_timer()
            for fd in record.fds:
                os.set_inheritable(fd, True)
            text = why[:_MAX_TEXT].encode("utf-8", "replace").decode().replace("\n", " ")
            told = {STATE: str(record.state)}
            if record.is_told:
                # Others would hand it on, and their next image take it for its own.
                told[FAILURE] = f"{text}\n{where}".replace("\0", " ")
            os.execve(record.program, record.command, os.environ | told)
        except (OSError, MemoryError) as error:
            problem = error
    _say(f"the way back failed too: {problem}")


def take_failure() -> tuple[str, str]:
    """Return why this image is back, and the function that failed; empty if it is not."""
    why, _, where = os.environ.pop(FAILURE, "").partition("\n")
    return why, where


def _say(text: str) -> None:
    # The package's own way of saying things may not be there. Nobody is waited for.
    try:
        import select

        poll = select.poll()
        poll.register(2, select.POLLOUT)
        if poll.poll(0):
            os.write(2, f"pyvmm: {text}\n".encode("utf-8", "replace")[:_MAX_TEXT])
    except (OSError, ImportError):
        pass


def _read(fd: int, state: int) -> Record:
    head, numbers, *command = os.pread(fd, _MAX_RECORD, 0).split(b"\0")
    inode, program, own_state, *fds = map(int, numbers.split())
    if head != _MAGIC or own_state != state or os.fstat(state).st_ino != inode:
        raise ValueError("another record")
    return Record(program, state, fds, command)


def _handle_exception(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    attempt(error)
    sys.__excepthook__(kind, error, trace)


def _handle_exit() -> None:
    go("the new image ended before it took over")


def _handle_alarm(_number: int, _frame: object) -> None:
    # At once, not by an exception: whatever is under way here may swallow one.
    go(f"the new image did not take over within {DEADLINE_S:.0f} s")


def _explain(error: BaseException) -> str:
    # An error that is raised on purpose says all that there is to say.
    if any(kind.__name__ == "PyvmmError" for kind in type(error).__mro__):
        return str(error)
    return f"{type(error).__name__}: {error}"


def _origin(error: BaseException) -> str:
    # Not imported for this: the package may be what is broken.
    place = getattr(sys.modules.get("pyvmm.errors"), "place", None)
    return str(place(error)) if place else ""
