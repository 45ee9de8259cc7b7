"""Interrupt lines, as a device sees them: a level that it sets. Behind the line is KVM's irqchip,
whose inputs ``kvm.irq`` gives out, or a fake in a test."""

from __future__ import annotations

from pyvmm._native import ffi

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable


class IrqLine:
    """One input pin of the interrupt controller.

    The level is remembered, so that a device may set it as often as it likes and only a
    change costs an ioctl. Callers hold their device's lock, native ones too.

    :param number: the GSI, 0 to 23
    :param deliver: called with (GSI, level) on every change, on the thread of the caller
    :param vm_fd: of the VM that native code tells of a change; negative: of none
    :ivar wire: ``struct pyvmm_line *``, for native code
    """

    __slots__ = ("_deliver", "number", "wire")

    def __init__(self, number: int, deliver: Callable[[int, bool], None], vm_fd: int = -1) -> None:
        self.number = number
        self.wire = ffi.new("struct pyvmm_line *", {"vm_fd": vm_fd, "gsi": number})
        self._deliver = deliver

    @property
    def level(self) -> bool:
        """Whether it is high."""
        return bool(self.wire.level)

    def set_level(self, level: bool) -> None:
        """Drive the line high or low."""
        if level != self.wire.level:
            self.wire.level = level
            self._deliver(self.number, level)

    def restore_level(self, level: bool) -> None:
        """Take over a level that the irqchip's loaded state already contains."""
        self.wire.level = level
