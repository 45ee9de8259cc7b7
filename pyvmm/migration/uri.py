"""Where a state goes to and comes from: ``file:PATH[,offset=N]``.

A file is written aside and renamed when it is whole, so that under its name there is always
the last good state or the new one; it keeps its mode and owner, and a symbolic link to it stays.
One that cannot be replaced so (it has other names, an ACL or an owner that it would lose, or its
folder is not ours to write to) is written in place. It is not synced: the next image reads what
this one has written, and after a crash of the host there is no guest to go on with.
"""

from __future__ import annotations

import errno
import os
import stat

from pyvmm._util.sizes import parse_size
from pyvmm.errors import ConfigError, MigrationError
from pyvmm.vmstate.stream import MAX_SIZE

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

CHUNK = 1 << 20


class FileUri:
    """A file, from an offset on.

    :raises MigrationError: with QEMU's texts, if ``uri`` is of another kind
    """

    __slots__ = ("_aside", "_like", "_seen", "offset", "path", "text")

    def __init__(self, uri: str) -> None:
        self.text = uri
        scheme, _, rest = uri.partition(":")
        if scheme != "file" or not rest:
            raise MigrationError(f"unknown migration protocol: {uri}")
        self.path, comma, option = rest.partition(",offset=")
        self.offset = 0
        if comma:
            try:
                self.offset = parse_size(option, "file URI: offset", minimum=0, maximum=1 << 62)
            except ConfigError as error:
                raise MigrationError(str(error)) from None
        if "\0" in self.path:
            raise MigrationError(f"file URI: a path cannot contain NUL: {self.path!r}")
        # The name to be given to the file once it is whole; none if it is written in place.
        self._aside = ""
        # The file that it then replaces.
        self._like: os.stat_result | None = None
        # Device, inode and size of the file that was read.
        self._seen = (0, 0, -1)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, FileUri):
            return False
        return (os.path.abspath(self.path), self.offset) == (
            os.path.abspath(other.path),
            other.offset,
        )

    def __hash__(self) -> int:
        return hash((os.path.abspath(self.path), self.offset))

    def open_write(self) -> int:
        """Check that :meth:`write` can succeed, and return the descriptor that it needs.

        Nothing changes yet. The descriptor is the folder's if the state gets a new file there, else
        the file's.

        :raises MigrationError: with QEMU's text
        """
        try:
            self._aside = self._find_aside()
            if self._aside:
                folder_fd = self._open_folder(os.path.dirname(self._aside))
                if folder_fd is not None:
                    return folder_fd
                self._aside = ""
            fd = self._open()
            try:
                os.lseek(fd, self.offset, os.SEEK_SET)
                # What may be opened and never written to, as much of /proc, says so.
                if stat.S_ISREG(os.fstat(fd).st_mode):
                    os.write(fd, b"")
            except OSError:
                os.close(fd)
                raise
            return fd
        except OSError as error:
            raise MigrationError(f"Could not create '{self.path}': {error.strerror}") from None

    def write(self, fd: int, data: bytes, is_wanted: Callable[[], bool] = lambda: True) -> None:
        """Write the state at the offset, with nothing behind it; whole, or not at all unless
        it is written in place. The caller closes ``fd``, which :meth:`open_write` returned.

        :param is_wanted: asked before the file gets its name: it is removed if not
        :raises MigrationError: naming the file, e.g. when the disk is full
        """
        try:
            if self._aside:
                self._write_aside(fd, data, is_wanted)
            else:
                self._write_in_place(fd, data)
        except OSError as error:
            raise MigrationError(f"Could not write '{self.path}': {error.strerror}") from None

    def check(self) -> None:
        """See that there is a file to be read.

        :raises MigrationError: with QEMU's text
        """
        try:
            os.close(os.open(self.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK))
        except OSError as error:
            raise MigrationError(f"Could not open '{self.path}': {error.strerror}") from None

    def read(self) -> bytes:
        """Return the whole state.

        :raises MigrationError: with QEMU's text, or if no state can be that large
        """
        try:
            fd = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
            try:
                chunks = []
                at = self.offset
                while chunk := os.pread(fd, CHUNK, at):
                    chunks.append(chunk)
                    at += len(chunk)
                    if at - self.offset > MAX_SIZE:
                        raise MigrationError(f"'{self.path}' is too large for a state")
                status = os.fstat(fd)
                self._seen = (status.st_dev, status.st_ino, at)
            finally:
                os.close(fd)
        except OSError as error:
            raise MigrationError(f"Could not open '{self.path}': {error.strerror}") from None
        return b"".join(chunks)

    def append(self, data: bytes) -> bool:
        """Add to the file that :meth:`read` has read, if it is unchanged; return whether that
        worked.

        What is added is of use to tools only, so nothing is said if it cannot be.
        """
        try:
            fd = self._open()
        except OSError:
            return False
        try:
            status = os.fstat(fd)
            if self._seen != (status.st_dev, status.st_ino, status.st_size):
                return False
            _pwrite(fd, data, status.st_size)
            return True
        except OSError:
            _cut(fd, self._seen[2])
            return False
        finally:
            os.close(fd)

    def _open(self) -> int:
        # Without O_NONBLOCK opening a FIFO would wait for a reader.
        return os.open(self.path, os.O_WRONLY | os.O_CLOEXEC | os.O_NONBLOCK)

    def _find_aside(self) -> str:
        # Behind symbolic links, so that they stay.
        path = os.path.realpath(self.path)
        self._like = None
        try:
            status = os.stat(self.path)
        except FileNotFoundError:
            return path
        if self.offset or not stat.S_ISREG(status.st_mode) or status.st_nlink > 1:
            return ""
        # A folder of ours lets us replace what we may not write to.
        if not os.access(self.path, os.W_OK, effective_ids=True):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        self._like = status
        # The links under /proc/self/fd may lead to a file that has no name.
        same = os.path.exists(path) and os.path.samestat(status, os.stat(path))
        return path if same else ""

    def _open_folder(self, path: str) -> int | None:
        """Return a descriptor of the folder to write in; None if the file there has to be written
        in place."""
        fd = os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            if self._can_replace(fd):
                return fd
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)
        return None

    def _can_replace(self, folder_fd: int) -> bool:
        """Return whether a new file can take the place at the path, where one may be already.

        :raises OSError: no file can be made, and none is there to be written in place
        """
        if self._like is not None:
            try:
                os.getxattr(self.path, "system.posix_acl_access")
                return False
            except OSError:
                pass
        # Tried rather than asked: permissions are not all that can be in the way.
        try:
            fd, name = self._create(folder_fd)
        except OSError:
            if self._like is None:
                raise
            return False
        os.close(fd)
        os.unlink(name, dir_fd=folder_fd)
        return True

    def _create(self, folder_fd: int) -> tuple[int, str]:
        """Make a file beside the one to be replaced, with its owner and mode; return its descriptor
        and its name."""
        name = f".pyvmm-{os.urandom(8).hex()}"
        flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC
        # An O_PATH descriptor keeps the folder, whatever it is renamed to meanwhile.
        fd = os.open(name, flags, 0o600, dir_fd=folder_fd)
        try:
            if self._like is not None:
                os.fchown(fd, self._like.st_uid, self._like.st_gid)
                os.fchmod(fd, stat.S_IMODE(self._like.st_mode))
        except BaseException:
            os.close(fd)
            os.unlink(name, dir_fd=folder_fd)
            raise
        return fd, name

    def _write_aside(self, folder_fd: int, data: bytes, is_wanted: Callable[[], bool]) -> None:
        name = os.path.basename(self._aside)
        fd, temporary = self._create(folder_fd)
        try:
            try:
                _pwrite(fd, data, self.offset)
            finally:
                os.close(fd)
            if not is_wanted():
                raise OSError(errno.ECANCELED, os.strerror(errno.ECANCELED))
            os.rename(temporary, name, src_dir_fd=folder_fd, dst_dir_fd=folder_fd)
        except BaseException as error:
            os.unlink(temporary, dir_fd=folder_fd)
            if not (isinstance(error, OSError) and error.errno == errno.EBUSY):
                raise
            # A mount, as containers have them of single files.
            fd = self._open()
            try:
                self._write_in_place(fd, data)
            finally:
                os.close(fd)

    def _write_in_place(self, fd: int, data: bytes) -> None:
        try:
            _pwrite(fd, data, self.offset)
        except OSError:
            # Half a state must not be taken for one.
            _cut(fd, self.offset)
            raise
        _cut(fd, self.offset + len(data))


def _cut(fd: int, size: int) -> None:
    # Devices have no size.
    if stat.S_ISREG(os.fstat(fd).st_mode):
        try:
            os.ftruncate(fd, size)
        except OSError:
            pass


def _pwrite(fd: int, data: bytes, at: int) -> None:
    left = memoryview(data)
    while left:
        written = os.pwrite(fd, left, at)
        at += written
        left = left[written:]
