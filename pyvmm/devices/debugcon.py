"""Debug console: a port that takes bytes and is always ready (Bochs, QEMU's ``isa-debugcon``).

Native code answers it; what it takes is written in batches (``output``). There is no flow control
and a vCPU must not wait, so what the chardev does not take then is dropped and counted. Has no
state. ``on_read``/``on_write`` run on vCPU threads.
"""

from __future__ import annotations

from pyvmm._native import ffi, lib
from pyvmm.core.native import NativeAnswers, shared_lock
from pyvmm.devices.base import Device
from pyvmm.devices.output import Output

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
        self.regs = regs = ffi.new("struct pyvmm_debugcon *")
        regs.readback = READBACK
        regs.has_chardev = chardev is not None
        self.lock = shared_lock(ffi.addressof(regs, "lock"))
        self.answers = NativeAnswers(lib.PYVMM_DEBUGCON, regs, (0,), (0,))
        self._output: Output | None = None
        if chardev is not None:
            self._output = Output(regs.output, chardev, self.lock, self._flush)

    def properties(self) -> dict[str, Any]:
        chardev = self.chardev.id if self.chardev is not None else ""
        return {"iobase": self.iobase, "chardev": chardev, "readback": READBACK}

    def on_read(self, offset: int, size: int) -> int:
        return READBACK

    def on_write(self, offset: int, size: int, value: int) -> None:
        if self._output is not None:
            self._output.put(bytes((value & 0xFF,)))
            self._flush()

    def prepare(self) -> None:
        if self._output is not None:
            self._output.prepare()

    def attach(self) -> None:
        if self._output is not None:
            self._output.attach()

    def drain(self, timeout_s: float | None = None) -> None:
        with self.lock:
            self._flush()

    def close(self) -> None:
        if self._output is not None:
            self._output.close()

    def _flush(self) -> bool:
        if self._output is not None:
            self._output.write()
            self.dropped += len(self._output)
            self._output.clear()
        return True
