"""Interrupt lines, as a device sees them: a level that it sets. Behind the line is KVM's irqchip,
whose inputs ``kvm.irq`` gives out, or a fake in a test."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable


class IrqLine:
    """One input pin of the interrupt controller.

    The level is remembered, so that a device may set it as often as it likes and only a
    change costs an ioctl. Callers hold their device's lock.

    :param number: the GSI, 0 to 23
    :param deliver: called with (GSI, level) on every change, on the thread of the caller
    """

    __slots__ = ("_deliver", "level", "number")

    def __init__(self, number: int, deliver: Callable[[int, bool], None]) -> None:
        self.number = number
        self.level = False
        self._deliver = deliver

    def set_level(self, level: bool) -> None:
        """Drive the line high or low."""
        if level != self.level:
            self.level = level
            self._deliver(self.number, level)

    def restore_level(self, level: bool) -> None:
        """Take over a level that the irqchip's loaded state already contains."""
        self.level = level
