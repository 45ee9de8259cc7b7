"""Where a stream socket is: a path in the file system, or a TCP host and port."""

from __future__ import annotations

import _socket
import errno
import os
import stat
import struct

from pyvmm.core.threads import report_crash, spawn
from pyvmm.errors import ConfigError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from pyvmm.core.eventloop import EventLoop

STREAM_TYPE = _socket.SOCK_STREAM | _socket.SOCK_CLOEXEC
LONGEST_PATH = 107  # sockaddr_un.sun_path less its NUL, unix(7)
_BACKLOG = 128
_FILE = struct.Struct("<QQ")


class Address:
    """One address to listen on or to call.

    :param option: the option that gives it, for errors
    """

    #: Which socket families it can have.
    families: tuple[int, ...] = ()
    #: Its family, once resolved.
    family = 0
    #: What the kernel is given, once resolved.
    sockaddr: Any = None

    def __init__(self, option: str) -> None:
        self.option = option

    def __str__(self) -> str:
        """Return the address as ``info chardev`` prints it."""
        raise NotImplementedError

    def resolve(self) -> None:
        """Find :attr:`sockaddr`; once, since looking a name up may take its time.

        :raises ConfigError: if the host is not known
        """

    def find(self, loop: EventLoop, done: Callable[[ConfigError | None], None]) -> None:
        """Find :attr:`sockaddr` without waiting for name servers.

        :param done: called with what was wrong, if anything, at once or from the loop
        """
        done(None)

    def listen(self) -> _socket.socket:
        """Return a nonblocking socket that listens here.

        :raises ConfigError: if the address is in use or not possible
        """
        raise NotImplementedError

    def matches(self, listener: _socket.socket) -> bool:
        """Return whether an inherited listener is for this address."""
        raise NotImplementedError

    def peer(self, fd: int) -> str:
        """Return who is connected, as ``info chardev`` appends it."""
        return ""

    def save_state(self) -> bytes:
        """Return what the next image has to know to clean up."""
        return b""

    def load_state(self, state: bytes) -> None:
        """Take over what :meth:`save_state` gave.

        :raises ValueError: if it is not possible state
        """
        if state:
            raise ValueError(f"{len(state)} bytes of state, not 0")

    def remove(self) -> None:
        """Remove what a listener leaves behind in the file system."""


class UnixAddress(Address):
    """A path.

    :raises ConfigError: if it is too long
    """

    families = (_socket.AF_UNIX,)
    family = _socket.AF_UNIX

    def __init__(self, path: str, option: str) -> None:
        super().__init__(option)
        length = len(os.fsencode(path))
        if not 1 <= length <= LONGEST_PATH:
            raise ConfigError(
                f"{option}: path={path!r} has {length} bytes, a socket's has 1 to"
                f" {LONGEST_PATH}; use another folder or a relative path"
            )
        self.path = path
        self.sockaddr = path
        self._file: tuple[int, int] | None = None  # device and inode of the file we made

    def __str__(self) -> str:
        return f"unix:{self.path}"

    def listen(self) -> _socket.socket:
        sock = _socket.socket(_socket.AF_UNIX, STREAM_TYPE)
        try:
            self._remove_stale()
            sock.bind(self.path)
            sock.listen(_BACKLOG)
        except OSError as error:
            sock.close()
            raise ConfigError(
                f"{self.option}: cannot listen on path={self.path!r}: {error.strerror};"
                " give a path in a folder you may write to"
            ) from error
        except ConfigError:
            sock.close()
            raise
        sock.setblocking(False)
        info = os.lstat(self.path)
        self._file = (info.st_dev, info.st_ino)
        return sock

    def matches(self, listener: _socket.socket) -> bool:
        return bool(listener.getsockname() == self.path)

    def save_state(self) -> bytes:
        return b"" if self._file is None else _FILE.pack(*self._file)

    def load_state(self, state: bytes) -> None:
        if state and len(state) != _FILE.size:
            raise ValueError(f"identity of a socket file in {len(state)} bytes")
        if state and self._file is None:  # else the listener is new, and so is its file
            device, inode = _FILE.unpack(state)
            self._file = (device, inode)

    def remove(self) -> None:
        # Not if somebody has put another file in its place.
        try:
            info = os.lstat(self.path)
            if (info.st_dev, info.st_ino) == self._file:
                os.unlink(self.path)
        except OSError:
            pass

    def _remove_stale(self) -> None:
        try:
            mode = os.lstat(self.path).st_mode
        except FileNotFoundError:
            return
        if not stat.S_ISSOCK(mode):
            raise ConfigError(
                f"{self.option}: path={self.path!r} exists and is no socket; give another path"
            )
        # A datagram socket cannot connect to a listener, which therefore never hears of
        # this, but the kernel looks the name up first and tells the two cases apart.
        probe = _socket.socket(_socket.AF_UNIX, _socket.SOCK_DGRAM | _socket.SOCK_CLOEXEC)
        try:
            problem = probe.connect_ex(self.path)
        finally:
            probe.close()
        if problem == errno.ECONNREFUSED:
            os.unlink(self.path)
        elif problem != errno.ENOENT:
            raise ConfigError(
                f"{self.option}: path={self.path!r} is in use by a running server;"
                " give another path"
            )


class TcpAddress(Address):
    """A host and port.

    :param host: name or address; empty for any address of this host
    :param port: 0 lets the kernel choose, for a server
    """

    families = (_socket.AF_INET, _socket.AF_INET6)

    def __init__(self, host: str, port: int, option: str) -> None:
        super().__init__(option)
        self.host = host
        self.port = port

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"tcp:{host}:{self.port}"

    def peer(self, fd: int) -> str:
        sock = _socket.socket(fileno=fd)
        try:
            host, port = sock.getpeername()[:2]
        except OSError:
            return ""
        finally:
            sock.detach()
        return f" <-> [{host}]:{port}" if ":" in host else f" <-> {host}:{port}"

    def resolve(self) -> None:
        if self.sockaddr is None:
            self.family, self.sockaddr = self._look_up(0)[0]

    def find(self, loop: EventLoop, done: Callable[[ConfigError | None], None]) -> None:
        if self.sockaddr is None:
            try:
                self.family, self.sockaddr = self._look_up(_socket.AI_NUMERICHOST)[0]
            except ConfigError:
                # A thread of its own: getaddrinfo(3) knows no time limit.
                spawn(lambda: self._ask(loop, done), report_crash)
                return
        done(None)

    def _ask(self, loop: EventLoop, done: Callable[[ConfigError | None], None]) -> None:
        problem: ConfigError | None = None
        try:
            self.resolve()
        except ConfigError as error:
            problem = error
        loop.call_soon(lambda: done(problem))

    def listen(self) -> _socket.socket:
        problem: OSError | None = None
        for family, sockaddr in self._look_up(_socket.AI_PASSIVE):
            try:
                sock = _socket.socket(family, STREAM_TYPE)
            except OSError as error:  # no IPv6 here
                problem = error
                continue
            try:
                # A port whose last connections are in TIME_WAIT is free for a server.
                sock.setsockopt(_socket.SOL_SOCKET, _socket.SO_REUSEADDR, 1)
                sock.bind(sockaddr)
                sock.listen(_BACKLOG)
            except OSError as error:
                problem = error
                sock.close()
                continue
            sock.setblocking(False)
            self.port = sock.getsockname()[1]
            return sock
        assert problem is not None
        raise ConfigError(
            f"{self.option}: cannot listen on host={self.host!r}, port={self.port}:"
            f" {problem.strerror}; give another port, or an address of this host"
        ) from problem

    def matches(self, listener: _socket.socket) -> bool:
        port = listener.getsockname()[1]
        if self.port not in (0, port):
            return False
        self.port = port
        return True

    def _look_up(self, flags: int) -> list[tuple[int, Any]]:
        try:
            # Bytes, because text would be put through the idna codec, which is slow to load.
            found = _socket.getaddrinfo(
                self.host.encode("ascii") or None,
                self.port,
                _socket.AF_UNSPEC,
                _socket.SOCK_STREAM,
                0,
                flags,
            )
        except (OSError, UnicodeEncodeError) as error:
            raise ConfigError(
                f"{self.option}: host={self.host!r} is not known"
                f" ({getattr(error, 'strerror', None) or error}); give a name or address of a host"
            ) from error
        return [(entry[0], entry[4]) for entry in found]
