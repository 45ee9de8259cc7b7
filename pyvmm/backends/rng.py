"""Where random numbers come from: ``-object rng-builtin`` and ``rng-random``, under QEMU's names.

The kernel's generator, which never blocks, or a file or device that the operator names, for whose
bytes the loop waits. Loop thread only.
"""

from __future__ import annotations

import os
import stat

from pyvmm._util import log
from pyvmm._util.keyval import check_id, check_keys, shorten
from pyvmm.core.eventloop import READABLE
from pyvmm.cpr.handover import RNG
from pyvmm.errors import ConfigError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable

    from pyvmm.core.eventloop import EventLoop
    from pyvmm.cpr.handover import Handover

BUILTIN, RANDOM = KINDS = ("rng-builtin", "rng-random")
DEFAULT_FILE = "/dev/urandom"


class RngConfig:
    """A source that is asked for.

    :ivar filename: empty for the kernel's generator
    """

    __slots__ = ("filename", "id")

    def __init__(self, kind: str, options: dict[str, str]) -> None:
        """:raises ConfigError: for a key or value that the kind does not have"""
        where = f"-object {kind}"
        check_keys(options, ("id", "filename") if kind == RANDOM else ("id",), where)
        if "id" not in options:
            raise ConfigError(f"{where}: id= is missing; give it a name, id=NAME")
        check_id(options["id"], where)
        self.id = options["id"]
        self.filename = options.get("filename", DEFAULT_FILE) if kind == RANDOM else ""


def check_rngs(rngs: list[RngConfig], taken: Collection[str], users: Iterable[str]) -> None:
    """See that each device has the source that it names, for itself.

    :param taken: ids of other objects
    :param users: ``rng=`` of each device
    :raises ConfigError: two objects of one name, a name that nothing has, two devices on one
    """
    ids = [rng.id for rng in rngs]
    for id in ids:
        if ids.count(id) > 1 or id in taken:
            raise ConfigError(f"-object: the id {id} is given twice; rename one")
    used = set()
    for name in users:
        where = f"-device virtio-rng-device: rng={shorten(name)}"
        if name not in ids:
            raise ConfigError(f"{where}: there is no such source; add -object rng-random,id=ID")
        if name in used:
            raise ConfigError(f"{where}: it is in use by another device; add an -object")
        used.add(name)


class Rng:
    """The kernel's generator."""

    def read(self, count: int, ready: Callable[[], None]) -> bytes:
        """Return at most ``count`` random bytes; none if there are none now.

        :param ready: called when there are some again
        """
        return os.getrandom(count)

    def close(self) -> None:
        """Give everything back. Idempotent."""


class RngFile(Rng):
    """A file or device. An update keeps its descriptor.

    :raises ConfigError: it cannot be read
    """

    def __init__(self, config: RngConfig, loop: EventLoop, handover: Handover) -> None:
        self._loop = loop
        self._parcel = handover.parcel(RNG, config.id)
        self._path = config.filename
        inherited = self._parcel.take()
        self._fd = _open(config) if inherited is None else inherited
        self._parcel.keep(self._fd)

    def read(self, count: int, ready: Callable[[], None]) -> bytes:
        if self._fd < 0:
            return b""
        try:
            data = os.read(self._fd, count)
        except BlockingIOError:
            self._loop.add(self._fd, READABLE, lambda _revents: self._handle_ready(ready))
            return b""
        except OSError as error:
            self._end(error.strerror or str(error))
            return b""
        if not data:
            self._end("it is at its end")
        return data

    def close(self) -> None:
        if self._fd >= 0:
            self._loop.remove(self._fd)
            self._parcel.close(self._fd)
            self._fd = -1

    def _handle_ready(self, ready: Callable[[], None]) -> None:
        self._loop.remove(self._fd)
        ready()

    def _end(self, problem: str) -> None:
        # The guest gets no more of it: better none than some that are not random.
        log.say(f"{self._parcel.name}: {self._path}: {problem}")
        self.close()


def _open(config: RngConfig) -> int:
    where = f"-object {RANDOM}: filename={config.filename!r}"
    try:
        fd = os.open(config.filename, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    except OSError as error:
        raise ConfigError(f"{where}: {error.strerror}; name a source that can be read") from error
    if stat.S_ISDIR(os.fstat(fd).st_mode):
        os.close(fd)
        raise ConfigError(f"{where}: it is a directory; name a source that can be read")
    return fd
