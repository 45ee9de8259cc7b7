"""The driver side of virtio-mmio and split virtqueues, over real guest memory: what a guest's
driver does, and what an evil one can do, since every ring and register can be written by hand.
A driver of other registers is a subclass with other "registers" below.

    driver = VirtioDriver(VirtioRng(loop))
    driver.start()
    request = driver.queues[0].add([], [64])
    driver.queues[0].kick()
    driver.run()
    assert driver.queues[0].reap() == [(request, 64)]
    data = request.data()
"""

from __future__ import annotations

import os
import struct

from pyvmm.core.bus import Bus
from pyvmm.devices.virtio import mmio
from pyvmm.devices.virtio.device import F_EVENT_IDX, F_INDIRECT_DESC
from pyvmm.devices.virtio.mmio import VirtioMmio
from pyvmm.devices.virtio.queue import (
    AVAIL_F_NO_INTERRUPT,
    DESC_F_INDIRECT,
    DESC_F_NEXT,
    DESC_F_WRITE,
    USED_F_NO_NOTIFY,
)
from pyvmm.devices.virtio.transport import (
    S_ACKNOWLEDGE,
    S_DRIVER,
    S_DRIVER_OK,
    S_FEATURES_OK,
)
from pyvmm.memory.backend import RamBackend
from pyvmm.memory.config import RamConfig
from pyvmm.memory.guest import GuestMemory
from pyvmm.vmstate.cursor import Cursor

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from pyvmm.devices.virtio.device import VirtioDevice
    from pyvmm.devices.virtio.transport import Transport

BASE = 0xFEB0_0000
GSI = 16
RAM_SIZE = 8 << 20
HEAP = 0x1000


class Request:
    """A chain that the driver made.

    :ivar head: index of its first descriptor
    :ivar readable: ``(gpa, length)`` of each buffer for the device to read
    :ivar writable: the same of those for the device to fill
    """

    def __init__(
        self,
        memory: GuestMemory,
        head: int,
        readable: list[tuple[int, int]],
        writable: list[tuple[int, int]],
    ) -> None:
        self._memory = memory
        self.head = head
        self.readable = readable
        self.writable = writable

    def data(self, size: int | None = None) -> bytes:
        """Return what the writable buffers hold, the first ``size`` bytes of it."""
        whole = b"".join(self._memory.read(*buffer) for buffer in self.writable)
        return whole if size is None else whole[:size]


class DriverQueue:
    """The driver's side of one queue, set up at addresses of its own.

    :ivar desc: address of the descriptor area; likewise ``avail`` and ``used``
    :ivar avail_idx: chains made available so far
    :ivar used_idx: chains seen in the used ring so far
    """

    def __init__(self, driver: VirtioDriver, index: int, size: int) -> None:
        self.driver = driver
        self.memory = driver.memory
        self.index = index
        self.size = size
        self.desc = driver.allocate(16 * size, 16)
        self.avail = driver.allocate(6 + 2 * size, 2)
        self.used = driver.allocate(6 + 8 * size, 4)
        self.avail_idx = 0
        self.used_idx = 0
        self.free = list(range(size))
        self.requests: dict[int, tuple[Request, list[int]]] = {}

    def add(
        self,
        readable: Sequence[bytes | tuple[int, int]] = (),
        writable: Sequence[int | tuple[int, int]] = (),
        *,
        indirect: bool = False,
    ) -> Request:
        """Make a chain available, without a kick; return it as a request.

        :param readable: contents of buffers to be made, or ``(gpa, length)`` as it is
        :param writable: sizes of buffers to be made, or ``(gpa, length)`` as it is
        """
        ins = [self._filled(part) if isinstance(part, bytes) else part for part in readable]
        outs = [
            (self.driver.allocate(part), part) if isinstance(part, int) else part
            for part in writable
        ]
        buffers = [(*part, 0) for part in ins] + [(*part, DESC_F_WRITE) for part in outs]
        if indirect:
            table = self.driver.allocate(16 * len(buffers), 16)
            self.write_table(table, buffers, list(range(len(buffers))))
            buffers = [(table, 16 * len(buffers), DESC_F_INDIRECT)]
        slots = [self.free.pop(0) for _ in buffers]
        self.write_table(self.desc, buffers, slots)
        request = Request(self.memory, slots[0], ins, outs)
        self.requests[slots[0]] = request, slots
        self.offer(slots[0])
        return request

    def write_table(
        self, table: int, buffers: Sequence[tuple[int, int, int]], slots: Sequence[int]
    ) -> None:
        """Write ``(gpa, length, flags)`` as one chain into the slots of a descriptor table."""
        for number, (gpa, length, flags) in enumerate(buffers):
            following = slots[number + 1] if number + 1 < len(slots) else 0
            more = DESC_F_NEXT if number + 1 < len(slots) else 0
            self.write_descriptor(slots[number], gpa, length, flags | more, following, table)

    def write_descriptor(
        self, slot: int, gpa: int, length: int, flags: int, next: int = 0, table: int | None = None
    ) -> None:
        """Write one descriptor, whatever it says."""
        at = (self.desc if table is None else table) + 16 * slot
        self.memory.write(at, struct.pack("<QIHH", gpa, length, flags, next))

    def offer(self, head: int) -> None:
        """Put a head into the available ring."""
        self.memory.write_u16(self.avail + 4 + 2 * (self.avail_idx % self.size), head)
        self.avail_idx = self.avail_idx + 1 & 0xFFFF
        self.memory.write_u16(self.avail + 2, self.avail_idx)

    def wants_kick(self, since: int) -> bool:
        """Return whether the device asked for a kick for what became available after ``since``."""
        if self.driver.event_idx:
            event = self.memory.read_u16(self.used + 4 + 8 * self.size)
            return (self.avail_idx - event - 1) & 0xFFFF < (self.avail_idx - since) & 0xFFFF
        return not self.memory.read_u16(self.used) & USED_F_NO_NOTIFY

    def kick(self) -> None:
        """Kick the device, wanted or not."""
        self.driver.notify(self.index)

    def reap(self) -> list[tuple[Request, int]]:
        """Return the requests that the device used since the last call, and the bytes written."""
        found = []
        while self.used_idx != self.memory.read_u16(self.used + 2):
            at = self.used + 4 + 8 * (self.used_idx % self.size)
            request, slots = self.requests.pop(self.memory.read_u32(at))
            found.append((request, self.memory.read_u32(at + 4)))
            self.free += slots
            self.used_idx = self.used_idx + 1 & 0xFFFF
        if self.driver.event_idx:
            self.ask_interrupt()
        return found

    def ask_interrupt(self, after: int = 0) -> None:
        """With event-idx: ask for an interrupt once ``after`` more chains than one were used."""
        event = self.used_idx + after & 0xFFFF
        self.memory.write_u16(self.avail + 4 + 2 * self.size, event)

    def mute(self, muted: bool = True) -> None:
        """Without event-idx: ask for no interrupts."""
        self.memory.write_u16(self.avail, AVAIL_F_NO_INTERRUPT if muted else 0)

    def _filled(self, content: bytes) -> tuple[int, int]:
        gpa = self.driver.allocate(len(content))
        self.memory.write(gpa, content)
        return gpa, len(content)


class VirtioDriver:
    """A driver for one device, with a transport, a bus and memory around it.

    :param device: its loop is run by :meth:`run`, on the test's thread
    :param ram_size: bytes of RAM, from address 0
    :ivar transport: its registers are at :data:`BASE` of ``bus``
    """

    #: Bytes of a register.
    width = mmio.WIDTH

    def __init__(self, device: VirtioDevice, *, ram_size: int = RAM_SIZE) -> None:
        # Not sealed: a test may cut it, which is memory that the host cannot back.
        config = RamConfig("memory-backend-memfd", "ram0", ram_size, seal=False)
        self.backend = RamBackend(config)
        self.memory = GuestMemory()
        self.memory.add_ram(self.backend, [(0, ram_size, 0)])
        self.queues: list[DriverQueue] = []
        self.features = 0
        self._heap = HEAP
        self._plug(device)
        self._go()

    def _plug(self, device: VirtioDevice) -> None:
        self.device = device
        self._interrupts = 0
        kick_fds = [os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK) for _ in device.queue_sizes]
        self.transport = self.make_transport(device, kick_fds)
        self.bus = Bus("memory", 1 << 64)
        self.put_on_bus()

    def _go(self) -> None:
        # In the order of a machine that starts, or goes on after an update.
        self.transport.start()
        self.transport.attach()
        self.device.loop.run_once(0)

    @property
    def event_idx(self) -> bool:
        """Whether VIRTIO_F_EVENT_IDX was negotiated."""
        return bool(self.features & F_EVENT_IDX)

    @property
    def indirect(self) -> bool:
        """Whether VIRTIO_F_INDIRECT_DESC was negotiated."""
        return bool(self.features & F_INDIRECT_DESC)

    def allocate(self, size: int, align: int = 16) -> int:
        """Return the address of ``size`` bytes of RAM that nothing else uses. Never given back."""
        gpa = -(-self._heap // align) * align
        self._heap = gpa + max(size, 1)
        assert self._heap <= self.backend.size, "the driver's memory is used up"
        return gpa

    def read(self, register: int, size: int = 0) -> int:
        """Return a register, read as a vCPU does; all of it unless a size in bytes is given."""
        return self.bus.read(BASE + register, size or self.width)

    def write(self, register: int, value: int, size: int = 0) -> None:
        """Write a register, likewise."""
        self.bus.write(BASE + register, size or self.width, value)

    # ---- registers -------------------------------------------------------------------------

    def make_transport(self, device: VirtioDevice, kick_fds: list[int]) -> Transport:
        """Return the transport of a device, with the registers that are written below."""
        return VirtioMmio(
            device, self.memory, base=BASE, gsi=GSI, kick_fds=kick_fds, pulse=self.interrupt
        )

    def put_on_bus(self) -> None:
        """Put the transport on the bus."""
        self.bus.add(BASE, mmio.SIZE, self.transport, self.device.name, width=self.width)

    def config(self, offset: int, size: int) -> bytes:
        """Return part of the configuration space, read byte by byte."""
        return bytes(self.read(mmio.CONFIG + offset + at, 1) for at in range(size))

    @property
    def status(self) -> int:
        """The status register."""
        return self.read(mmio.STATUS)

    def set_status(self, value: int) -> None:
        """Write the status register."""
        self.write(mmio.STATUS, value)

    def offered(self) -> int:
        """Return the feature bits that the device offers."""
        found = 0
        for word in (0, 1):
            self.write(mmio.DEVICE_FEATURES_SEL, word)
            found |= self.read(mmio.DEVICE_FEATURES) << 32 * word
        return found

    def accept(self, features: int) -> None:
        """Write the feature bits that the driver wants."""
        for word in (0, 1):
            self.write(mmio.DRIVER_FEATURES_SEL, word)
            self.write(mmio.DRIVER_FEATURES, features >> 32 * word & 0xFFFFFFFF)

    def max_size(self, index: int) -> int:
        """Return the largest size of a queue, in entries."""
        self.write(mmio.QUEUE_SEL, index)
        return self.read(mmio.QUEUE_SIZE_MAX)

    def enable(self, queue: DriverQueue) -> None:
        """Say where a queue is, and that it is ready."""
        self.write(mmio.QUEUE_SEL, queue.index)
        self.write(mmio.QUEUE_SIZE, queue.size)
        for register, gpa in (
            (mmio.QUEUE_DESC, queue.desc),
            (mmio.QUEUE_DRIVER, queue.avail),
            (mmio.QUEUE_DEVICE, queue.used),
        ):
            self.write(register, gpa & 0xFFFFFFFF)
            self.write(register + 4, gpa >> 32)
        self.write(mmio.QUEUE_READY, 1)

    def notify(self, index: int) -> None:
        """Kick the device for a queue."""
        self.write(mmio.QUEUE_NOTIFY, index)

    # ---- what a driver does with them ------------------------------------------------------

    def negotiate(self, features: int | None = None) -> bool:
        """Reset the device and agree on features (all that are offered by default), up to
        FEATURES_OK; return whether the device accepts them."""
        self.set_status(0)
        self.set_status(S_ACKNOWLEDGE)
        self.set_status(S_ACKNOWLEDGE | S_DRIVER)
        self.features = self.offered() if features is None else features
        self.accept(self.features)
        self.set_status(S_ACKNOWLEDGE | S_DRIVER | S_FEATURES_OK)
        return bool(self.status & S_FEATURES_OK)

    def set_up_queue(self, index: int, size: int | None = None) -> DriverQueue:
        """Give the device a queue, of its maximum size by default; add it to ``queues`` and return
        it."""
        queue = DriverQueue(self, index, size or self.max_size(index))
        self.enable(queue)
        self.queues.append(queue)
        return queue

    def set_driver_ok(self) -> None:
        """Say that the driver is ready."""
        self.set_status(self.status | S_DRIVER_OK)

    def start(self, features: int | None = None, size: int | None = None) -> None:
        """All of the initialization (virtio 1.3, 3.1.1), with all queues."""
        assert self.negotiate(features), "FEATURES_OK was refused"
        self.queues.clear()
        for index in range(len(self.device.queue_sizes)):
            self.set_up_queue(index, size)
        self.set_driver_ok()

    def run(self, timeout_s: float = 0) -> None:
        """Serve the device's loop for some rounds: what a handler leaves for later is done, too.

        :param timeout_s: how long to wait for the first event, at most
        """
        self.device.loop.run_once(timeout_s)
        for _ in range(20):
            self.device.loop.run_once(0)

    def interrupts(self) -> int:
        """Return how many interrupts came since the last call."""
        count, self._interrupts = self._interrupts, 0
        return count

    def interrupt(self) -> None:
        """Count an interrupt."""
        self._interrupts += 1

    def encode(self) -> bytes:
        """Return the state of device and transport, drained."""
        self.transport.drain()
        out = bytearray()
        assert self.transport.vmstate is not None
        self.transport.vmstate.save(out, self.transport.save())
        return bytes(out)

    def decode(self, data: bytes) -> None:
        """Load the transport from a state.

        :raises VmStateError: what it cannot be
        """
        vmstate = self.transport.vmstate
        assert vmstate is not None
        source = Cursor(data)
        record = vmstate.load(source, vmstate.version)
        if source.at != len(data):
            raise source.error("bytes are left over")
        self.transport.load(record)

    def update(self, device: VirtioDevice, meanwhile: Callable[[], None] | None = None) -> None:
        """A live update: another device goes on where this one is; the memory stays.

        :param meanwhile: called when the old device is gone
        """
        data = self.encode()
        self.transport.close()
        if meanwhile is not None:
            meanwhile()
        self._plug(device)
        self.decode(data)
        self._go()

    def close(self) -> None:
        """Give everything back but the device's loop."""
        self.transport.close()
        self.backend.close()
