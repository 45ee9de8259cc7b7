"""What the probe of a preflight is told, and how an image knows that it is one.

The probe is started as the update will be: with something open under each number that an update
will hand over (a pipe, never what it stands for), so that it sees whether all that reaches it. An
image whose wrapper took its environment away still knows by its standard error and by its way to
the old image that it is a probe, and must not start a guest.
"""

from __future__ import annotations

import os
import stat

from pyvmm.errors import MigrationError

ENVIRONMENT = "PYVMM_CPR_PROBE"
ANSWER_FD = 3
#: What the file begins with that is a probe's standard error, and the name of the socket at the
#: other end of its answer.
MARK = b"pyvmm preflight\n"
SOCKET = b"\0pyvmm preflight "


class Task:
    """What the probe has to find out beside the machine of its command.

    :param fds: numbers that an update will hand over
    :param inode: of the pipe that is open under all of them
    :param fresh: how many descriptors the new image has to open
    :param name: tells this probe from all others
    """

    __slots__ = ("fds", "fresh", "inode", "name")

    def __init__(self, fds: list[int], inode: int, fresh: int, name: str) -> None:
        self.fds = fds
        self.inode = inode
        self.fresh = fresh
        self.name = name

    def environment(self) -> dict[str, str]:
        """Return the variable for the probe's environment."""
        numbers = ",".join(map(str, self.fds))
        return {ENVIRONMENT: f"{ANSWER_FD} {numbers} {self.inode} {self.fresh} {self.name}"}

    @classmethod
    def told(cls) -> Task | None:
        """In the probe: return the task; None if the old image is of a version that gives none."""
        words = os.environ.get(ENVIRONMENT, "").split()
        if len(words) != 5:
            return None
        fds = [int(word) for word in words[1].split(",")]
        return cls(fds, int(words[2]), int(words[3]), words[4])

    def check(self) -> None:
        """In the probe: see that an update could hand all over, and have what it needs.

        :raises MigrationError: what is in the way, and the mend
        """
        for fd in self.fds:
            try:
                found = os.fstat(fd).st_ino
            except OSError:
                found = 0
            if found != self.inode:
                raise _closed(fd)
        check_free_descriptors(self.fresh, "it")
        self._check_threads()

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


def check_free_descriptors(count: int, who: str) -> None:
    """See that this process can open ``count`` more files than it has open. Either image.

    :param who: needs them, for the message
    :raises MigrationError: it cannot
    """
    opened: list[int] = []
    try:
        while len(opened) < count:
            opened.append(os.eventfd(0, os.EFD_CLOEXEC))
    except OSError as error:
        raise MigrationError(
            f"{error.strerror}: {who} needs {count} free descriptors; raise the limit (ulimit -n)"
        ) from None
    finally:
        for fd in opened:
            os.close(fd)


def check_environment() -> None:
    """In an image without the variables of a probe: see that it is not a probe that lost them.

    :raises MigrationError: it is one, and would start the guest a second time; the old image was
        told, if it can be reached
    """
    is_answered = _leads_to_an_old_image()
    if not is_answered and not _is_marked(2):
        return
    error = MigrationError(
        f"it lacks the environment of an update ({ENVIRONMENT} is missing); let the command hand "
        "all of it on (no env -i)"
    )
    if is_answered:
        import json

        os.write(ANSWER_FD, json.dumps({"error": str(error)}).encode())
    raise error


def can_answer() -> bool:
    """Return whether the way to the old image is open."""
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


def _is_marked(fd: int) -> bool:
    try:
        # Reading may take something away from others where it is no file.
        return stat.S_ISREG(os.fstat(fd).st_mode) and os.pread(fd, len(MARK), 0) == MARK
    except OSError:
        return False


def _leads_to_an_old_image() -> bool:
    if not can_answer():
        return False
    import _socket

    sock = _socket.socket(fileno=os.dup(ANSWER_FD))
    try:
        name = sock.getpeername()
    except OSError:
        return False
    finally:
        sock.close()
    return isinstance(name, bytes) and name.startswith(SOCKET)


def _closed(fd: int) -> MigrationError:
    return MigrationError(
        f"descriptor {fd} does not reach it; let the command hand on all that are open "
        "(no close_fds, closefrom, N>&-)"
    )
