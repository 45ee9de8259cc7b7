"""Unpacked kernels on disk, by the content that they were unpacked from.

``$XDG_CACHE_HOME/pyvmm`` (default ``~/.cache/pyvmm``) has a file for each, named by the SHA-256 of
the payload, with a CRC-32 behind the data. A cache is never needed: whatever cannot be read,
written or trusted counts as absent, without a word. Several machines may use it at once: files
are written aside and renamed. Main thread, fresh boots only.
"""

from __future__ import annotations

import os
import stat

from pyvmm.boot.image import ImageFile
from pyvmm.errors import ConfigError

CACHE_MAX = 512 << 20
"""Bytes that all files together may have; the ones used longest ago go first."""

_CRC_SIZE = 4
_STEP = 256 << 10


def key(payload: bytes) -> str:
    """Return the name under which what *payload* unpacks to is kept."""
    import hashlib

    return hashlib.sha256(payload).hexdigest()


def get(name: str) -> ImageFile | None:
    """Return what is kept as *name*, with a checksum behind it, to be closed by the caller; None
    if that is nothing, or damaged."""
    import zlib

    try:
        path = os.path.join(_folder(), name)
        image = ImageFile(path, "cache", CACHE_MAX)
    except (OSError, ConfigError):
        return None
    try:
        crc, end = 0, image.size - _CRC_SIZE
        for at in range(0, end, _STEP):
            crc = zlib.crc32(image.read(at, min(_STEP, end - at)), crc)
        if end <= 0 or image.read(end, _CRC_SIZE) != crc.to_bytes(_CRC_SIZE, "little"):
            raise image.error("damaged")
    except ConfigError:
        image.close()
        return None
    try:
        os.utime(path)
    except OSError:
        pass  # a cache that can only be read
    return image


def put(name: str, data: bytes) -> None:
    """Keep *data* as *name*, and let older files go if there is too much then."""
    import zlib

    if len(data) + _CRC_SIZE > CACHE_MAX:
        return
    aside = ""
    try:
        folder = _folder(make=True)
        aside = os.path.join(folder, f".{name}.{os.urandom(4).hex()}")
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        with open(os.open(aside, flags, 0o600), "wb", buffering=0) as file:
            for part in (memoryview(data), zlib.crc32(data).to_bytes(_CRC_SIZE, "little")):
                rest = memoryview(part)
                while rest:
                    rest = rest[file.write(rest) :]
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


def _folder(make: bool = False) -> str:
    """The cache's folder.

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
