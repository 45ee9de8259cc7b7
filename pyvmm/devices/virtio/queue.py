"""The device side of a split virtqueue (virtio 1.3, 2.7), with indirect descriptors and
event-idx.

The rings lie in guest RAM and the driver may change every byte of them at any time, so each
descriptor is read once and judged by that copy, an index is never used before it was compared
with the size, and a chain's length is bounded before it is walked. What breaks the rules is a
:class:`QueueError`, never a chain that is merely shorter. Left out: packed rings, in-order use.

Where the host cannot back the memory of a ring or buffer it is a RamError, and the queue is as it
was before the call.

Not locked: the caller holds the device's lock.
"""

from __future__ import annotations

import struct

from pyvmm._native import load, memory_barrier, peek, store
from pyvmm.errors import GuestError, RamError
from pyvmm.memory.guest import GuestMemoryError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from pyvmm.memory.guest import GuestMemory

DESC_F_NEXT = 1
DESC_F_WRITE = 2
DESC_F_INDIRECT = 4
AVAIL_F_NO_INTERRUPT = 1
USED_F_NO_NOTIFY = 1

#: A queue has a power of two of entries, this many at most (virtio 1.3, 2.7).
MAX_SIZE = 32768
#: Descriptors in one indirect table. Linux makes chains longer than the queue with them, which
#: the specification does not allow (2.7.5.3.1); QEMU takes as many as this.
MAX_INDIRECT = 1024
#: Bytes in one chain (2.7.5).
MAX_BYTES = 1 << 32

_DESC = struct.Struct("=QIHH")


class QueueError(GuestError):
    """The driver broke the rules of the ring; the device needs a reset."""


class Chain:
    """A descriptor chain: one request.

    :ivar head: index of its first descriptor, which :meth:`Queue.push` returns to the driver
    :ivar readable: ``(gpa, length)`` of the buffers that the driver filled, all of it memory
    :ivar writable: the same of those that the device may fill; not ROM
    """

    __slots__ = ("_memory", "head", "readable", "writable")

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

    @property
    def readable_size(self) -> int:
        """Bytes in all readable buffers, 4 GiB at most."""
        return sum([length for _, length in self.readable])

    @property
    def writable_size(self) -> int:
        """Bytes in all writable buffers, 4 GiB at most."""
        return sum([length for _, length in self.writable])

    def read(self, limit: int, skip: int = 0) -> bytes:
        """Return the driver's data behind the first ``skip`` bytes, ``limit`` bytes at most."""
        parts = []
        for gpa, length in self.readable:
            if skip >= length:
                skip -= length
                continue
            size = min(length - skip, limit)
            parts.append(self._memory.read(gpa + skip, size))
            skip = 0
            limit -= size
            if not limit:
                break
        return b"".join(parts)

    def write(self, data: bytes | bytearray | memoryview, skip: int = 0) -> int:
        """Fill the writable buffers behind their first ``skip`` bytes; return how much fitted."""
        source = memoryview(data)
        done = 0
        for gpa, length in self.writable:
            if skip >= length:
                skip -= length
                continue
            size = min(length - skip, len(source) - done)
            self._memory.write(gpa + skip, source[done : done + size])
            skip = 0
            done += size
            if done == len(source):
                break
        return done

    def readable_views(self) -> list[memoryview]:
        """Return the memory of the readable buffers itself, for system calls. The driver may
        still change it."""
        views = self._memory.views
        return [part for entry in self.readable for part in views(*entry, writable=False)]

    def writable_views(self) -> list[memoryview]:
        """Return the memory of the writable buffers itself, for system calls."""
        return [part for entry in self.writable for part in self._memory.views(*entry)]

    def find_lack(self) -> RamError:
        """Return the error that says why a system call could not touch the buffers (EFAULT)."""
        try:
            for gpa, length in self.readable:
                self._memory.touch(gpa, length, writable=False)
            for gpa, length in self.writable:
                self._memory.touch(gpa, length)
        except RamError as error:
            return error
        # The host can back them by now: the same call once more will tell.
        return self._memory.fault()


class Queue:
    """One virtqueue. While it is not ready there is nothing in it, and what is pushed is lost.

    :param memory: where the rings and the buffers are
    :param max_size: most entries that the driver may choose, a power of two
    :ivar size: entries that the driver chose
    :ivar desc: guest-physical address of the descriptor area
    :ivar avail: of the driver area
    :ivar used: of the device area
    :ivar last_avail_idx: how many chains were taken, modulo 65536
    :ivar used_idx: how many were returned, modulo 65536
    :ivar event_idx: whether VIRTIO_F_EVENT_IDX was negotiated
    :ivar indirect: whether VIRTIO_F_INDIRECT_DESC was negotiated
    :ivar native: what ``fastpath`` has made of the rings, for as long as they stay where they are
    """

    __slots__ = (
        *("max_size", "size", "ready", "desc", "avail", "used", "last_avail_idx", "used_idx"),
        *("event_idx", "indirect", "memory", "native"),
        *("_table", "_avail_ring", "_used_ring", "_signalled"),
    )

    def __init__(self, memory: GuestMemory, max_size: int) -> None:
        self.memory = memory
        self.native: Any
        self.max_size = max_size
        self.reset()

    def reset(self) -> None:
        """Go to the state before the driver set it up."""
        self.size = self.max_size
        self.ready = False
        self.desc = self.avail = self.used = 0
        self.last_avail_idx = self.used_idx = 0
        self.event_idx = self.indirect = False
        self._signalled = 0  # up to which used_idx interrupts were decided on
        self._unmap()

    def enable(self) -> None:
        """Begin to use the rings where the driver says that they are.

        :raises QueueError: a size or address that cannot be
        :raises RamError: the host cannot back the device area
        """
        self._map()
        self._signalled = self.used_idx
        self.ready = True

    def disable(self) -> None:
        """Do not touch the rings any more; what was taken and not returned is forgotten."""
        self.ready = False
        self.last_avail_idx = self.used_idx = 0
        self._unmap()

    def check(self) -> None:
        """See that size, addresses and indices are possible.

        :raises QueueError: they are not
        """
        if not 0 < self.size <= self.max_size or self.size & self.size - 1:
            raise QueueError(f"a queue of {self.size} entries, at most {self.max_size}")
        for name, gpa, align in (
            ("descriptor area", self.desc, 16),
            ("driver area", self.avail, 2),
            ("device area", self.used, 4),
        ):
            if gpa % align:
                raise QueueError(f"{name} at {gpa:#x} is not a multiple of {align}")
        if self.in_flight > self.size:
            raise QueueError(f"{self.in_flight} chains under way in a queue of {self.size}")

    @property
    def in_flight(self) -> int:
        """Chains that were taken and not returned yet."""
        return self.last_avail_idx - self.used_idx & 0xFFFF

    def pop(self) -> Chain | None:
        """Take the next chain that the driver made available and return it; None if there is none.

        :raises QueueError: it is malformed
        """
        if not self.ready:
            return None
        last = self.last_avail_idx
        try:
            # The index before the element and what that leads to: x86 keeps the order of loads.
            index = load(self._avail_ring + 2, 2)
            waiting = index - last & 0xFFFF
            if not waiting:
                return None
            if waiting > self.size:
                raise QueueError(f"available index {index} is too far beyond {last}")
            # Nothing else bounds what is under way if a driver never looks at the used ring.
            if self.in_flight >= self.size:
                raise QueueError(f"more than {self.size} chains under way")
            head = load(self._avail_ring + 4 + 2 * (last & self.size - 1), 2)
            chain = self._read_chain(head)
        except OSError:
            raise self._lack() from None
        self.last_avail_idx = last + 1 & 0xFFFF
        return chain

    def retake(self, head: int) -> Chain | None:
        """Return the chain of that head once more: it was taken, and is not used yet.

        :raises QueueError: it is malformed (by now)
        """
        try:
            return self._read_chain(head) if self.ready else None
        except OSError:
            raise self._lack() from None

    @property
    def waiting(self) -> int:
        """How many chains the driver has made available that were not taken; without trust in
        what it says."""
        if not self.ready:
            return 0
        return min(self._available_index() - self.last_avail_idx & 0xFFFF, self.size)

    def unpop(self, count: int = 1) -> None:
        """Put the chains back that were taken last and not returned: the next :meth:`pop` gives
        them again."""
        self.last_avail_idx = self.last_avail_idx - min(count, self.in_flight) & 0xFFFF

    def push(self, head: int, written: int) -> None:
        """Return a chain to the driver.

        :param written: bytes that were written into its writable buffers, from the beginning
        """
        if not self.ready:
            return
        self.push_all([(head, written)])

    def answer(self, chain: Chain, data: bytes) -> int:
        """Fill the chain that was taken last and push it; return how many bytes fitted.

        :raises RamError: the chain is put back
        """
        try:
            written = chain.write(data)
            self.push(chain.head, written)
        except RamError:
            self.unpop()
            raise
        return written

    def push_all(self, chains: list[tuple[int, int]]) -> None:
        """Return several chains, ``(head, written)`` each, that the driver must find together."""
        if not self.ready:
            return
        index, ring = self.used_idx, self._used_ring
        try:
            for head, written in chains:
                # An element of two words is stored at once.
                at = ring + 4 + 8 * (index & self.size - 1)
                store(at, 8, head | written << 32)
                index = index + 1 & 0xFFFF
            # The elements before the index: x86 keeps the order of stores.
            store(ring + 2, 2, index)
        except OSError:
            raise self._lack() from None
        self.used_idx = index

    @property
    def rings(self) -> tuple[int, int, int]:
        """Host addresses of descriptor, driver and device area of a ready queue."""
        return self._table, self._avail_ring, self._used_ring

    def publish(self, count: int) -> None:
        """Take and push the next chains, whose elements are in the used ring already.

        :raises RamError: they were neither taken nor pushed
        """
        try:
            # All at once: the driver takes num_buffers of them (5.1.6.3.2).
            store(self._used_ring + 2, 2, self.used_idx + count)
        except OSError:
            raise self._lack() from None
        self.advance(count)

    def advance(self, count: int) -> None:
        """Count chains that native code has taken and returned."""
        self.last_avail_idx = self.last_avail_idx + count & 0xFFFF
        self.used_idx = self.used_idx + count & 0xFFFF

    def needs_interrupt(self) -> bool:
        """Return whether the driver wants an interrupt for what was pushed since the last call."""
        old, new = self._signalled, self.used_idx
        if old == new or not self.ready:
            return False
        # We have stored the used index and load what the driver waits for; the driver stores what
        # it waits for and then loads the used index (virtio 1.3, 2.7.7). Each needs a full barrier
        # in between, or both miss the other's store: x86 lets a load overtake an earlier store.
        memory_barrier()
        at = self._avail_ring + (4 + 2 * self.size if self.event_idx else 0)
        try:
            wish = load(at, 2)  # the flags, or the used_event
        except OSError:
            raise self._lack() from None
        self._signalled = new
        if not self.event_idx:
            return not wish & AVAIL_F_NO_INTERRUPT
        return (new - wish - 1 & 0xFFFF) < (new - old & 0xFFFF)

    def disable_notifications(self) -> None:
        """Ask the driver not to kick: the queue is being looked at anyway."""
        # With event-idx an index that is passed already says so by itself.
        if self.ready and not self.event_idx:
            self._tell(0, USED_F_NO_NOTIFY)

    def enable_notifications(self, known: int = 0) -> bool:
        """Ask for a kick with the next chain; return whether that is there already, without a kick.

        :param known: how many chains wait that are not enough
        """
        if not self.ready:
            return False
        event = self.last_avail_idx + known & 0xFFFF
        if self.event_idx:
            self._tell(4 + 8 * self.size, event)
        else:
            self._tell(0, 0)
        # As in needs_interrupt: the driver stores the available index and then loads this (2.7.10).
        memory_barrier()
        return self._available_index() != event

    def _available_index(self) -> int:
        try:
            return load(self._avail_ring + 2, 2)
        except OSError:
            raise self._lack() from None

    def _tell(self, offset: int, value: int) -> None:
        try:
            store(self._used_ring + offset, 2, value)
        except OSError:
            raise self._lack() from None

    def _lack(self) -> RamError:
        """Return the error that says why the host cannot back the rings."""
        areas = (
            (self.desc, 16 * self.size, False),
            (self.avail, 6 + 2 * self.size, False),
            (self.used, 6 + 8 * self.size, True),
        )
        try:
            for gpa, size, writable in areas:
                self.memory.touch(gpa, size, writable=writable)
        except RamError as error:
            return error
        return self.memory.fault(self.used)

    def _map(self) -> None:
        self.check()
        memory, size = self.memory, self.size
        try:
            self._table = memory.host(self.desc, 16 * size, writable=False)
            self._avail_ring = memory.host(self.avail, 6 + 2 * size, writable=False)
            self._used_ring = memory.host(self.used, 6 + 8 * size)
            # The driver need not have written there, so the host may have no pages for it yet. A
            # request that was done must not find that there is no room to say so.
            memory.touch(self.used, 6 + 8 * size)
        except GuestMemoryError as error:
            self._unmap()
            raise QueueError(str(error)) from None
        except RamError:
            self._unmap()
            raise

    def _unmap(self) -> None:
        self.native = None
        self._table = self._avail_ring = self._used_ring = 0

    def _read_chain(self, head: int) -> Chain:
        table: bytes | None = None  # an indirect one
        count = self.size  # entries of the table
        left = count  # entries that the chain may still have
        index = head
        contains = self.memory.contains
        readable: list[tuple[int, int]] = []
        writable: list[tuple[int, int]] = []
        total = 0
        while True:
            if index >= count:
                raise QueueError(f"descriptor {index} in a table of {count}")
            if not left:
                raise QueueError("a chain that is too long, or a loop")
            left -= 1
            if table is None:
                entry = peek(self._table + 16 * index, 16)
            else:
                entry = table[16 * index : 16 * index + 16]
            gpa, length, flags, index = _DESC.unpack(entry)
            if flags & DESC_F_INDIRECT:
                table = self._read_table(table, gpa, length, flags)
                index, count = 0, length // 16
                left = count
                continue
            # An empty buffer is nothing that a device could fall over, wherever it is.
            if length:
                total += length
                if not contains(gpa, length, writable=bool(flags & DESC_F_WRITE)):
                    raise QueueError(f"a buffer at {gpa:#x}, {length:#x} bytes: no memory there")
                if flags & DESC_F_WRITE:
                    writable.append((gpa, length))
                elif writable:
                    raise QueueError("a readable descriptor behind a writable one")
                else:
                    readable.append((gpa, length))
            if not flags & DESC_F_NEXT:
                break
        if total > MAX_BYTES:
            raise QueueError(f"a chain of {total} bytes")
        return Chain(self.memory, head, readable, writable)

    def _read_table(self, table: bytes | None, gpa: int, length: int, flags: int) -> bytes:
        if not self.indirect:
            raise QueueError("an indirect descriptor, which was not negotiated")
        if table is not None:
            raise QueueError("an indirect descriptor in an indirect table")
        if flags & DESC_F_NEXT:
            raise QueueError("an indirect descriptor with a next one")
        if not length or length % 16 or length > 16 * MAX_INDIRECT:
            raise QueueError(f"an indirect table of {length} bytes")
        try:
            return self.memory.read(gpa, length)
        except GuestMemoryError as error:
            raise QueueError(str(error)) from None
