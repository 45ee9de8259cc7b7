"""What pyvmm says on standard error and standard output while a guest depends on it.

Whoever reads them is a stranger: a pipe whose reader stopped or left, a terminal that was hung
up or holds its output back (Ctrl-S), a file on a full disk. So nothing here raises or waits for
a reader. A message that is not taken is dropped and counted, and the number stands before the next
one that is taken. Any thread may call; a regular file takes a message as fast as its disk does.

O_NONBLOCK belongs to the open file description, which the shell and others share. So a pipe or
a terminal is opened anew for each message, of which there are few; what cannot be opened anew
(a socket, or another user's terminal after su) is asked with poll(2) before each write.
"""

from __future__ import annotations

import _thread
import errno
import os
import select
import stat
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

#: Bytes of a message; the rest is cut off. As PIPE_BUF, so that a pipe takes all or nothing.
LONGEST = 4096
# How long one thread waits for another that is just writing.
_LOCK_TIMEOUT_S = 1.0
# While these last, looking again brings nothing: the reader is gone, or there never was one.
_GONE = (errno.EPIPE, errno.EIO, errno.EBADF, errno.ENXIO, errno.ECONNRESET, errno.ENOTCONN)


class Sink:
    """A descriptor that messages go to, a line or several at a time.

    :param fd: it stays the caller's, with the flags that it has
    """

    def __init__(self, fd: int) -> None:
        self.fd = fd
        #: How many messages were not taken, or not as a whole.
        self.dropped = 0
        #: Called when the first message is dropped after one was taken. Any thread.
        self.on_drop: Callable[[], None] | None = None
        self._untold = 0
        self._mid_line = False
        self._lock = _thread.allocate_lock()

    def write(self, text: str, patience_s: float = 0) -> bool:
        """Write lines; return whether they were taken.

        :param patience_s: how long to wait for a reader; 0 if anything waits for the caller
        """
        if patience_s:
            self._wait_writable(patience_s)
        return self._guarded(text) == 0

    def catch_up(self) -> bool:
        """Tell how many messages were dropped, if that was not told yet. Return False if it
        is worth trying again."""
        return self._untold == 0 or self._guarded("") in (0, *_GONE)

    def _guarded(self, text: str) -> int:
        """Write *text*, and before it how many messages were dropped, if that was not told yet;
        return 0, or an error number."""
        # A handler of a signal may come here again in the middle of it.
        locked = self._lock.acquire(timeout=_LOCK_TIMEOUT_S)
        try:
            problem = self._write(text) if locked else errno.EAGAIN
            is_first = problem != 0 and self._untold == 0
            if problem == 0:
                self._untold = 0
            elif text:
                self.dropped += 1
                self._untold += 1
        finally:
            if locked:
                self._lock.release()
        if is_first and self.on_drop is not None:
            self.on_drop()
        return problem

    def _write(self, text: str) -> int:
        if self._untold:
            plural = "message was" if self._untold == 1 else "messages were"
            text = f"pyvmm: {self._untold} {plural} dropped\n{text}"
        if self._mid_line:
            text = f"\n{text}"
        if os.isatty(self.fd):
            # A guest's console has made it raw.
            text = text.replace("\n", "\r\n")
        data = text.encode("utf-8", "backslashreplace")
        if len(data) > LONGEST:
            data = data[: LONGEST - 5] + b"...\r\n"
        try:
            taken = _write_now(self.fd, data)
        except OSError as error:
            return error.errno or errno.EIO
        self._mid_line = taken < len(data)
        return errno.EAGAIN if self._mid_line else 0

    def _wait_writable(self, timeout_s: float) -> None:
        try:
            poll = select.poll()
            poll.register(self.fd, select.POLLOUT)
            poll.poll(int(timeout_s * 1000))
        except OSError:
            pass


class Stream:
    """``sys.stderr`` of a process that has a guest: tracebacks, warnings and whatever else
    prints there by itself goes to a :class:`Sink`, line by line."""

    encoding = "utf-8"
    errors = "backslashreplace"
    closed = False

    def __init__(self, sink: Sink) -> None:
        self._sink = sink
        self._line = ""

    def write(self, text: str) -> int:
        """Write the lines that are complete and keep the rest; return the length of *text*."""
        lines, newline, rest = (self._line + text).rpartition("\n")
        self._line = rest[-LONGEST:]
        for line in lines.split("\n") if newline else ():
            self._sink.write(f"{line}\n")
        return len(text)

    def flush(self) -> None:
        """Do nothing: a line that has no end yet waits for it."""

    def isatty(self) -> bool:
        """Return whether the descriptor is a terminal."""
        return os.isatty(self._sink.fd)

    def fileno(self) -> int:
        """Return the descriptor behind it."""
        return self._sink.fd

    def writable(self) -> bool:
        """Return True, as a text stream does that can be written."""
        return True


out = Sink(1)
err = Sink(2)


def say(text: str, patience_s: float = 0) -> None:
    """Tell the operator something, on standard error."""
    err.write(f"pyvmm: {text}\n", patience_s)


def guard_stderr() -> None:
    """From now on nothing that Python itself prints on standard error can raise or wait."""
    sys.stderr = Stream(err)


def _write_now(fd: int, data: bytes) -> int:
    """Write what can be written without waiting for a reader; return how many bytes it was.

    :raises OSError: nothing was
    """
    if stat.S_ISREG(os.fstat(fd).st_mode):
        # A file that is opened anew would be written from its beginning.
        return os.write(fd, data)
    flags = os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
    try:
        own = os.open(f"/proc/self/fd/{fd}", flags)
    except OSError:
        return _write_polled(fd, data)
    try:
        return os.write(own, data)
    finally:
        os.close(own)


def _write_polled(fd: int, data: bytes) -> int:
    # A terminal may say that it is ready when it has room for one byte.
    step = 1 if os.isatty(fd) else len(data)
    poll = select.poll()
    poll.register(fd, select.POLLOUT)
    taken = 0
    while taken < len(data):
        if not poll.poll(0):
            if taken:
                break
            raise BlockingIOError(errno.EAGAIN, "nobody reads")
        taken += os.write(fd, data[taken : taken + step])
    return taken
