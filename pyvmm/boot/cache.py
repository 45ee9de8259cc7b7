"""Unpacked kernels on disk, by the content that they were unpacked from.

``$XDG_CACHE_HOME/pyvmm`` (default ``~/.cache/pyvmm``) has a file for each, named by the SHA-256 of
the payload, with their length behind the data. A cache is never needed: whatever cannot be read,
written or trusted counts as absent, without a word. Several machines may use it at once, and any
may be killed or lose power: files are written aside, to the disk, and renamed. There is no
checksum, which would take as long as all the rest of loading a kernel. Main thread, fresh boots
only.
"""

from __future__ import annotations

import os
import stat

from pyvmm.boot.blob import FileBlob
from pyvmm.errors import ConfigError

CACHE_MAX = 512 << 20
"""Bytes that all files together may have; the ones used longest ago go first."""

_LENGTH_SIZE = 8


def key(payload: bytes) -> str:
    """Return the name under which what *payload* unpacks to is kept."""
    import hashlib

    return hashlib.sha256(payload).hexdigest()


def get(name: str) -> FileBlob | None:
    """Return what is kept as *name*, to be closed by the caller; None if that is nothing, or not
    all of it."""
    try:
        path = os.path.join(_folder(), name)
        blob = FileBlob(path, "cache", CACHE_MAX)
    except (OSError, ConfigError):
        return None
    try:
        end = blob.size - _LENGTH_SIZE
        if end <= 0 or blob.read(end, _LENGTH_SIZE) != _length(end):
            raise blob.error("damaged")
        blob.size = end
    except ConfigError:
        blob.close()
        return None
    try:
        os.utime(path)
    except OSError:
        pass  # a cache that can only be read
    return blob


def put(name: str, data: bytes) -> None:
    """Keep *data* as *name*, and let older files go if there is too much then."""
    if len(data) + _LENGTH_SIZE > CACHE_MAX:
        return
    aside = ""
    try:
        folder = _folder(make=True)
        aside = os.path.join(folder, f".{name}.{os.urandom(4).hex()}")
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        with open(os.open(aside, flags, 0o600), "wb", buffering=0) as file:
            for part in (data, _length(len(data))):
                rest = memoryview(part)
                while rest:
                    rest = rest[file.write(rest) :]
            os.fsync(file.fileno())
        os.rename(aside, os.path.join(folder, name))
        aside = ""
        _trim(folder)
    except OSError:
        pass
    finally:
        if aside:
            try:
                os.unlink(aside)
            except OSError:
                pass


def _length(size: int) -> bytes:
    return size.to_bytes(_LENGTH_SIZE, "little")


def _folder(make: bool = False) -> str:
    """Return the cache's folder.

    :raises OSError: there is none, or others than the user can put kernels there
    """
    base = os.environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(base):  # the XDG specification says to ignore a relative one
        base = os.path.expanduser("~/.cache")
    if not os.path.isabs(base):
        raise FileNotFoundError  # no home directory either
    folder = os.path.join(base, "pyvmm")
    if make:
        os.makedirs(folder, 0o700, exist_ok=True)
    status = os.lstat(folder)
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid() or status.st_mode & 0o22:
        raise PermissionError
    return folder


def _trim(folder: str) -> None:
    # What a killed process left aside is among them, and goes when it is old.
    found = []
    for entry in os.scandir(folder):
        status = entry.stat(follow_symlinks=False)
        found.append((status.st_mtime_ns, status.st_size, entry.path))
    total = 0
    for _, size, path in sorted(found, reverse=True):
        total += size
        if total > CACHE_MAX:
            os.unlink(path)
