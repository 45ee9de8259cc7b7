"""QEMU's ``isa-debug-exit``: a port by which a test guest ends the VMM with an exit code.

Called on vCPU threads only; has no state.
"""

from __future__ import annotations

from pyvmm.devices.base import Device

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

IOBASE = 0x501
IOSIZE = 2


class DebugExit(Device):
    """The port. Reads give 0.

    :param request_exit: called with the exit code, always odd and at most 255
    :param iobase: first port, for ``info qtree``
    :param iosize: number of ports, for ``info qtree``
    """

    name = "isa-debug-exit"
    #: Widest access that is not split, in bytes.
    width = 4

    def __init__(
        self, request_exit: Callable[[int], None], *, iobase: int = IOBASE, iosize: int = IOSIZE
    ) -> None:
        super().__init__()
        self._request_exit = request_exit
        self.iobase = iobase
        self.iosize = iosize

    def properties(self) -> dict[str, Any]:
        return {"iobase": self.iobase, "iosize": self.iosize}

    def on_read(self, offset: int, size: int) -> int:
        return 0

    def on_write(self, offset: int, size: int, value: int) -> None:
        # Never 0, so that no guest can pass for a VMM that ended well; the kernel keeps no
        # more than 8 bits of an exit code.
        self._request_exit((value << 1 | 1) & 0xFF)
