"""The exception tree: who can mend what.

Messages are one sentence-case line that says what was being done and with which value; the
cause is chained, not repeated. Only ``cli`` turns an exception into an exit code.
"""

from __future__ import annotations

import os


class PyvmmError(Exception):
    """Base of everything that pyvmm raises on purpose."""


class ConfigError(PyvmmError):
    """The operator can mend it: an option, a value or a file that was named."""


class HostError(PyvmmError):
    """The host lacks something or refuses it; the message names what."""


class KvmError(HostError):
    """An ioctl on a KVM descriptor failed.

    :param ioctl: name of the ioctl, e.g. ``KVM_SET_SREGS``
    :param errno: the kernel's error number
    :param detail: what was being set, when the number alone does not tell
    """

    def __init__(self, ioctl: str, errno: int, detail: str = "") -> None:
        text = f"{ioctl}: {os.strerror(errno)}"
        super().__init__(f"{text} ({detail})" if detail else text)
        self.ioctl = ioctl
        self.errno = errno


class RamError(HostError):
    """The host cannot back a page of guest RAM now. Nothing is lost: what needs the page is to be
    done again when the host has room."""


class GuestError(PyvmmError):
    """The guest did what no guest should. The error never leaves device or loader."""


class StateError(PyvmmError):
    """An operation that the present run state does not allow."""


class VmStateError(PyvmmError):
    """A state stream is malformed, truncated, or describes an impossible state.

    :param path: where in the stream, as ``section/field``
    """

    def __init__(self, path: str, problem: str) -> None:
        super().__init__(f"{path}: {problem}" if path else problem)
        self.path = path
        self.problem = problem


class MigrationError(PyvmmError):
    """A migration or live update was refused or failed; the guest is where it was."""


class CommandError(PyvmmError):
    """A monitor command was refused; the text is what the user reads after ``Error: ``."""


class InternalError(PyvmmError):
    """A broken invariant: a bug in pyvmm."""


def place(error: BaseException) -> str:
    """Return the module and function that raised an error; empty if it was not raised."""
    trace = error.__traceback__
    if trace is None:
        return ""
    while trace.tb_next is not None:
        trace = trace.tb_next
    frame = trace.tb_frame
    return f"{frame.f_globals.get('__name__', '')}.{frame.f_code.co_name}"
