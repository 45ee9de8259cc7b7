"""The preflight of an update: the new command, started as a probe while the guest runs.

The probe is the very command that will be executed, told by its environment to describe the
machine that it would build, and to end. It goes through the interpreter, the package and the
options as the update will, so a program that is missing, broken or of another shape is found
out at no pause. So is a wrapper that does not become pyvmm (the guest would be in a child, and
the VM's process the wrapper) or does not hand on what an update needs (``cpr.probe``).
Old image: :class:`Probe`. New image: :func:`answer`.
"""

from __future__ import annotations

import _socket
import errno
import json
import os
import struct
import time

from pyvmm import __version__
from pyvmm.core.eventloop import READABLE
from pyvmm.cpr import probe, state
from pyvmm.cpr.probe import ANSWER_FD
from pyvmm.errors import MigrationError, PyvmmError, VmStateError
from pyvmm.kvm import carrier
from pyvmm.machine import options, shape
from pyvmm.machine.config import MACHINE_TYPE
from pyvmm.migration import descendants

TYPE_CHECKING = False
if TYPE_CHECKING:
    import signal as _signal
    from collections.abc import Callable, Iterable
    from typing import Any

    from pyvmm.core.eventloop import EventLoop
    from pyvmm.cpr.handover import Handover
    from pyvmm.machine.config import MachineConfig
    from pyvmm.migration.channel import Channel
else:
    import _signal  # what signal wraps in enums, at the cost of importing enum

DEADLINE_S = 20.0
GRACE_S = 2.0  # what was killed ends sooner, unless it cannot be
MAX_ANSWER = 1 << 20
SPARE_FDS = 16
_CHUNK = 1 << 16
_CREDENTIALS = struct.Struct("iII")  # struct ucred: pid, uid, gid


def describe(config: MachineConfig) -> dict[str, Any]:
    """Return what has to agree between two images, as JSON values."""
    return {
        "version": __version__,
        "machine": MACHINE_TYPE,
        # Of each format that goes through the exec: the versions that are read, and written.
        "cpr": {
            "CPR state": [state.VERSION, state.VERSION],
            "host-side values": [state.VALUES_VERSION, state.VALUES_VERSION],
        },
        # Of carriers: the versions of which a guest is taken over.
        "carrier": [carrier.VERSION, carrier.VERSION],
        "incoming": config.incoming,
        "autostart": not config.start_paused,
        "shape": shape.describe(config),
        "chardevs": shape.chardev_kinds(config),
        **_sections(config),
        # Those that are written only if they have something to say: the versions that are read,
        # and written.
        "optional": {
            "{}[{}]".format(*key): [one.minimum_version, one.version]
            for key, one in shape.optional_descriptions().items()
        },
    }


def _sections(config: MachineConfig) -> dict[str, dict[str, list[int]]]:
    """Return the versions of each section that are read, and written: by what the section is
    called, and by what images before call it."""
    former = {key: name for name, key in shape.former_names(config).items()}
    places, sections = {}, {}
    for key, description in shape.descriptions(config).items():
        versions = [description.minimum_version, description.version]
        places["{}[{}]".format(*key)] = versions
        sections["{}[{}]".format(*former.get(key, key))] = versions
    return {"places": places, "sections": sections}


def reads_places(new: dict[str, Any]) -> bool:
    """Return whether an image that describes itself as ``new`` knows sections by their places."""
    return "places" in new


def explain_plain(new: dict[str, Any]) -> str:
    """Return why the guest has to stand through an exec to the image that describes itself as
    ``new``; empty if it can run."""
    oldest, newest = new.get("carrier", [0, 0])
    if not oldest <= carrier.VERSION <= newest:
        return f"the new version {new.get('version')} cannot take over from this carrier"
    if new.get("incoming") == "defer":
        return "-incoming defer: the new image waits for a command, and the guest for the devices"
    if not new.get("autostart"):
        return "-S: the guest is to stand in the new image"
    return ""


def answer(argv: list[str]) -> int:
    """In the probe: describe the machine of ``argv`` on :data:`ANSWER_FD`; return the exit code."""
    try:
        task = probe.Task.told()
        if task is not None:
            probe.check_answer_fd()
            task.check()
        result = describe(options.parse(argv))
    except PyvmmError as error:
        if task is not None and not probe.can_answer():
            raise
        result = {"error": str(error)}
    except options.HelpRequested:
        result = {"error": "the command only prints help"}
    os.write(ANSWER_FD, json.dumps(result).encode())
    return 0


def compare(
    own: dict[str, Any], new: dict[str, Any], channel: Channel, used: Iterable[str] = ()
) -> None:
    """See that an image that describes itself as ``new`` can go on for ``own``.

    :param channel: where the state will be
    :param used: the optional sections that there is something to say of
    :raises MigrationError: naming the first difference, and both values
    """
    if new.get("error"):
        raise MigrationError(f"the new command: {new['error']}")
    incoming = new.get("incoming")
    if not incoming:
        raise MigrationError(
            "the new command lacks -incoming and would start a guest of its own; "
            f"add -incoming {channel.text}"
        )
    if incoming != "defer" and not channel.matches(incoming):
        raise MigrationError(
            f"the new command: -incoming {incoming}: the state goes to {channel.text}; "
            "make them equal"
        )
    if new.get("machine") != own["machine"]:
        raise MigrationError(f"the new command builds a machine of type {new.get('machine')}")
    theirs = new.get("shape", {})
    for option, value in own["shape"].items():
        # An image before an option cannot have been given it.
        if theirs.get(option, "") != value:
            raise MigrationError(
                f"the new command: {option} is {theirs.get(option) or 'nothing'}, this machine "
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
    names = "places" if reads_places(new) else "sections"
    sections = new.get(names, {})
    for section, (_, version) in own[names].items():
        if section not in sections:
            raise MigrationError(f"the new version {new.get('version')} has no device {section}")
        _check_version(new, section, sections[section], version)
    for section in sections:
        if section not in own[names]:
            raise MigrationError(f"this machine has no device {section}, the new command does")
    optional = new.get("optional", {})
    for section in used:
        if section not in optional:
            raise MigrationError(
                f"the guest uses {section}, which the new version {new.get('version')} "
                "does not have"
            )
        _check_version(new, section, optional[section], own["optional"][section][1])


def _check_version(new: dict[str, Any], what: str, reads: list[int], version: int) -> None:
    oldest, newest = reads
    if not oldest <= version <= newest:
        raise MigrationError(
            f"the new version {new.get('version')} reads {what} in versions {oldest} to "
            f"{newest}, this one writes {version}"
        )


def check_descriptors(handover: Handover) -> None:
    """See that what is to be handed over can be, and that the process can open some more files
    than it has open.

    An image that takes over without could not even read its own modules any more.

    :raises MigrationError: one of them cannot be
    """
    try:
        state.decode(state.encode(state.CprState(handover.kept(), {})))
    except VmStateError as error:
        raise MigrationError(f"{error}; close what is not needed") from None
    probe.check_free_descriptors(SPARE_FDS, "an update")


class Probe:
    """One run of a command as a probe; main loop thread. Whatever it started in its process
    group ends with it; if it gave no good answer, also what has left the group.

    :param kept: descriptors that an update will hand over; the probe gets others under their
        numbers
    :param done: called once, with the answer or with what went wrong
    :raises MigrationError: if the command cannot be executed
    """

    def __init__(
        self,
        loop: EventLoop,
        program: str,
        argv: list[str],
        kept: Iterable[int],
        done: Callable[[dict[str, Any] | MigrationError], None],
    ) -> None:
        self._loop = loop
        self._done: Callable[[dict[str, Any] | MigrationError], None] | None = done
        self._name = argv[0]
        self._answer = b""
        # What came of it, once that is known before the probe's end.
        self._problem: MigrationError | None = None
        self._fds: list[int] = []
        self._socket: _socket.socket | None = None
        name = f"{os.getpid()}.{time.monotonic_ns()}"
        self._mark = f" {name}\0".encode()  # in the environment of what the probe starts
        try:
            needs, fresh = _needs(kept)
            self._stand_in, write_fd = os.pipe2(os.O_CLOEXEC)
            os.close(write_fd)
            self._fds.append(self._stand_in)
            self._error_fd = os.memfd_create("probe-stderr", os.MFD_CLOEXEC)
            self._fds.append(self._error_fd)
            os.write(self._error_fd, probe.MARK)
            # The kernel tells who writes, in our own process ids, whatever they are over there.
            self._socket, theirs = _socket.socketpair(_socket.AF_UNIX, _socket.SOCK_STREAM)
            self._socket.setsockopt(_socket.SOL_SOCKET, _socket.SO_PASSCRED, 1)
            self._socket.setblocking(False)
            self._socket.bind(probe.SOCKET + name.encode())
            inode = os.fstat(self._stand_in).st_ino
            self._task = probe.Task(needs, inode, fresh, name)
            try:
                self._pid = self._spawn(program, argv, theirs.fileno())
            finally:
                theirs.close()
        except OSError as error:
            self._close()
            raise MigrationError(_explain_spawn(program, error)) from None
        try:
            self._pid_fd = os.pidfd_open(self._pid)
        except OSError as error:
            self._kill()
            os.waitpid(self._pid, 0)
            self._close()
            raise MigrationError(f"The preflight cannot be made: {error.strerror}") from None
        self._timer = loop.call_later(DEADLINE_S, self._handle_deadline)
        loop.add(self._pid_fd, READABLE, self._handle_exit)
        loop.add(self._socket.fileno(), READABLE, self._handle_answer)

    def cancel(self) -> None:
        """End the probe; ``done`` is called with an error soon."""
        self._give_up(MigrationError("The preflight was cancelled"))

    def _spawn(self, program: str, argv: list[str], answer_fd: int) -> int:
        # Nothing of ours is inherited: every other descriptor closes on exec.
        null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
        try:
            return os.posix_spawn(
                program,
                argv,
                os.environ | self._task.environment(),
                file_actions=[
                    # The stand-ins first: the descriptors below have none of their numbers here.
                    *((os.POSIX_SPAWN_DUP2, self._stand_in, fd) for fd in self._task.fds),
                    (os.POSIX_SPAWN_DUP2, null, 0),
                    (os.POSIX_SPAWN_DUP2, null, 1),
                    (os.POSIX_SPAWN_DUP2, self._error_fd, 2),
                    (os.POSIX_SPAWN_DUP2, answer_fd, ANSWER_FD),
                ],
                # A Ctrl-C on the terminal is not for the probe.
                setpgroup=0,
            )
        finally:
            os.close(null)

    def _handle_deadline(self) -> None:
        self._give_up(
            MigrationError(
                f"{self._name} did not answer the preflight in {DEADLINE_S:.0f} s; "
                "is it a pyvmm run command?"
            )
        )

    def _give_up(self, problem: MigrationError) -> None:
        """End the probe; ``problem`` is what came of it."""
        if self._done is None or self._problem is not None:
            return
        self._problem = problem
        self._timer.cancel()
        self._timer = self._loop.call_later(GRACE_S, self._handle_immortal)
        self._kill()

    def _handle_immortal(self) -> None:
        # It is another user's by now, or waits for a device. Its end will be seen.
        self._finish(MigrationError(f"{self._problem} (process {self._pid} cannot be ended)"))

    def _handle_answer(self, _revents: int) -> None:
        self._receive()

    def _receive(self) -> bool:
        """Take a piece of the answer; return whether there may be more."""
        if self._socket is None:
            return False
        try:
            data, control, _flags, _peer = self._socket.recvmsg(
                _CHUNK, _socket.CMSG_SPACE(_CREDENTIALS.size), _socket.MSG_CMSG_CLOEXEC
            )
        except BlockingIOError:
            return False
        self._answer += data
        if not data or len(self._answer) > MAX_ANSWER:
            # All have closed it, or somebody writes without end.
            self._loop.remove(self._socket.fileno())
            return False
        for _level, kind, value in control:
            if kind == _socket.SCM_CREDENTIALS:
                pid = _CREDENTIALS.unpack(value)[0]
                if pid != self._pid:
                    self._give_up(self._explain_child(pid))
        return True

    def _handle_exit(self, _revents: int) -> None:
        while self._receive():
            pass
        self._timer.cancel()
        self._loop.remove(self._pid_fd)
        os.close(self._pid_fd)
        # As long as it was not waited for, its process group is no other's.
        status = os.waitid(os.P_PID, self._pid, os.WEXITED | os.WNOWAIT)
        assert status is not None
        if self._done is None:
            self._kill()
            os.waitpid(self._pid, 0)
            return
        code = status.si_status if status.si_code == os.CLD_EXITED else -status.si_status
        result = self._problem or self._read(code)
        if isinstance(result, MigrationError):
            self._kill()
        else:
            self._kill_group()
        os.waitpid(self._pid, 0)
        self._finish(result)

    def _finish(self, result: dict[str, Any] | MigrationError) -> None:
        done, self._done = self._done, None
        self._close()
        if done is not None:
            done(result)

    def _read(self, exit_code: int) -> dict[str, Any] | MigrationError:
        try:
            result = json.loads(self._answer)
        except (ValueError, RecursionError):
            result = None
        if isinstance(result, dict) and (exit_code == 0 or "error" in result):
            pid = descendants.holder(self._mark, self._stand_in, self._task.fds)
            if pid is None:
                return result
            return MigrationError(
                f"{self._name} leaves a process ({pid}) that would inherit the guest's memory; "
                "start that without the descriptors, or elsewhere"
            )
        return MigrationError(f"{self._name}: {self._explain_exit(exit_code)}")

    def _explain_exit(self, exit_code: int) -> str:
        raw = os.pread(self._error_fd, MAX_ANSWER, len(probe.MARK))
        text = raw.decode("utf-8", "replace").strip()
        if text:
            # The last line of a traceback, or of whatever the program printed.
            return text.splitlines()[-1][:500]
        if exit_code < 0:
            return f"killed by signal {-exit_code} in the preflight"
        return (
            f"ended with exit code {exit_code} without answering the preflight; "
            "is it a pyvmm run command?"
        )

    def _explain_child(self, pid: int) -> MigrationError:
        child = f" ({pid})" if pid else ""
        return MigrationError(
            f"{self._name} does not become pyvmm: another process{child} answers, and the guest "
            "would be there; put exec before pyvmm, or leave out what starts it"
        )

    def _kill(self) -> None:
        self._kill_group()
        descendants.kill(self._mark)

    def _kill_group(self) -> None:
        try:
            os.killpg(self._pid, _signal.SIGKILL)
        except OSError:
            pass  # all of it is another user's

    def _close(self) -> None:
        if self._socket is not None:
            self._loop.remove(self._socket.fileno())
            self._socket.close()
            self._socket = None
        while self._fds:
            os.close(self._fds.pop())


def _needs(kept: Iterable[int]) -> tuple[list[int], int]:
    """Return the numbers that have to reach the new image, that of the CPR state among them; and
    how many descriptors an image of this one's shape opens besides."""
    numbers = set(kept)
    try:
        # Without the descriptor that lists them, and without the standard streams.
        count = len(os.listdir("/proc/self/fd")) - 4
    except OSError:
        count = len(numbers)
    # A number beyond the limit is handed over, but cannot be given to anything new.
    limit = os.sysconf("SC_OPEN_MAX")
    state_fd = next(fd for fd in range(ANSWER_FD + 1, limit) if fd not in numbers)
    # The two that the probe has besides are in the spare ones.
    fresh = count - len(numbers) + SPARE_FDS - 2
    return sorted({state_fd, *(fd for fd in numbers if ANSWER_FD < fd < limit)}), fresh


def _explain_spawn(program: str, error: OSError) -> str:
    text = f"{program} cannot be executed: {error.strerror}"
    if error.errno == errno.EPERM:
        # Nothing else refuses an executable file that access(2) has found to be one.
        text += "; a sandbox (seccomp) that denies execve to this process denies it updates"
    return text
