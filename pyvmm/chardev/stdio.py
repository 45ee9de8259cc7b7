"""``-chardev stdio``: the process's own standard input and output.

Both are opened anew where that is possible, because O_NONBLOCK belongs to the open file
description, which the shell and whatever else uses the terminal share. A terminal is raw
for as long as the chardev is there. Its modes as they were travel over a live update.
"""

from __future__ import annotations

import os
import stat

from pyvmm.chardev import terminal
from pyvmm.chardev.base import RESIZED
from pyvmm.chardev.fdio import FdChardev
from pyvmm.errors import VmStateError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from _socket import socket as Socket
    from collections.abc import Callable
    from typing import TypeVar

    from pyvmm.chardev.terminal import Modes
    from pyvmm.core.eventloop import EventLoop
    from pyvmm.cpr.handover import Handover

    T = TypeVar("T")

INPUT, OUTPUT = 0, 1


class StdioChardev(FdChardev):
    """The terminal, or what the shell put in its place.

    :param signal: whether Ctrl-C, Ctrl-Z and Ctrl-\\ act on this process rather than being
        input; None: unless the front end takes them
    :param stdin: descriptor that is read; it stays the caller's
    :param stdout: descriptor that is written; it stays the caller's
    """

    def __init__(
        self,
        id: str,
        loop: EventLoop,
        handover: Handover,
        *,
        signal: bool | None = None,
        stdin: int = 0,
        stdout: int = 1,
    ) -> None:
        super().__init__(id, loop, handover)
        self._signal = signal
        self._keys_taken = False
        self._original: Modes | None = None
        self._sockets: set[int] = set()
        self._stdio = (stdin, stdout)
        self._unblocked = 0  # bit n: O_NONBLOCK was set on what the caller's stdio[n] shares
        inherited_in, inherited_out = (self.parcel.take(index) for index in (INPUT, OUTPUT))
        self.is_inherited = inherited_out is not None
        in_fd = self._own(INPUT, inherited_in)
        out_fd = self._own(OUTPUT, inherited_out)
        self.is_terminal = terminal.is_terminal(in_fd) and terminal.is_terminal(out_fd)
        self.is_typed = terminal.is_terminal(in_fd)
        self._open_stream(in_fd, out_fd)
        if self.is_typed and not self.is_inherited:
            self._original = terminal.get_modes(in_fd)
            self.handle_cont()
        elif self.is_typed:
            # Until the front end is there: a key must not end the VMM in between.
            self._keys_taken = not terminal.makes_signals(in_fd)

    @property
    def filename(self) -> str:
        return "stdio"

    def window_size(self) -> tuple[int, int]:
        return terminal.window_size(self._out)

    def handle_cont(self) -> None:
        """Make the terminal raw (again): after SIGCONT, since the shell had it meanwhile."""
        if self._original is None or self._in < 0:
            return
        signals = not self._keys_taken if self._signal is None else self._signal
        raw = terminal.raw_modes(self._original, signals=signals, output=True)
        try:
            terminal.set_modes(self._in, raw)
        except OSError:
            pass  # hung up, which reading will notice

    def take_keys(self, taken: bool) -> None:
        if taken != self._keys_taken:
            self._keys_taken = taken
            self.handle_cont()

    def handle_resize(self) -> None:
        """Tell the front end of another window size: after SIGWINCH."""
        self._tell(RESIZED)

    def save_state(self) -> bytes:
        modes = b"" if self._original is None else terminal.pack_modes(self._original)
        return bytes([self._unblocked]) + modes

    def load_state(self, state: bytes) -> None:
        self._unblocked, self._original = _parse_state(state, self.parcel.name)
        self.handle_cont()

    def close(self) -> None:
        _restore(self._stdio, self._unblocked, self._original)
        self._unblocked, self._original = 0, None
        super().close()

    def _own(self, index: int, inherited: int | None) -> int:
        """Return a descriptor of our own for the caller's, to be preserved; -1 if that is closed.

        A terminal or pipe is opened anew. A socket cannot be (it is used with MSG_DONTWAIT);
        a regular file would lose its position, and neither it nor /dev/null ever blocks.
        """
        fd = self._stdio[index]
        try:
            if inherited is not None:
                own = inherited
            elif os.isatty(fd) or stat.S_ISFIFO(os.fstat(fd).st_mode):
                own = self._reopen(index)
            else:
                own = os.dup(fd)
            if stat.S_ISSOCK(os.fstat(own).st_mode):
                self._sockets.add(own)
        except OSError:
            return -1
        self.parcel.keep(own, index)
        return own

    def _reopen(self, index: int) -> int:
        fd = self._stdio[index]
        access = os.O_RDONLY if index == INPUT else os.O_WRONLY
        flags = access | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
        try:
            return os.open(f"/proc/self/fd/{fd}", flags)
        except OSError:  # another user's terminal, after su: share, and mend that at the end
            own = os.dup(fd)
            if os.get_blocking(own):
                os.set_blocking(own, False)
                self._unblocked |= 1 << index
            return own

    def _read_fd(self, fd: int, count: int) -> bytes:
        if fd not in self._sockets:
            return os.read(fd, count)
        return _on_socket(fd, lambda sock, flags: sock.recv(count, flags))

    def _write_fd(self, fd: int, data: bytes) -> int:
        if fd not in self._sockets:
            return os.write(fd, data)
        return _on_socket(fd, lambda sock, flags: sock.send(data, flags))

    def _can_pour(self) -> bool:
        return super()._can_pour() and self._out not in self._sockets  # they may block

    def _end_input(self) -> None:
        if self.is_terminal and terminal.is_hung_up(self._out):
            self._disconnect()
            return
        # Only the input is over: `pyvmm run < script` goes on printing, and so does a process
        # that a terminal refuses because its shell is gone.
        with self.lock:
            fd, self._in = self._in, -1
        self.loop.remove(fd)
        self.parcel.close(fd, INPUT)
        self._refresh()

    def _release_stream(self, fds: set[int]) -> None:
        for fd in fds:
            self.parcel.close(fd, INPUT if self.parcel.kept(INPUT) == fd else OUTPUT)


def _on_socket(fd: int, call: Callable[[Socket, int], T]) -> T:
    # The socket is shared with others, so it stays blocking and only this call is not.
    import _socket

    sock = _socket.socket(fileno=fd)
    try:
        return call(sock, _socket.MSG_DONTWAIT)
    finally:
        sock.detach()


def restore_terminal(state: bytes) -> None:
    """Give the user the terminal back when the chardev that would do it was never made.

    For a new image that fails early: *state* is what the old one's stdio chardev saved.
    Never raises: there is a worse error to report.
    """
    try:
        unblocked, original = _parse_state(state, "stdio")
    except VmStateError:
        return
    _restore((0, 1), unblocked, original)


def _parse_state(state: bytes, path: str) -> tuple[int, Modes | None]:
    if not state or state[0] > 3:
        raise VmStateError(path, "not the state of a stdio chardev")
    return state[0], terminal.unpack_modes(state[1:], path) if state[1:] else None


def _restore(stdio: tuple[int, int], unblocked: int, original: Modes | None) -> None:
    try:
        if original is not None:
            terminal.set_modes(stdio[INPUT], original)
        for index in (INPUT, OUTPUT):
            if unblocked & 1 << index:
                os.set_blocking(stdio[index], True)
    except OSError:
        pass  # hung up: nobody is left to see it
