"""``-chardev null``: output goes nowhere and no input comes. Stateless."""

from __future__ import annotations

from pyvmm.chardev.base import Chardev


class NullChardev(Chardev):
    """A chardev with nobody at the other end, who is always there."""

    @property
    def filename(self) -> str:
        return "null"

    def write(self, data: bytes) -> int:
        return len(data)
