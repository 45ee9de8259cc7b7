"""Chardevs on file descriptors: what stdio, files, ptys and sockets have in common.

Input is polled for only while the front end has room; an idle descriptor stays registered
with no events, so that a hang-up is still noticed. Bytes that a peer wrote before it went
are delivered before its CLOSED. Any thread writes; all else is the loop thread's.

A write that fails ends nothing. Full disks, quotas and size limits pass, a FIFO may get another
reader, and who no longer reads may still write. So what is not taken is dropped and counted, the
next write is tried like any other, and only reading and hang-ups tell that a peer is gone.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import termios

from pyvmm.chardev.base import CLOSED, OPENED, Chardev
from pyvmm.core.eventloop import HANGUP, READABLE, WRITABLE
from pyvmm.errors import VmStateError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from pyvmm.chardev.base import Frontend
    from pyvmm.core.eventloop import EventLoop
    from pyvmm.cpr.handover import Handover

# Bytes that one wake-up reads: a flood on one chardev must not keep the loop from the others.
CHUNK = 4096
_RECOVER_S = 1.0
# The host is short of memory, while poll(2) says that there is room: looked at again by time.
_SHORT = (errno.ENOBUFS, errno.ENOMEM)
_SHORT_S = 0.1


class FdChardev(Chardev):
    """A chardev with a stream to read and one to write, often the same descriptor.

    Descriptors are nonblocking, and owned from :meth:`_open_stream` on.
    """

    def __init__(self, id: str, loop: EventLoop, handover: Handover) -> None:
        super().__init__(id, loop, handover)
        self._in = -1
        self._out = -1
        self._connected = False
        self._output_full = False  # a write was cut short, and handle_writable is owed
        self._resting = False  # for want of the host's memory: poll(2) would not wait
        self._hung_up = False  # the peer is gone, but not all it wrote has been read
        self._input_ended = False  # the peer will send no more, but is owed output
        self._input_wanted = False
        self._refresh_queued = False

    @property
    def connected(self) -> bool:
        return self._connected

    @property
    def waits_for_host(self) -> bool:
        # O_NONBLOCK means nothing to a regular file.
        return self._out >= 0 and stat.S_ISREG(os.fstat(self._out).st_mode)

    def write(self, data: bytes) -> int:
        with self.lock:
            if self._out < 0 or (self._hung_up and self._in == self._out):
                return len(data)
            try:
                taken = self._write_fd(self._out, data)
            except BlockingIOError:
                taken = 0
            except OSError as error:
                if error.errno not in _SHORT:
                    # With one descriptor for both directions the error says that the peer is
                    # gone, or that reading will find it gone in a moment.
                    if self._in != self._out:
                        self.drop(len(data), error.strerror or str(error))
                    return len(data)
                taken = 0
                if not self._resting:
                    self._resting = True
                    self.loop.call_soon(self._rest)
            if taken < len(data):
                self._set_full()
            return taken

    def pour(self, move: Callable[[int], tuple[int, bool]]) -> tuple[int, bool]:
        with self.lock:
            if not self._can_pour():
                return 0, False
            moved, is_full = move(self._out)
            if is_full:
                self._set_full()
            return moved, is_full

    def accept_input(self) -> None:
        # Costs nothing while input is polled for anyway, which is nearly always.
        if not self._input_wanted and not self._refresh_queued:
            self._refresh_queued = True
            self.loop.call_soon(self._refresh)

    def close(self) -> None:
        self._drop_stream()
        self._connected = False

    def recover(self) -> None:
        """One of the loop's calls to this chardev failed: go on, without failing all the time."""
        self.loop.call_later(_RECOVER_S, self._refresh)

    # What a kind of chardev has of its own.

    def _read_fd(self, fd: int, count: int) -> bytes:
        return os.read(fd, count)

    def _write_fd(self, fd: int, data: bytes) -> int:
        return os.write(fd, data)

    def _can_pour(self) -> bool:
        """Return whether :meth:`write` would do no more than write to the stream. With the lock
        held."""
        return self._out >= 0 and not self._hung_up

    def _end_input(self) -> None:
        """No more input will come: by default, the peer is gone, or will be when it has what
        is owed to it (``nc -N`` closes one direction and reads on)."""
        if self._output_full and not self._input_ended:
            self._input_ended = True
            self._refresh()
        else:
            self._disconnect()

    def _release_stream(self, fds: set[int]) -> None:
        """The stream is no longer used: by default, its descriptors are closed."""
        for fd in fds:
            self.parcel.close(fd)

    def _handle_disconnected(self) -> None:
        """The peer is gone and the front end knows: look out for another."""

    # For the kinds of chardev.

    def _open_stream(self, in_fd: int, out_fd: int) -> None:
        """Begin with a peer, which is there. -1 stands for a direction that does not exist."""
        with self.lock:
            self._in, self._out = in_fd, out_fd
            self._output_full = False
        self._hung_up = self._input_ended = False
        self._connected = True
        self._refresh()
        self._tell(OPENED)

    def _disconnect(self) -> None:
        """The peer is gone: release the stream, tell the front end."""
        if not self._connected:
            return
        owed = self._output_full
        self._drop_stream()
        self._connected = self.is_inherited = False
        self._tell(CLOSED)
        if owed and self.frontend is not None:
            self.frontend.handle_writable()  # what it holds back is dropped from now on
        self._handle_disconnected()

    def _tell(self, event: str) -> None:
        if self.frontend is not None:
            self.frontend.handle_event(event)

    def _error(self, problem: str) -> VmStateError:
        return VmStateError(self.parcel.name, problem)

    # Readiness.

    def _refresh(self) -> None:
        """Ask the loop for what is wanted now."""
        # In this order: a front end that makes room between the two lines, on its own
        # thread, must find that input is not polled for and queue another look.
        self._refresh_queued = self._input_wanted = False
        room = self.frontend.can_receive() if self.frontend is not None else 0
        self._input_wanted = room > 0 and self._in >= 0 and not self._input_ended
        reading = READABLE if self._input_wanted else 0
        writing = WRITABLE if self._output_full and not self._resting else 0
        if self._in == self._out:
            self._watch(self._in, reading | writing)
        else:
            self._watch(self._in, reading)
            self._watch(self._out, writing)

    def _watch(self, fd: int, events: int) -> None:
        # A hang-up cannot be masked: polling for nothing else would spin. That nobody reads
        # matters only once there is something to write.
        if not events and (fd != self._in or self._hung_up):
            self.loop.remove(fd)
        elif fd >= 0:
            handler = self._handle_input if fd == self._in else self._handle_output
            self.loop.add(fd, events, handler)

    def _handle_input(self, revents: int) -> None:
        if revents & WRITABLE or (revents & HANGUP and self._output_full):
            self._handle_writable()
        if self._in < 0:
            return
        if self._input_wanted and revents & (READABLE | HANGUP):
            self._read_once()
        elif revents & HANGUP:
            self._handle_hangup()

    def _handle_output(self, _revents: int) -> None:
        # Also if it hung up: what is owed is dropped then.
        self._handle_writable()

    def _handle_writable(self) -> None:
        with self.lock:
            owed, self._output_full = self._output_full, False
        if owed and self.frontend is not None:
            self.frontend.handle_writable()
        self._refresh()
        if self._input_ended and not self._output_full:
            self._disconnect()

    def _set_full(self) -> None:
        # With the lock held.
        if not self._output_full:
            self._output_full = True
            self.loop.call_soon(self._refresh)

    def _rest(self) -> None:
        self.loop.call_later(_SHORT_S, self._end_rest)
        self._refresh()

    def _end_rest(self) -> None:
        self._resting = False
        self._handle_writable()

    def _handle_hangup(self) -> None:
        if _pending(self._in):
            self._hung_up = True
            self._handle_writable()
        else:
            self._end_input()

    def _read_once(self) -> None:
        room = self.frontend.can_receive() if self.frontend is not None else 0
        if room > 0 and self.frontend is not None:
            if self._hung_up:  # if the peer still is gone, the next poll will say so
                self._hung_up = False
            try:
                data = self._read_fd(self._in, min(room, CHUNK))
            except BlockingIOError:
                return
            except OSError as error:  # ECONNRESET, EIO of a terminal that is gone
                if error.errno in _SHORT:
                    self.loop.remove(self._in)
                    self.loop.call_later(_SHORT_S, self._refresh)
                    return
                data = b""
            if not data:
                self._end_input()
                return
            self.frontend.receive(data)
        self._refresh()

    def _drop_stream(self) -> None:
        with self.lock:
            fds = {self._in, self._out} - {-1}
            self._in = self._out = -1
            self._output_full = False
        self._input_wanted = False
        for fd in fds:
            self.loop.remove(fd)
        if fds:
            self._release_stream(fds)


def read_socket(frontend: Frontend | None, fd: int, count: int) -> bytes:
    """Return up to ``count`` bytes from a socket. Descriptors that come along go to the front
    end's ``rights``, if it has any."""
    rights = frontend.rights if frontend is not None else None
    return os.read(fd, count) if rights is None else rights.receive(fd, count)


def _pending(fd: int) -> bool:
    if fd < 0:
        return False
    try:
        count = fcntl.ioctl(fd, termios.FIONREAD, bytes(4))
    except OSError:
        return False
    return any(count)
