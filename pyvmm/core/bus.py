"""Address spaces for port and memory-mapped I/O: who answers at which address.

Called from vCPU threads. A region's device is entered under the device's lock, so a device
never sees two accesses at once. An address where nobody answers reads as all ones and
ignores writes, as on a PC; unless it is RAM that the host could not back when the guest
touched it: that access is made here.

Some accesses native code answers, before they get here (``core.native``): the device says which.

Regions come, go and move while vCPUs run (a BAR that the guest moves). A vCPU's thread looks at
one immutable map from first to last, without a lock; a change puts another map in its place.
"""

from __future__ import annotations

from _bisect import bisect_right  # all that bisect has of it, without its import

from pyvmm._native import ffi, lib
from pyvmm.core.native import NativeAnswers
from pyvmm.core.threads import Lock
from pyvmm.errors import InternalError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from _thread import LockType
    from collections.abc import Callable
    from typing import Protocol

    from pyvmm._native import SharedLock

    class Ram(Protocol):
        """What a bus asks of guest memory (``memory.guest``)."""

        def contains(self, gpa: int, size: int, *, writable: bool = True) -> bool: ...
        def read(self, gpa: int, size: int) -> bytes: ...
        def write(self, gpa: int, data: bytes) -> None: ...


#: Size of an access -> all the bits of its value. What is left of a split access may be of any
#: size, and is split again.
_MASKS = {size: (1 << 8 * size) - 1 for size in (1, 2, 4, 8)}


class BusDevice:
    """What answers accesses. ``lock`` is held around each of them.

    Offsets count from the start of the region; sizes are 1, 2, 4 or 8 bytes, never above
    the region's ``width``; values are little-endian integers.
    """

    lock: LockType | SharedLock

    #: What native code answers of them; None for nothing.
    answers: NativeAnswers | None = None

    def on_read(self, offset: int, size: int) -> int:
        """Return what a read gives; the bus cuts it to ``size`` bytes."""
        return (1 << 8 * size) - 1

    def on_write(self, offset: int, size: int, value: int) -> None:
        """Take a write; the default ignores it."""


class Nobody(BusDevice):
    """What is at an address where nobody answers. As a device it is of use where guests write so
    often that native code should know: the port of POST codes, for the time that it takes."""

    answers = NativeAnswers(lib.PYVMM_NOBODY, ffi.NULL, (0,), (0,))

    def __init__(self) -> None:
        self.lock = Lock()


class Region:
    """A range of addresses that one device answers. Never changed: one that moves is another.

    :ivar end: first address beyond it
    """

    __slots__ = ("device", "end", "length", "name", "start", "width")

    def __init__(self, start: int, length: int, device: BusDevice, name: str, width: int) -> None:
        self.start = start
        self.length = length
        self.device = device
        self.name = name
        self.width = width
        self.end = start + length


class Bus:
    """One address space.

    :param name: as ``info mtree`` prints it, e.g. ``I/O``
    :param size: number of addresses
    :param ram: the memory in the same address space
    """

    def __init__(self, name: str, size: int, ram: Ram | None = None) -> None:
        self.name = name
        self.size = size
        self._ram = ram
        self._changing = Lock()
        # The regions' first addresses, and the regions, in rising order; replaced as one.
        self._map: tuple[tuple[int, ...], tuple[Region, ...]] = ((), ())
        self._observer: Callable[[], None] | None = None

    def observe(self, observer: Callable[[], None]) -> None:
        """Have ``observer()`` called after each change of the regions, on whatever thread makes
        it; there is one."""
        self._observer = observer

    @property
    def regions(self) -> tuple[Region, ...]:
        """The regions of this moment, in rising order of address."""
        return self._map[1]

    def add(
        self, start: int, length: int, device: BusDevice, name: str, *, width: int = 1
    ) -> Region:
        """Give ``device`` the addresses ``start`` to ``start + length - 1``; return the region.
        Any thread.

        :param width: widest access the device takes, in bytes; wider ones are split into
            consecutive accesses of this width, lowest address first
        :raises InternalError: if the range overlaps another or leaves the bus
        """
        region = Region(start, length, device, name, width)
        self._replace(None, region)
        return region

    def remove(self, region: Region) -> None:
        """Take a region away: no access that begins after this finds it. One that found it before
        may still enter the device, once, under the device's lock. Any thread, also from within an
        access to the device.

        :raises InternalError: it is not there
        """
        self._replace(region, None)

    def move(self, region: Region, start: int) -> Region:
        """Put a region elsewhere and return it as it is there: every access finds it at the one
        place or the other, and never at both. Threads as with :meth:`remove`.

        :raises InternalError: it is not there, or overlaps another, or leaves the bus; it stays
        """
        moved = Region(start, region.length, region.device, region.name, region.width)
        self._replace(region, moved)
        return moved

    def _replace(self, old: Region | None, new: Region | None) -> None:
        # Two vCPUs may each move a region of their own.
        with self._changing:
            regions = list(self._map[1])
            if old is not None:
                if old not in regions:
                    raise InternalError(f"{old.name} is not on the {self.name} bus")
                regions.remove(old)
            if new is not None:
                if new.length < 1 or new.start < 0 or new.end > self.size:
                    raise InternalError(
                        f"{new.name} at {new.start:#x} does not fit the {self.name} bus"
                    )
                for other in regions:
                    if new.start < other.end and other.start < new.end:
                        raise InternalError(f"{new.name} at {new.start:#x} overlaps {other.name}")
                regions.append(new)
                regions.sort(key=lambda region: region.start)
            self._map = tuple([region.start for region in regions]), tuple(regions)
        if self._observer is not None:
            self._observer()

    def find(self, address: int) -> Region | None:
        """Return the region that contains ``address``, if any."""
        starts, regions = self._map
        at = bisect_right(starts, address) - 1
        if at >= 0 and address < regions[at].end:
            return regions[at]
        return None

    # Each access of a guest that native code does not answer comes through one of these two: what
    # find() and _fits() do stands here once more, since to call them takes as long as all the rest.

    def read(self, address: int, size: int) -> int:
        """Return ``size`` bytes as a little-endian integer.

        :raises RamError: the address is RAM that the host still cannot back
        """
        starts, regions = self._map
        at = bisect_right(starts, address) - 1
        region = regions[at] if at >= 0 and address < regions[at].end else None
        mask = _MASKS.get(size)
        if region is None or mask is None or size > region.width or address + size > region.end:
            return self._split_read(address, size, region)
        device = region.device
        with device.lock:
            return device.on_read(address - region.start, size) & mask

    def write(self, address: int, size: int, value: int) -> None:
        """Write the low ``size`` bytes of ``value``.

        :raises RamError: the address is RAM that the host still cannot back
        """
        starts, regions = self._map
        at = bisect_right(starts, address) - 1
        region = regions[at] if at >= 0 and address < regions[at].end else None
        mask = _MASKS.get(size)
        if region is None or mask is None or size > region.width or address + size > region.end:
            self._split_write(address, size, value, region)
            return
        device = region.device
        with device.lock:
            device.on_write(address - region.start, size, value & mask)

    def _split_read(self, address: int, size: int, region: Region | None) -> int:
        ram = self._ram
        if region is None and ram is not None and ram.contains(address, size, writable=False):
            return int.from_bytes(ram.read(address, size), "little")
        if size == 1:
            return 0xFF
        step = _step(address, size, region)
        low = self.read(address, step)
        return low | self.read(address + step, size - step) << 8 * step

    def _split_write(self, address: int, size: int, value: int, region: Region | None) -> None:
        ram = self._ram
        if region is None and ram is not None and ram.contains(address, size):
            ram.write(address, (value & (1 << 8 * size) - 1).to_bytes(size, "little"))
            return
        if size == 1:
            return
        step = _step(address, size, region)
        self.write(address, step, value)
        self.write(address + step, size - step, value >> 8 * step)


def _fits(region: Region, address: int, size: int) -> bool:
    return size in _MASKS and size <= region.width and address + size <= region.end


def _step(address: int, size: int, region: Region | None) -> int:
    # The widest piece that the region's device takes; single bytes where nobody answers.
    if region is None:
        return 1
    return next((step for step in (8, 4, 2) if step <= size and _fits(region, address, step)), 1)
