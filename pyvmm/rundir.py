"""The run directory: where running VMs are found by name.

One directory a VM: ``lock``, which its process holds locked as long as it lives, ``info``, and
the sockets of its monitors. The lock is of the kind that belongs to the open file description
(OFD, fcntl(2)), so it goes through an exec with its descriptor, without a moment in between,
and ends with the process however that ends. What a dead VM left behind belongs to whoever
takes the lock next.

``pyvmm run`` uses this on the main loop thread, the verbs ``list``, ``monitor`` and ``update``
in processes of their own. Left out: VMs of other users, and of other hosts.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import struct
import time

from pyvmm._util.keyval import shorten
from pyvmm.errors import ConfigError, HostError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

LOCK = "lock"
INFO = "info"
HMP_SOCKET = "monitor.sock"
QMP_SOCKET = "qmp.sock"
#: All that there is in a VM's directory; the lock goes last.
FILES = (HMP_SOCKET, QMP_SOCKET, INFO, INFO + "~", LOCK)

_SAFE = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_.+@")
_LONGEST_NAME = 255  # NAME_MAX
_MAX_INFO = 4096
_FLOCK = struct.Struct("@hhqqi4x")  # struct flock: type, whence, start, length, pid
# A lock that no living process owns is held by somebody who cleans up, or is just starting.
_ATTEMPTS, _INTERVAL_S = 20, 0.01


class NameInUseError(ConfigError):
    """A running VM has that name."""


class Entry:
    """This process's entry, as long as it holds the lock.

    :param path: its directory
    :param lock_fd: its lock, held; owned from now on
    """

    def __init__(self, path: str, lock_fd: int) -> None:
        self.path = path
        self.lock_fd = lock_fd

    @property
    def name(self) -> str:
        """The VM's name."""
        return decode_name(os.path.basename(self.path))

    def file(self, name: str) -> str:
        """Return the path of one of :data:`FILES`."""
        return os.path.join(self.path, name)

    def write_info(self, values: dict[str, int | str]) -> None:
        """Replace what the entry says about the VM.

        :raises OSError: if it cannot be written
        """
        text = "".join(f"{key}={value}\n" for key, value in values.items())
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
        fd = os.open(self.file(INFO + "~"), flags, 0o600)
        try:
            os.write(fd, text.encode())
        finally:
            os.close(fd)
        os.replace(self.file(INFO + "~"), self.file(INFO))

    def remove(self) -> None:
        """The VM ends: leave nothing behind. Never raises."""
        if _is_current(self.path, self.lock_fd):
            _remove(self.path)
        os.close(self.lock_fd)


def base() -> str:
    """Return the directory of all entries of this user; it need not exist."""
    uid = os.geteuid()
    for parent in (os.environ.get("XDG_RUNTIME_DIR", ""), f"/run/user/{uid}"):
        try:
            # Someone who became root kept the variable; root's files do not belong there.
            if os.path.isabs(parent) and os.stat(parent).st_uid == uid:
                return os.path.join(parent, "pyvmm")
        except OSError:
            continue
    return f"/tmp/pyvmm-{uid}"


def encode_name(name: str) -> str:
    """Return a VM's name as a file name: other characters than the usual ones as %XX."""
    safe = _SAFE if name.strip(".") else ()
    return "".join(
        char if char in safe else "".join(f"%{byte:02X}" for byte in os.fsencode(char))
        for char in name
    )


def decode_name(text: str) -> str:
    """Return the VM's name that :func:`encode_name` made ``text`` of."""
    head, *rest = text.split("%")
    raw = os.fsencode(head)
    for part in rest:
        try:
            raw += bytes((int(part[:2], 16),)) + os.fsencode(part[2:])
        except ValueError:
            raw += b"%" + os.fsencode(part)
    return os.fsdecode(raw)


def reserve(name: str) -> Entry:
    """Take a name, clear away what a dead VM left under it, and return the entry.

    :raises NameInUseError: a running VM has it
    :raises ConfigError: the name is not possible
    :raises HostError: the run directory cannot be used
    """
    path = _path(name)
    for _ in range(_ATTEMPTS):
        try:
            _make_directory(os.path.dirname(path))
            _make_directory(path)
            fd = _open_lock(path, os.O_CREAT)
        except FileNotFoundError:
            continue  # somebody cleaned up in between
        except OSError as error:
            raise HostError(f"{path}: {error.strerror}") from None
        if try_lock(fd):
            if _is_current(path, fd):
                _remove(path, keep_lock=True)
                return Entry(path, fd)
            os.close(fd)
            continue
        os.close(fd)
        pid = read_info(path).get("pid", 0)
        if is_alive(pid):
            raise NameInUseError(
                f"-name {shorten(name)}: process {pid} runs a VM of that name; give another name, "
                "or end that one by its monitor's quit"
            )
        time.sleep(_INTERVAL_S)
    raise NameInUseError(
        f"-name {shorten(name)}: another VM of that name is starting; give another name"
    )


def inherit(lock_fd: int) -> Entry | None:
    """Return the entry of the image before, by the lock that came through the exec. If somebody
    removed its directory meanwhile, close the lock and return None."""
    path = os.path.dirname(os.readlink(f"/proc/self/fd/{lock_fd}"))
    if try_lock(lock_fd) and _is_current(path, lock_fd):
        return Entry(path, lock_fd)
    os.close(lock_fd)
    return None


def names() -> list[str]:
    """Return the names of the VMs that run; what dead ones left is removed.

    :raises HostError: the run directory is not this user's own
    """
    directory = base()
    try:
        _check_directory(directory)
        entries = sorted(os.listdir(directory))
    except FileNotFoundError:
        return []
    except OSError as error:
        raise HostError(f"{directory}: {error.strerror}") from None
    return [decode_name(entry) for entry in entries if _runs(os.path.join(directory, entry))]


def directory(name: str) -> str:
    """Return the directory of the VM of that name, which may not exist.

    :raises ConfigError: the name is not possible
    """
    return _path(name)


def read_info(path: str) -> dict[str, Any]:
    """Return what an entry says about its VM: ``pid``, ``memory`` (bytes), ``smp``, ``started``
    (CLOCK_MONOTONIC, ms), ``updates``, all int, and ``version``; empty if it says nothing."""
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
    try:
        fd = os.open(os.path.join(path, INFO), flags)
    except OSError:
        return {}
    try:
        text = os.read(fd, _MAX_INFO).decode("utf-8", "replace")
    except OSError:
        return {}
    finally:
        os.close(fd)
    found: dict[str, Any] = {}
    for line in text.splitlines():
        key, _, value = line.partition("=")
        found[key] = int(value) if value.isascii() and value.isdecimal() else value
    return found


def is_alive(pid: object) -> bool:
    """Return whether there is a process of that id."""
    return type(pid) is int and 0 < pid < 1 << 31 and os.path.exists(f"/proc/{pid}")


def try_lock(fd: int) -> bool:
    """Try to take the lock; return whether this open file description has it now."""
    try:
        _fcntl_lock(fd, fcntl.F_OFD_SETLK)
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):
            return False
        raise HostError(f"The run directory's file system: {error.strerror}") from None
    return True


def is_locked(fd: int) -> bool:
    """Return whether somebody else has the lock."""
    found: int = _FLOCK.unpack(_fcntl_lock(fd, fcntl.F_OFD_GETLK))[0]
    return found != fcntl.F_UNLCK


def _fcntl_lock(fd: int, command: int) -> bytes:
    # The kernel demands l_pid = 0 of a lock of this kind.
    return fcntl.fcntl(fd, command, _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0))


def _path(name: str) -> str:
    encoded = encode_name(name)
    if not 0 < len(encoded) <= _LONGEST_NAME:
        raise ConfigError(f"-name: a name of {len(name)} characters is not possible; shorten it")
    return os.path.join(base(), encoded)


def _make_directory(path: str) -> None:
    try:
        os.mkdir(path, 0o700)
    except FileExistsError:
        _check_directory(path)


def _check_directory(path: str) -> None:
    # In /tmp anybody may have been there first, and would own what is put into it.
    info = os.lstat(path)
    if not stat.S_ISDIR(info.st_mode):
        problem = "is no directory"
    elif info.st_uid != os.geteuid():
        problem = f"belongs to user {info.st_uid}"
    elif info.st_mode & 0o077:
        problem = f"is open to others (mode {stat.S_IMODE(info.st_mode):o}, not 700)"
    else:
        return
    raise HostError(f"{path} {problem}; remove it, or set XDG_RUNTIME_DIR to a directory of yours")


def _open_lock(path: str, flags: int = 0) -> int:
    flags |= os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
    return os.open(os.path.join(path, LOCK), flags, 0o600)


def _is_current(path: str, fd: int) -> bool:
    # Whoever cleaned up between the open and the lock has unlinked the file.
    try:
        info, own = os.lstat(os.path.join(path, LOCK)), os.fstat(fd)
    except OSError:
        return False
    return (info.st_dev, info.st_ino) == (own.st_dev, own.st_ino)


def _runs(path: str) -> bool:
    """Return whether the VM of an entry lives; what is left of a dead one is removed."""
    try:
        _check_directory(path)
        fd = _open_lock(path)
    except FileNotFoundError:
        # Left half removed, or just being made: no lock tells, so no more than this.
        _try(os.rmdir, path)
        return False
    except (OSError, HostError):
        return False
    try:
        if is_locked(fd):
            return True
        if try_lock(fd) and _is_current(path, fd):
            _remove(path)
        return False
    except (OSError, HostError):
        return False
    finally:
        os.close(fd)


def _remove(path: str, *, keep_lock: bool = False) -> None:
    """Remove an entry's files; the caller holds its lock."""
    for name in FILES[:-1] if keep_lock else FILES:
        _try(os.unlink, os.path.join(path, name))
    if not keep_lock:
        _try(os.rmdir, path)


def _try(remove: Callable[[str], None], path: str) -> None:
    try:
        remove(path)
    except OSError:
        pass
