"""The files that a guest is booted from, and what is kept of them for its next boot.

A guest that resets itself loads its kernel again, perhaps after months, when the file has been
removed, replaced, cut or written over. So no path is opened twice: a file that was loaded stays
open, and once the guest runs, which is not delayed for it, what is needed of it is copied into a
sealed memfd. Its size and time tell whether that is what was loaded; if not, or without memory for
a copy, the file itself is kept, which survives its removal, and the operator is told.

Updates hand on what is kept (``boot/kernel`` and ``boot/initrd``: descriptors, and their paths as
states). What a reset loads after an update:

* what is kept, if the new command line gives the same path, whatever is there by now: the guest
  comes back as it was;
* the file of the new command line, if that gives another path: so a new kernel is brought in. It
  is opened and kept right after the update. If it cannot be, or is no kernel, what is kept stays;
* of an image that kept nothing, what the path has right after the update, or else at the reset.

The command line itself (``-append``) is always the new one's. The ROM is memory of the guest (see
``boot.rom``) and needs none of this. Main thread only.
"""

from __future__ import annotations

import fcntl
import os

from pyvmm.boot import loader
from pyvmm.boot.blob import FileBlob
from pyvmm.cpr.handover import BOOT, Passenger
from pyvmm.errors import ConfigError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pyvmm.boot.config import KernelConfig
    from pyvmm.cpr.handover import Handover, Parcel

_STEP = 1 << 20  # bytes copied at once; signals are handled in between
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SEAL


class _File(Passenger):
    """An open file; ``mark`` is the state that it was loaded in, None once it is kept."""

    __slots__ = ("fd", "mark", "path")

    def __init__(self, path: str, fd: int, mark: tuple[int, int] | None = None) -> None:
        self.path = path
        self.fd = fd
        self.mark = mark

    def save_state(self) -> bytes:
        return os.fsencode(self.path)


class BootFiles:
    """What ``-kernel`` and ``-initrd`` name, by option.

    :param handover: where what is kept is preserved for the next image
    """

    def __init__(self, handover: Handover) -> None:
        self._handover = handover
        self._files: dict[str, _File] = {}
        self._former: list[int] = []  # in whose place is a copy

    def open(self, path: str, option: str) -> FileBlob:
        """Return what is kept for *option*; if that is nothing, the file *path*, which stays open
        until :meth:`keep`. The caller closes what it is given.

        :raises ConfigError: the file cannot be opened
        """
        file = self._files.get(option)
        if file is not None:
            return FileBlob(file.path, option, fd=file.fd)
        return self._open(path, option)

    def descriptors(self) -> dict[str, int]:
        """Return the open files by option. After :meth:`keep` or :meth:`take_over` they may be
        others; those before stay open until :meth:`close_former`."""
        return {option: file.fd for option, file in self._files.items()}

    def close_former(self) -> None:
        """Close what nobody uses any more."""
        while self._former:
            os.close(self._former.pop())

    def forget_unkept(self, *options: str) -> None:
        """Close files that are not kept yet, after a load that failed: whoever mends a file may put
        another in its place.

        :param options: what to forget; default: all
        """
        for option, file in list(self._files.items()):
            if file.mark is not None and option in (options or self._files):
                os.close(self._files.pop(option).fd)

    def keep(self, config: KernelConfig) -> list[str]:
        """Keep what was loaded since the last call; return what is wrong with it."""
        problems = []
        for option, file in self._files.items():
            if file.mark is None:
                continue
            try:
                problem = self._copy(option, file, config)
            except OSError as error:
                problem = error.strerror or str(error)
            except ConfigError as error:
                problem = str(error)
            if problem:
                what = "" if problem.startswith(option) else f"{option} {file.path}: "
                problems.append(f"{what}{problem} (a reset loads what the file has then)")
            self._keep(option, file)
        return problems

    def take_over(self, config: KernelConfig) -> list[str]:
        """In an image that loaded nothing itself: go on with what the one before kept, or else
        keep what the paths have now; return what is wrong with it."""
        problems = []
        for option, path in (("-kernel", config.kernel), ("-initrd", config.initrd)):
            parcel = self._parcel(option)
            fd, inherited_path = parcel.take(), os.fsdecode(parcel.take_state())
            kept = None if fd is None else _File(inherited_path, fd)
            if path and (kept is None or kept.path != path):
                try:
                    with self._open(path, option) as blob:
                        if option == "-kernel":
                            loader.prepare(blob, config)
                except ConfigError as error:
                    self.forget_unkept(option)
                    then = f"what {kept.path} had" if kept else "what is there by then"
                    problems.append(f"{error} (a reset loads {then})")
            if kept is None:
                continue
            if path and option not in self._files:
                self._files[option] = kept
                self._keep(option, kept)
            else:
                parcel.close(kept.fd)
        problems += self.keep(config)
        if "-kernel" in self._files:
            try:
                with self.open(config.kernel, "-kernel") as blob:
                    loader.prepare(blob, config)
            except ConfigError as error:
                problems.append(str(error))
        return problems

    def close(self) -> None:
        """Give everything back."""
        self.close_former()
        for option, file in self._files.items():
            self._parcel(option).leave()
            self._parcel(option).close(file.fd)
        self._files.clear()

    def _parcel(self, option: str) -> Parcel:
        return self._handover.parcel(BOOT, option[1:])

    def _keep(self, option: str, file: _File) -> None:
        file.mark = None
        self._parcel(option).keep(file.fd)
        self._parcel(option).board(file)

    def _open(self, path: str, option: str) -> FileBlob:
        blob = FileBlob(path, option)
        mark = blob.mark()
        self._files[option] = _File(path, blob.lend(), mark)
        return blob

    def _copy(self, option: str, file: _File, config: KernelConfig) -> str:
        """Put a copy in the place of the file; return why that cannot be, empty if it is done."""
        with FileBlob(file.path, option, fd=file.fd) as blob:
            size = loader.prepare(blob, config) if option == "-kernel" else blob.size
            fd = os.memfd_create(self._parcel(option).name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
            try:
                # Not sendfile(2), which not every file system knows and which is not faster.
                buffer = memoryview(bytearray(min(size, _STEP)))
                done = 0
                while done < size:
                    count = os.preadv(file.fd, [buffer[: size - done]], done)
                    if not count or os.pwrite(fd, buffer[:count], done) != count:
                        break
                    done += count
                if done < size or blob.mark() != file.mark:
                    os.close(fd)
                    return "it changed as soon as the guest was started"
                fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
            except OSError:
                os.close(fd)
                raise
        self._former.append(file.fd)
        file.fd = fd
        return ""
