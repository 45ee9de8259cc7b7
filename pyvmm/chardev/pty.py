"""``-chardev pty``: a new pseudo terminal, for whoever opens it.

The kernel does not tell when somebody opens the other side, only whether it is closed; so
while nobody is there it is looked at once a second, and whenever there is output. The master
lives through a live update, and with it the terminal's name.
"""

from __future__ import annotations

import fcntl
import os
import select
import sys

from pyvmm._util import log
from pyvmm.chardev import terminal
from pyvmm.chardev.fdio import FdChardev
from pyvmm.core.eventloop import HANGUP
from pyvmm.errors import ConfigError, HostError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pyvmm.core.eventloop import EventLoop, Timer
    from pyvmm.cpr.handover import Handover

_LOOK_S = 1.0
_TIOCGPTN = 0x80045430  # number of the terminal, asm-generic/ioctls.h


class PtyChardev(FdChardev):
    """A pseudo terminal, raw from the start.

    :param path: where to make a symbolic link to it; empty for none
    :param option: the option that asked for it, for errors
    :param announced: say its name on standard output; a monitor's client gets it in the reply
    :raises ConfigError: if there is a file at *path*
    :raises HostError: if the host has no pseudo terminal left
    :raises VmStateError: if an inherited descriptor is no pseudo terminal
    """

    def __init__(
        self,
        id: str,
        loop: EventLoop,
        handover: Handover,
        *,
        path: str = "",
        option: str = "-chardev",
        announced: bool = True,
    ) -> None:
        super().__init__(id, loop, handover)
        self._path = path
        self._has_link = False
        self._timer: Timer | None = None
        self._poll = select.poll()
        inherited = self.parcel.take()
        if inherited is None:
            self._master = _open_pty(id)
        else:
            self._master = inherited
        self.parcel.keep(self._master)
        try:
            self._terminal = self._find_name()
            os.set_blocking(self._master, False)
            if path:
                self._link(option, inherited is not None)
        except BaseException:
            self.close()
            raise
        if inherited is None and announced:
            # On standard output, as QEMU says it.
            log.out.write(f"char device redirected to {self._terminal} (label {id})\n")
        self._poll.register(self._master, 0)
        self.is_inherited = inherited is not None and self._is_open()
        self._look()

    @property
    def filename(self) -> str:
        return f"pty:{self._terminal}"

    def write(self, data: bytes) -> int:
        # Somebody who only listens would otherwise miss up to a second.
        if not self.connected and self._master >= 0 and self._is_open():
            self.loop.call_soon(self._look)
        return super().write(data)

    def window_size(self) -> tuple[int, int]:
        return terminal.window_size(self._master)

    def close(self) -> None:
        super().close()
        if self._timer is not None:
            self._timer.cancel()
        if self._master >= 0:
            if self._has_link and _read_link(self._path) == self._terminal:
                try:
                    os.unlink(self._path)
                except OSError:
                    pass  # its folder can no longer be written
            self.parcel.close(self._master)
            self._master = -1

    def _is_open(self) -> bool:
        with self.lock:  # two threads may not poll with one object
            return not any(revents & HANGUP for _fd, revents in self._poll.poll(0))

    def _look(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self.connected or self._master < 0:
            return
        if self._is_open():
            self._open_stream(self._master, self._master)
        else:
            self._timer = self.loop.call_later(_LOOK_S, self._look)

    def _handle_disconnected(self) -> None:
        self._look()

    def _release_stream(self, fds: set[int]) -> None:
        """The master stays for the next one who opens the terminal."""

    def _find_name(self) -> str:
        try:
            number = fcntl.ioctl(self._master, _TIOCGPTN, bytes(4))
        except OSError:
            raise self._error(
                f"inherited descriptor {self._master} is no pseudo terminal"
            ) from None
        return f"/dev/pts/{int.from_bytes(number, sys.byteorder)}"

    def _link(self, option: str, inherited: bool) -> None:
        """Make the link, unless the image before us has made it. If that link was removed and
        cannot be made again (its folder is gone, too), an update goes on without."""
        present = _read_link(self._path)
        if present != self._terminal:
            try:
                if present.startswith("/dev/pts/") and not os.path.exists(present):
                    os.unlink(self._path)  # of a process that died
                os.symlink(self._terminal, self._path)
            except OSError as error:
                if inherited:
                    return
                raise ConfigError(
                    f"{option}: cannot make the link path={self._path!r}: {error.strerror};"
                    " give a path where no file is yet"
                ) from error
        self._has_link = True


def _open_pty(id: str) -> int:
    try:
        master, slave = os.openpty()
    except OSError as error:
        raise HostError(f"Cannot open a pseudo terminal for {id}: {error.strerror}") from error
    # Only the new terminal itself has the modes; they stay when this descriptor goes.
    modes = terminal.raw_modes(terminal.get_modes(slave), signals=False, output=False)
    terminal.set_modes(slave, modes)
    os.close(slave)
    return master


def _read_link(path: str) -> str:
    try:
        return os.readlink(path)
    except OSError:
        return ""
