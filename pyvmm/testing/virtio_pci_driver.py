"""The driver side of virtio over PCI; what it does with it is that of ``virtio_driver``.

driver = VirtioPciDriver(VirtioRng(loop))
driver.start()
driver.messages  # what was sent, by address and data
"""

from __future__ import annotations

from pyvmm.core.bus import Bus
from pyvmm.core.irq import IrqLine
from pyvmm.devices.pci import function, msix
from pyvmm.devices.pci.host import Ecam, PciHost, Window
from pyvmm.devices.virtio import pci
from pyvmm.devices.virtio.pci import VirtioPci
from pyvmm.testing.virtio_driver import DriverQueue, VirtioDriver

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pyvmm.devices.virtio.device import VirtioDevice

CONFIG_PORTS = 0xCF8
ECAM = 0xE000_0000
LOW = (0xC000_0000, 0xE000_0000)
HIGH = (0x10_0000_0000, 0x20_0000_0000)
IO = (0xC000, 0x10000)
SLOT = 3
LINES = (10, 11, 5, 7)
#: Where the registers are after power-on.
REGISTERS = HIGH[0]
TABLE = LOW[0]


class FakeKicks:
    """Remembers the kicks that a host of its own would give to KVM."""

    def __init__(self) -> None:
        self.assigned: dict[int, tuple[int, int]] = {}

    def kick(self, gpa: int, value: int | None, fd: int, user: str, size: int = 4) -> None:
        """Remember one: its eventfd and size by its address."""
        assert value is None
        assert gpa not in self.assigned
        self.assigned[gpa] = fd, size

    def unkick(self, gpa: int, value: int | None) -> None:
        """Forget one."""
        del self.assigned[gpa]


class FakeBus:
    """A PCI bus on buses of its own.

    :ivar levels: the levels that the lines have been set to, with their GSIs
    """

    def __init__(self, mmio: Bus) -> None:
        self.mmio = mmio
        self.ports = Bus("I/O", 1 << 16)
        self.kicks = FakeKicks()
        self.levels: list[tuple[int, bool]] = []
        self.lines = [IrqLine(gsi, lambda *change: self.levels.append(change)) for gsi in LINES]
        self.host = PciHost(
            self.ports,
            mmio,
            io=Window(*IO),
            low=Window(*LOW),
            high=Window(*HIGH),
            lines=self.lines,
            kicks=self.kicks,
        )
        self.ports.add(CONFIG_PORTS, 8, self.host, "pci-host", width=4)
        mmio.add(ECAM, 1 << 20, Ecam(self.host), "pcie-mmcfg", width=4)

    def read(self, slot: int, offset: int, size: int) -> int:
        """Return a register, read by the ports."""
        self.ports.write(CONFIG_PORTS, 4, 1 << 31 | slot << 11 | offset & 0xFC)
        return self.ports.read(CONFIG_PORTS + 4 + offset % 4, size)

    def write(self, slot: int, offset: int, size: int, value: int) -> None:
        """Write a register, likewise."""
        self.ports.write(CONFIG_PORTS, 4, 1 << 31 | slot << 11 | offset & 0xFC)
        self.ports.write(CONFIG_PORTS + 4 + offset % 4, size, value)


class VirtioPciDriver(VirtioDriver):
    """A driver for one device, which is function 0 of slot :data:`SLOT`.

    :ivar messages: address and data of each message that was sent
    """

    def make_transport(self, device: VirtioDevice, kick_fds: list[int]) -> VirtioPci:
        self.messages: list[tuple[int, int]] = []
        self.face = VirtioPci(device, self.memory, kick_fds=kick_fds, send=self._send)
        return self.face

    def put_on_bus(self) -> None:
        self.pci = FakeBus(self.bus)
        self.pci.host.add(self.face.function, (SLOT, 0))
        self.command(function.COMMAND_MEMORY)

    def _send(self, address: int, data: int) -> None:
        self.messages.append((address, data))
        self.interrupt()

    def command(self, bits: int) -> None:
        """Write the command register."""
        self.pci.write(SLOT, function.COMMAND, 2, bits)

    def enable_msix(self, control: int = msix.ENABLE) -> None:
        """Give each vector a message, whose data is its number, and use them."""
        for number in range(self.face.msix.count):
            at = TABLE + msix.ENTRY * number
            for offset, value in ((0, 0xFEE00000), (4, 0), (8, number), (12, 0)):
                self.bus.write(at + offset, 4, value)
        self.pci.write(SLOT, self.capability(msix.CAPABILITY) + 2, 2, control)

    def capability(self, id: int, nth: int = 0) -> int:
        """Return the offset of a capability, as a driver finds it."""
        at = self.pci.read(SLOT, function.CAPABILITIES, 1)
        while at:
            if self.pci.read(SLOT, at, 1) == id:
                if not nth:
                    return at
                nth -= 1
            at = self.pci.read(SLOT, at + 1, 1)
        raise AssertionError(f"no capability {id}")

    # ---- registers -------------------------------------------------------------------------

    def read(self, register: int, size: int = 0) -> int:
        return self.bus.read(REGISTERS + register, size or 4)

    def write(self, register: int, value: int, size: int = 0) -> None:
        self.bus.write(REGISTERS + register, size or 4, value)

    def config(self, offset: int, size: int) -> bytes:
        return bytes(self.read(pci.CONFIG + offset + at, 1) for at in range(size))

    @property
    def status(self) -> int:
        return self.read(pci.DEVICE_STATUS, 1)

    def set_status(self, value: int) -> None:
        self.write(pci.DEVICE_STATUS, value, 1)

    def offered(self) -> int:
        found = 0
        for word in (0, 1):
            self.write(pci.DEVICE_FEATURE_SELECT, word)
            found |= self.read(pci.DEVICE_FEATURE) << 32 * word
        return found

    def accept(self, features: int) -> None:
        for word in (0, 1):
            self.write(pci.DRIVER_FEATURE_SELECT, word)
            self.write(pci.DRIVER_FEATURE, features >> 32 * word & 0xFFFFFFFF)

    def max_size(self, index: int) -> int:
        self.write(pci.QUEUE_SELECT, index, 2)
        return self.read(pci.QUEUE_SIZE, 2)

    def enable(self, queue: DriverQueue) -> None:
        self.write(pci.QUEUE_SELECT, queue.index, 2)
        self.write(pci.QUEUE_SIZE, queue.size, 2)
        self.write(pci.QUEUE_MSIX_VECTOR, queue.index + 1, 2)
        for register, gpa in (
            (pci.QUEUE_DESC, queue.desc),
            (pci.QUEUE_DRIVER, queue.avail),
            (pci.QUEUE_DEVICE, queue.used),
        ):
            self.write(register, gpa & 0xFFFFFFFF)
            self.write(register + 4, gpa >> 32)
        self.write(pci.QUEUE_ENABLE, 1, 2)

    def notify(self, index: int) -> None:
        self.write(pci.NOTIFY + pci.NOTIFY_STEP * index, index, 2)
