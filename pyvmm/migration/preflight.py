"""The preflight of an update: the new command, started as a probe while the guest runs.

The probe is the very command that will be executed, told by its environment to describe the
machine that it would build, and to end. It goes through the interpreter, the package and the
options as the update will, so a program that is missing, broken or of another shape is found
out at no pause. Old image: :class:`Probe`. New image: :func:`answer`.
"""

from __future__ import annotations

import errno
import json
import os

from pyvmm import __version__
from pyvmm.core.eventloop import READABLE
from pyvmm.cpr import state as cpr_state
from pyvmm.errors import MigrationError, PyvmmError
from pyvmm.machine import builder, options
from pyvmm.machine.config import MACHINE_TYPE

TYPE_CHECKING = False
if TYPE_CHECKING:
    import signal as _signal
    from collections.abc import Callable
    from typing import Any

    from pyvmm.core.eventloop import EventLoop
    from pyvmm.machine.config import MachineConfig
    from pyvmm.migration.target import Target
else:
    import _signal  # what signal wraps in enums, at the cost of importing enum

ENVIRONMENT = "PYVMM_CPR_PROBE"  # cli looks for it, without importing this module
ANSWER_FD = 3
DEADLINE_S = 20.0
MAX_ANSWER = 1 << 20
SPARE_FDS = 16


def describe(config: MachineConfig) -> dict[str, Any]:
    """What has to agree between two images, as JSON values."""
    return {
        "version": __version__,
        "machine": MACHINE_TYPE,
        # Of each format that goes through the exec: the versions that are read, and written.
        "cpr": {
            "CPR state": [cpr_state.VERSION, cpr_state.VERSION],
            "host-side values": [cpr_state.VALUES_VERSION, cpr_state.VALUES_VERSION],
        },
        "incoming": config.incoming,
        "shape": config.shape(),
        "chardevs": config.chardev_kinds(),
        "sections": {
            f"{name}[{instance}]": [description.minimum_version, description.version]
            for (name, instance), description in builder.descriptions(config).items()
        },
    }


def answer(argv: list[str]) -> int:
    """In the probe: describe the machine of ``argv`` on :data:`ANSWER_FD`; the exit code."""
    try:
        result = describe(options.parse(argv))
    except PyvmmError as error:
        result = {"error": str(error)}
    except options.HelpRequested:
        result = {"error": "the command only prints help"}
    os.write(ANSWER_FD, json.dumps(result).encode())
    return 0


def compare(own: dict[str, Any], new: dict[str, Any], target: Target) -> None:
    """See that an image that describes itself as ``new`` can go on for ``own``.

    :param target: where the state will be
    :raises MigrationError: naming the first difference, and both values
    """
    if new.get("error"):
        raise MigrationError(f"the new command: {new['error']}")
    incoming = new.get("incoming")
    if not incoming:
        raise MigrationError(
            "the new command lacks -incoming and would start a guest of its own; "
            f"add -incoming {target.text}"
        )
    if incoming != "defer" and not target.matches(incoming):
        raise MigrationError(
            f"the new command: -incoming {incoming}: the state goes to {target.text}; "
            "make them equal"
        )
    if new.get("machine") != own["machine"]:
        raise MigrationError(f"the new command builds a machine of type {new.get('machine')}")
    shape = new.get("shape", {})
    for option, value in own["shape"].items():
        if shape.get(option) != value:
            raise MigrationError(
                f"the new command: {option} is {shape.get(option) or 'nothing'}, this machine "
                f"has {value or 'nothing'}; make them equal"
            )
    chardevs = new.get("chardevs", {})
    for id, kind in own["chardevs"].items():
        # They may come and go; null has nothing to go on with.
        other = chardevs.get(id, kind)
        if other != kind and "null" not in (other, kind):
            raise MigrationError(
                f"the new command: chardev {id} is {other}, this machine has {kind}; "
                "make them equal"
            )
    # Images before this entry write and read version 1 of each.
    formats = new.get("cpr", {})
    for name, (_, version) in own["cpr"].items():
        _check_version(new, name, formats.get(name, [1, 1]), version)
    sections = new.get("sections", {})
    for section, (_, version) in own["sections"].items():
        if section not in sections:
            raise MigrationError(f"the new version {new.get('version')} has no device {section}")
        _check_version(new, section, sections[section], version)
    for section in sections:
        if section not in own["sections"]:
            raise MigrationError(f"this machine has no device {section}, the new command does")


def _check_version(new: dict[str, Any], what: str, reads: list[int], version: int) -> None:
    oldest, newest = reads
    if not oldest <= version <= newest:
        raise MigrationError(
            f"the new version {new.get('version')} reads {what} in versions {oldest} to "
            f"{newest}, this one writes {version}"
        )


def check_descriptors() -> None:
    """See that the process can open some more files than it has open.

    An image that takes over without could not even read its own modules any more.

    :raises MigrationError: it cannot
    """
    opened: list[int] = []
    try:
        while len(opened) < SPARE_FDS:
            opened.append(os.eventfd(0, os.EFD_CLOEXEC))
    except OSError as error:
        raise MigrationError(
            f"{error.strerror}: an update needs {SPARE_FDS} free descriptors; raise the limit "
            "(ulimit -n)"
        ) from None
    finally:
        for fd in opened:
            os.close(fd)


class Probe:
    """One run of a command as a probe; main loop thread.

    :param done: called once, with the answer or with what went wrong
    :raises MigrationError: if the command cannot be executed
    """

    def __init__(
        self,
        loop: EventLoop,
        program: str,
        argv: list[str],
        done: Callable[[dict[str, Any] | MigrationError], None],
    ) -> None:
        self._loop = loop
        self._done = done
        self._name = argv[0]
        self._fds: list[int] = []
        try:
            for name in ("answer", "stderr"):
                self._fds.append(os.memfd_create(f"probe-{name}", os.MFD_CLOEXEC))
            self._answer_fd, self._error_fd = self._fds
            self._pid = self._spawn(program, argv)
        except OSError as error:
            self._close()
            raise MigrationError(_explain_spawn(program, error)) from None
        try:
            self._pid_fd = os.pidfd_open(self._pid)
        except OSError as error:
            self.cancel()
            os.waitpid(self._pid, 0)
            self._close()
            raise MigrationError(f"The preflight cannot be made: {error.strerror}") from None
        self._timer = loop.call_later(DEADLINE_S, self._handle_deadline)
        self._late = False
        loop.add(self._pid_fd, READABLE, self._handle_exit)

    def cancel(self) -> None:
        """End the probe; ``done`` is called with an error soon."""
        os.kill(self._pid, _signal.SIGKILL)

    def _spawn(self, program: str, argv: list[str]) -> int:
        # Nothing of ours is inherited: every other descriptor closes on exec.
        null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
        try:
            return os.posix_spawn(
                program,
                argv,
                os.environ | {ENVIRONMENT: str(ANSWER_FD)},
                file_actions=[
                    (os.POSIX_SPAWN_DUP2, null, 0),
                    (os.POSIX_SPAWN_DUP2, null, 1),
                    (os.POSIX_SPAWN_DUP2, self._error_fd, 2),
                    (os.POSIX_SPAWN_DUP2, self._answer_fd, ANSWER_FD),
                ],
                # A Ctrl-C on the terminal is not for the probe.
                setpgroup=0,
            )
        finally:
            os.close(null)

    def _handle_deadline(self) -> None:
        self._late = True
        self.cancel()

    def _handle_exit(self, _revents: int) -> None:
        self._timer.cancel()
        self._loop.remove(self._pid_fd)
        os.close(self._pid_fd)
        _, status = os.waitpid(self._pid, 0)
        result = self._read(os.waitstatus_to_exitcode(status))
        self._close()
        self._done(result)

    def _read(self, exit_code: int) -> dict[str, Any] | MigrationError:
        if self._late:
            return MigrationError(
                f"{self._name} did not answer the preflight in {DEADLINE_S:.0f} s; "
                "is it a pyvmm run command?"
            )
        try:
            result = json.loads(os.pread(self._answer_fd, MAX_ANSWER, 0))
        except (ValueError, RecursionError):
            result = None
        if exit_code == 0 and isinstance(result, dict):
            return result
        return MigrationError(f"{self._name}: {self._problem(exit_code)}")

    def _problem(self, exit_code: int) -> str:
        text = os.pread(self._error_fd, MAX_ANSWER, 0).decode("utf-8", "replace").strip()
        if text:
            # The last line of a traceback, or of whatever the program printed.
            return text.splitlines()[-1][:500]
        if exit_code < 0:
            return f"killed by signal {-exit_code} in the preflight"
        return (
            f"ended with exit code {exit_code} without answering the preflight; "
            "is it a pyvmm run command?"
        )

    def _close(self) -> None:
        for fd in self._fds:
            os.close(fd)


def _explain_spawn(program: str, error: OSError) -> str:
    text = f"{program} cannot be executed: {error.strerror}"
    if error.errno == errno.EPERM:
        # Nothing else refuses an executable file that access(2) has found to be one.
        text += "; a sandbox (seccomp) that denies execve to this process denies it updates"
    return text
