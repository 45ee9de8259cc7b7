"""``-netdev passt``: networking without privileges, by the program of that name.

passt is started with one end of a pair of sockets, goes into the background, and ends when the
other end closes: with the VM, however that ends, and not with a live update, which keeps the
socket. Left out: starting it again should it end by itself; the link is down then, until the
next update.
"""

from __future__ import annotations

import _socket
import os
import select

from pyvmm._util import log
from pyvmm.backends.net.stream import StreamBackend
from pyvmm.errors import ConfigError

TYPE_CHECKING = False
if TYPE_CHECKING:
    import signal as _signal
    from typing import Any

    from pyvmm.core.eventloop import EventLoop
    from pyvmm.cpr.handover import Handover
else:
    import _signal  # what signal wraps in enums, at the cost of importing enum

PROGRAM = "passt"
DEADLINE_S = 10
_FD = 3
_LONGEST_ERROR = 4096


class PasstBackend(StreamBackend):
    """A stream to a passt of its own.

    :param arguments: further arguments for it
    :param option: the option that asks for it, for errors
    :raises ConfigError: if it does not start
    """

    kind = "passt"

    def __init__(
        self,
        id: str,
        loop: EventLoop,
        handover: Handover,
        *,
        program: str = PROGRAM,
        arguments: list[str] | None = None,
        option: str = "-netdev passt",
    ) -> None:
        super().__init__(id, loop, handover)
        self._command = (program, arguments or [], option)
        # It had ended before the update: its start takes time, and may fail, so the guest must
        # not wait for it.
        self._ended = False
        fd = self.parcel.take()
        if fd is not None and _is_gone(fd):
            # Nobody has noticed, if the guest has no driver that looks for frames.
            self.parcel.close(fd)
            fd = None
        if fd is not None:
            self._adopt(fd)
        elif self.parcel.is_incoming:
            self._ended = True
        else:
            self._adopt(launch(*self._command))

    def start(self) -> None:
        super().start()
        if self._ended:
            self._ended = False
            try:
                self._adopt(launch(*self._command))
            except ConfigError as error:
                log.say(str(error))

    def _adopt(self, fd: int) -> None:
        self.parcel.keep(fd)
        self.open_stream(fd)

    @property
    def info(self) -> dict[str, Any]:
        return {"state": "connected" if self.link_up else "ended"}


def launch(program: str, arguments: list[str], option: str) -> int:
    """Start passt; return our end of its socket.

    :raises ConfigError: with its own words if it does not start
    """
    ours, theirs = _socket.socketpair()
    # Not a pipe: the process that passt leaves in the background may hold it open.
    output = os.memfd_create("passt-output", os.MFD_CLOEXEC)
    try:
        argv = [program, "--quiet", *arguments, "--fd", str(_FD)]
        try:
            pid = os.posix_spawnp(
                program,
                argv,
                os.environ,
                file_actions=[
                    (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
                    (os.POSIX_SPAWN_DUP2, output, 1),
                    (os.POSIX_SPAWN_DUP2, output, 2),
                    (os.POSIX_SPAWN_DUP2, theirs.fileno(), _FD),
                ],
                setsigmask=[],
                setsigdef=[_signal.SIGPIPE],
            )
        except OSError as error:
            raise ConfigError(
                f"{option}: cannot start {program}: {error.strerror}; install the package passt,"
                " or give path=FILE"
            ) from None
        status = _wait(pid)
        if status != 0:
            text = os.pread(output, _LONGEST_ERROR, 0).decode("utf-8", "replace")
            lines = [line for line in text.splitlines() if "syslog" not in line]
            last = lines[-1].strip() if lines else f"exit status {status}"
            raise ConfigError(f"{option}: {program} does not start: {last}")
        # It must see the end of the stream when we end.
        ours.setblocking(False)
        return ours.detach()
    finally:
        ours.close()
        theirs.close()
        os.close(output)


def _is_gone(fd: int) -> bool:
    """Return whether nobody is at the other end of a socket."""
    poll = select.poll()
    poll.register(fd, 0)
    return any(revents & select.POLLHUP for _fd, revents in poll.poll(0))


def _wait(pid: int) -> int:
    """Return the exit code, negative for a signal: it comes as soon as passt is in the background.
    A passt that takes too long is killed."""
    watch = os.pidfd_open(pid)
    poll = select.poll()
    poll.register(watch, select.POLLIN)
    if not poll.poll(DEADLINE_S * 1000):
        os.kill(pid, _signal.SIGKILL)
    os.close(watch)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
