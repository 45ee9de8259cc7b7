"""Reads bytes that must not be trusted, and knows where it is."""

from __future__ import annotations

from pyvmm.errors import VmStateError


class Cursor:
    """A position in a stream of bytes that must not be trusted.

    :param data: the whole stream
    """

    __slots__ = ("at", "data", "path")

    def __init__(self, data: bytes, at: int = 0) -> None:
        self.data = data
        self.at = at
        self.path: list[str] = []

    def take(self, size: int) -> bytes:
        """Return the next ``size`` bytes.

        :raises VmStateError: if there are fewer
        """
        end = self.at + size
        if end > len(self.data):
            raise self.error(f"truncated: {size} bytes wanted, {len(self.data) - self.at} left")
        chunk = self.data[self.at : end]
        self.at = end
        return chunk

    def u8(self) -> int:
        """Return the next byte."""
        return self.take(1)[0]

    def u16(self) -> int:
        """Return the number in the next two bytes."""
        return int.from_bytes(self.take(2), "big")

    def u32(self) -> int:
        """Return the number in the next four bytes."""
        return int.from_bytes(self.take(4), "big")

    def u64(self) -> int:
        """Return the number in the next eight bytes."""
        return int.from_bytes(self.take(8), "big")

    def string(self) -> str:
        """Return text, which follows a byte that is its length."""
        raw = self.take(self.u8())
        if not raw.isascii():
            raise self.error(f"name is not ASCII: {raw!r}")
        return raw.decode("ascii")

    def error(self, problem: str) -> VmStateError:
        """Return an error that names the present path."""
        return VmStateError("/".join(self.path), problem)
