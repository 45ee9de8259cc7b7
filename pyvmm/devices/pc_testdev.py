"""QEMU's ``pc-testdev``, by which the tests of KVM (kvm-unit-tests) try what no other device shows:
a register of every width, interrupt lines that the guest drives, memory without RAM, and a page
that KVM is made to forget.

``on_read``/``on_write`` run on vCPU threads.
"""

from __future__ import annotations

from pyvmm.core.bus import BusDevice
from pyvmm.devices.base import Device
from pyvmm.vmstate.fields import Buffer, Description, Record, u32

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

#: First port, number of ports, bytes of the widest access.
IOPORT = (0xE0, 4, 4)
FLUSH = (0xE4, 4, 4)
IOPORT_BYTE = (0xE8, 4, 1)
IRQ_LINES = (0x2000, 24, 1)
#: The same of memory.
IOMEM = (0xFF00_0000, 0x1_0000, 8)

_PAGE = 4096


class _Part(BusDevice):
    """One of its ranges of addresses."""

    def __init__(
        self,
        owner: PcTestdev,
        read: Callable[[int, int], int] | None = None,
        write: Callable[[int, int, int], None] | None = None,
    ) -> None:
        self.lock = owner.lock
        self._read = read
        self._write = write

    def on_read(self, offset: int, size: int) -> int:
        return self._read(offset, size) if self._read else 0

    def on_write(self, offset: int, size: int, value: int) -> None:
        if self._write:
            self._write(offset, size, value)


class PcTestdev(Device):
    """The device.

    :param set_irq: drives an input of the interrupt controllers, 0 to 23
    :param flush: has KVM forget the page at an address
    :ivar ports: what answers at which ports: first, number, widest access, who
    :ivar memory: the same of addresses without RAM
    """

    name = "pc-testdev"
    vmstate = Description("pc-testdev", [u32("ioport_data"), Buffer("iomem", IOMEM[1])])

    def __init__(self, set_irq: Callable[[int, bool], None], flush: Callable[[int], None]) -> None:
        super().__init__()
        self._set_irq = set_irq
        self._flush = flush
        self.ioport_data = 0
        self.iomem = bytearray(IOMEM[1])
        register = _Part(self, self._read_register, self._write_register)
        self.ports = [
            (*IOPORT, register),
            (*FLUSH, _Part(self, write=self._write_flush)),
            (*IOPORT_BYTE, register),
            (*IRQ_LINES, _Part(self, write=self._write_irq)),
        ]
        self.memory = (*IOMEM, _Part(self, self._read_memory, self._write_memory))

    def reset(self) -> None:
        self.ioport_data = 0
        self.iomem[:] = bytes(len(self.iomem))

    def load(self, state: Record) -> None:
        self.ioport_data = state.ioport_data
        self.iomem[:] = state.iomem

    def _read_register(self, offset: int, size: int) -> int:
        return self.ioport_data >> 8 * offset

    def _write_register(self, offset: int, size: int, value: int) -> None:
        mask = (1 << 8 * size) - 1
        self.ioport_data = self.ioport_data & ~(mask << 8 * offset) | value << 8 * offset

    def _write_flush(self, offset: int, size: int, value: int) -> None:
        if size == 4:
            self._flush(value & -_PAGE)

    def _write_irq(self, offset: int, size: int, value: int) -> None:
        self._set_irq(offset, value != 0)

    def _read_memory(self, offset: int, size: int) -> int:
        return int.from_bytes(self.iomem[offset : offset + size], "little")

    def _write_memory(self, offset: int, size: int, value: int) -> None:
        self.iomem[offset : offset + size] = value.to_bytes(size, "little")
