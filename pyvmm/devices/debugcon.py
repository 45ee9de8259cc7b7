"""Debug console: a port that takes bytes and is always ready (Bochs, QEMU's ``isa-debugcon``).

There is no flow control and a vCPU must not wait, so what the chardev does not take at once is
dropped and counted. Called on vCPU threads only; has no state.
"""

from __future__ import annotations

from pyvmm.devices.base import Device

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from pyvmm.chardev.base import Chardev

IOBASE = 0xE9
#: What a read gives, by which guests find the port.
READBACK = 0xE9


class DebugConsole(Device):
    """The port.

    :param chardev: where the bytes go; None drops them
    """

    name = "isa-debugcon"

    def __init__(self, chardev: Chardev | None = None, *, iobase: int = IOBASE) -> None:
        super().__init__()
        self.chardev = chardev
        self.iobase = iobase
        self.dropped = 0

    def properties(self) -> dict[str, Any]:
        chardev = self.chardev.id if self.chardev is not None else ""
        return {"iobase": self.iobase, "chardev": chardev, "readback": READBACK}

    def on_read(self, offset: int, size: int) -> int:
        return READBACK

    def on_write(self, offset: int, size: int, value: int) -> None:
        if self.chardev is not None:
            self.dropped += 1 - self.chardev.write(bytes((value & 0xFF,)))
