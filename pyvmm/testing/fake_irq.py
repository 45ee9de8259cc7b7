"""An interrupt line that remembers what a device did to it."""

from __future__ import annotations

from pyvmm.core.irq import IrqLine


class FakeIrq(IrqLine):
    """``changes`` are the levels that would have cost an ioctl each, oldest first."""

    __slots__ = ("changes",)

    def __init__(self, number: int = 4) -> None:
        super().__init__(number, lambda _number, level: self.changes.append(level))
        self.changes: list[bool] = []

    @property
    def edges(self) -> int:
        """How often the line went from low to high."""
        return sum(self.changes)
