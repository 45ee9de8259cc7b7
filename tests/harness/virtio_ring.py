"""The device side of a split virtqueue whose rings the test writes."""

from pyvmm.devices.virtio.queue import Queue
from pyvmm.memory.backend import RamBackend
from pyvmm.memory.config import RamConfig
from pyvmm.memory.guest import GuestMemory, MemoryRegion

RAM = 1 << 20
DESC, AVAIL, USED, BUFFER = 0x1000, 0x2000, 0x3000, 0x10000
ROM = 0x80000000
SIZE = 8


class Ring:
    """A queue whose rings the test writes.

    :param beyond: bytes of the host's memory behind the guest's, which nothing may change
    """

    def __init__(self, size=SIZE, event_idx=False, indirect=True, beyond=0):
        self.backend = RamBackend(RamConfig("memory-backend-memfd", "ram0", RAM + beyond))
        self.rom = RamBackend(RamConfig("memory-backend-memfd", "rom0", 0x1000))
        self.memory = GuestMemory()
        self.memory.add_ram(self.backend, [(0, RAM, 0)])
        self.memory.add(MemoryRegion("rom", ROM, 0x1000, self.rom, readonly=True))
        self.queue = Queue(self.memory, size)
        self.queue.desc, self.queue.avail, self.queue.used = DESC, AVAIL, USED
        self.queue.event_idx, self.queue.indirect = event_idx, indirect
        self.queue.enable()
        self.size = size
        self.idx = 0

    def desc(self, slot, gpa=BUFFER, length=16, flags=0, next=0, table=DESC):
        at = table + 16 * slot
        self.memory.write_u64(at, gpa)
        self.memory.write_u32(at + 8, length)
        self.memory.write_u16(at + 12, flags)
        self.memory.write_u16(at + 14, next)

    def offer(self, *heads):
        for head in heads:
            self.memory.write_u16(AVAIL + 4 + 2 * (self.idx % self.size), head)
            self.idx = self.idx + 1 & 0xFFFF
        self.memory.write_u16(AVAIL + 2, self.idx)

    def used(self):
        """The index, and the element before it."""
        idx = self.memory.read_u16(USED + 2)
        at = USED + 4 + 8 * ((idx - 1) % self.size)
        return idx, self.memory.read_u32(at), self.memory.read_u32(at + 4)

    def close(self):
        self.queue.reset()
        self.backend.close()
        self.rom.close()
