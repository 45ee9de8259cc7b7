"""Where a state goes to and comes from: ``file:PATH[,offset=N]``."""

from __future__ import annotations

import os

from pyvmm._util.sizes import parse_size
from pyvmm.errors import ConfigError, MigrationError
from pyvmm.vmstate.stream import MAX_SIZE


class FileUri:
    """A file, from an offset on.

    :raises MigrationError: with QEMU's texts, if ``uri`` is of another kind
    """

    __slots__ = ("offset", "path", "text")

    def __init__(self, uri: str) -> None:
        self.text = uri
        scheme, _, rest = uri.partition(":")
        if scheme != "file" or not rest:
            raise MigrationError(f"unknown migration protocol: {uri}")
        self.path, comma, option = rest.partition(",offset=")
        self.offset = 0
        if comma:
            try:
                self.offset = parse_size(option, "file URI: offset", maximum=1 << 62)
            except ConfigError as error:
                raise MigrationError(str(error)) from None

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
        """Open for :meth:`write`; what is in the file already stays until then.

        :raises MigrationError: with QEMU's text
        """
        try:
            return os.open(self.path, os.O_CREAT | os.O_WRONLY | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise MigrationError(f"Could not create '{self.path}': {error.strerror}") from None

    def write(self, fd: int, data: bytes) -> None:
        """Write the state at the offset and end the file behind it.

        :raises MigrationError: naming the file, e.g. when the disk is full
        """
        try:
            os.ftruncate(fd, self.offset)
            at = self.offset
            while data:
                written = os.pwrite(fd, data, at)
                at += written
                data = data[written:]
        except OSError as error:
            raise MigrationError(f"Could not write '{self.path}': {error.strerror}") from None

    def read(self) -> bytes:
        """The whole state.

        :raises MigrationError: with QEMU's text, or if no state can be that large
        """
        try:
            fd = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
            try:
                chunks = []
                at = self.offset
                while chunk := os.pread(fd, 1 << 20, at):
                    chunks.append(chunk)
                    at += len(chunk)
                    if at - self.offset > MAX_SIZE:
                        raise MigrationError(f"'{self.path}' is too large for a state")
            finally:
                os.close(fd)
        except OSError as error:
            raise MigrationError(f"Could not open '{self.path}': {error.strerror}") from None
        return b"".join(chunks)
