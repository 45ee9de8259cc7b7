"""What the probe of a preflight is told, and how an image knows that it is one.

The probe is started as the update will be: with the variables of an update in its environment,
and with something open under each number that an update will hand over. All of these are one
file that begins with :data:`MARK`, its standard error among them. So the probe sees whether all
that reaches it, and an image whose wrapper took the environment away still knows that it must
not start a guest.
"""

from __future__ import annotations

import os
import stat

from pyvmm.cpr import state as cpr_state
from pyvmm.errors import MigrationError

ENVIRONMENT = "PYVMM_CPR_PROBE"
ANSWER_FD = 3
MARK = b"pyvmm preflight\n"

#: Where a probe without environment looks for the mark: at what an update of a small VM hands over.
_LOW_FDS = range(2, 64)


class Task:
    """What the probe has to find out beside the machine of its command.

    :param kept: numbers that an update will hand over
    :param state_fd: that of the CPR state
    :param fresh: how many descriptors the new image has to open
    :param name: tells this probe from all others
    """

    __slots__ = ("fresh", "kept", "name", "state_fd")

    def __init__(self, kept: list[int], state_fd: int, fresh: int, name: str) -> None:
        self.kept = kept
        self.state_fd = state_fd
        self.fresh = fresh
        self.name = name

    def environment(self) -> dict[str, str]:
        """The variables for the probe."""
        numbers = ",".join(map(str, self.kept))
        text = f"{ANSWER_FD} {self.state_fd} {numbers or '-'} {self.fresh} {self.name}"
        return {ENVIRONMENT: text, cpr_state.ENVIRONMENT: str(self.state_fd)}

    @classmethod
    def told(cls) -> Task | None:
        """In the probe: the task; None if the old image is of a version that gives none."""
        words = os.environ.get(ENVIRONMENT, "").split()
        if len(words) != 5:
            return None
        kept = [] if words[2] == "-" else [int(word) for word in words[2].split(",")]
        return cls(kept, int(words[1]), int(words[3]), words[4])

    def check(self) -> None:
        """In the probe: see that an update could hand all over, and have what it needs.

        :raises MigrationError: what is in the way, and the mend
        """
        if os.environ.get(cpr_state.ENVIRONMENT) != str(self.state_fd):
            raise _lost(cpr_state.ENVIRONMENT)
        for fd in (self.state_fd, *self.kept):
            if not is_marked(fd):
                raise _closed(fd)
        self._check_descriptors()
        self._check_threads()

    def _check_descriptors(self) -> None:
        opened: list[int] = []
        try:
            while len(opened) < self.fresh:
                opened.append(os.eventfd(0, os.EFD_CLOEXEC))
        except OSError as error:
            raise MigrationError(
                f"{error.strerror}: it needs {self.fresh} free descriptors; raise the limit "
                "(ulimit -n)"
            ) from None
        finally:
            for fd in opened:
                os.close(fd)

    def _check_threads(self) -> None:
        import _thread

        lock = _thread.allocate_lock()
        lock.acquire()
        try:
            _thread.start_new_thread(lock.release, ())
        except RuntimeError as error:
            raise MigrationError(
                f"it cannot start threads ({error}); raise the limits on processes, and leave out "
                "what unshares process ids"
            ) from None
        lock.acquire()


def is_marked(fd: int) -> bool:
    """Whether ``fd`` is what the old image put there."""
    try:
        # Reading may take something away from others where it is no file.
        return stat.S_ISREG(os.fstat(fd).st_mode) and os.pread(fd, len(MARK), 0) == MARK
    except OSError:
        return False


def check_environment() -> None:
    """In an image without the variables of a probe: see that it is none that lost them.

    :raises MigrationError: it is one, and its guest would be a second one; the old image was told
        if that can be
    """
    if any(is_marked(fd) for fd in _LOW_FDS):
        error = _lost(ENVIRONMENT)
        if can_answer():
            import json

            os.write(ANSWER_FD, json.dumps({"error": str(error)}).encode())
        raise error


def can_answer() -> bool:
    """Whether the way to the old image is open."""
    try:
        return stat.S_ISSOCK(os.fstat(ANSWER_FD).st_mode)
    except OSError:
        return False


def check_answer_fd() -> None:
    """See that the old image can be answered.

    :raises MigrationError: it cannot
    """
    if not can_answer():
        raise _closed(ANSWER_FD)


def _lost(variable: str) -> MigrationError:
    return MigrationError(
        f"it lacks the environment of an update ({variable}); let the command hand it on "
        "(no env -i)"
    )


def _closed(fd: int) -> MigrationError:
    return MigrationError(
        f"descriptor {fd} does not reach it; let the command hand on all that are open "
        "(no close_fds, closefrom, N>&-)"
    )
