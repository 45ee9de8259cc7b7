"""Guest-physical memory as the VMM sees it: every access to guest RAM goes through here.

Addresses come from the guest, so each access is bounds-checked; one that runs over the border of
two adjacent regions is put together once, here. Any thread may read and write, as on a real
machine without ordering between them; aligned ``u16`` to ``u64`` accesses are single loads and
stores. Left out: dirty tracking, and anything that is not memory (see ``core.bus``).

Regions come and go while vCPUs run: each access looks at one immutable map. Whoever else has to
know what is memory (KVM's slots) is an observer, see :class:`MemoryObserver`.

The host may be unable to back a page: its file system is full, the file was cut, no huge page is
left. An access then raises :class:`RamError`, and is to be done again when the guest goes on. Who
gives memory to system calls gets their EFAULT, and has :meth:`GuestMemory.touch` say the same.
"""

from __future__ import annotations

from pyvmm._native import ffi, fill, lib, peek, poke, touch
from pyvmm.core.threads import Lock
from pyvmm.errors import GuestError, InternalError, RamError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from typing import Protocol

    from pyvmm.memory.backend import RamBackend

    Step = tuple[Callable[[], None], Callable[[], None]]

    class MemoryObserver(Protocol):
        """Who is told what is memory: of each region once when it comes, or when the observer
        does, and once when it goes. Calls come one at a time, on the thread that changes the
        memory, and must not change it in their turn.
        """

        def map(self, region: MemoryRegion) -> None:
            """A region is there. What is raised undoes all of the change."""

        def unmap(self, region: MemoryRegion) -> None:
            """A region goes: after this nobody who knows of it from here may touch it. What is
            raised undoes all of the change."""


_END = 1 << 64
_PAGE = 4096


class GuestMemoryError(GuestError):
    """No memory, or none that may be written, at some byte of an access.

    :param gpa: where the access starts
    :param size: its length in bytes
    """

    def __init__(self, gpa: int, size: int, problem: str = "no memory") -> None:
        super().__init__(f"guest access to {gpa:#x}, {size:#x} bytes: {problem} there")
        self.gpa = gpa
        self.size = size


class MemoryRegion:
    """A range of guest-physical addresses that a part of a backend fills; a KVM memory slot.

    :param gpa: first address, a multiple of 4 KiB, as are *size* and *offset*
    :param offset: where in the backend it starts
    :param readonly: the guest reads it directly, its writes have no effect (ROM)
    """

    __slots__ = ("backend", "gpa", "name", "offset", "readonly", "size")

    def __init__(
        self,
        name: str,
        gpa: int,
        size: int,
        backend: RamBackend,
        offset: int = 0,
        *,
        readonly: bool = False,
    ) -> None:
        self.name = name
        self.gpa = gpa
        self.size = size
        self.backend = backend
        self.offset = offset
        self.readonly = readonly

    @property
    def end(self) -> int:
        """First address beyond the region."""
        return self.gpa + self.size

    @property
    def address(self) -> int:
        """Host address of its first byte, for ``_native``."""
        return self.backend.address + self.offset

    @property
    def view(self) -> memoryview:
        """The memory itself, writable, for system calls and KVM; as :meth:`GuestMemory.view`."""
        return memoryview(self.backend.view)[self.offset : self.offset + self.size]


class GuestMemory:
    """All memory of one guest, by guest-physical address.

    :ivar report: told of a :class:`RamError` by whoever works for the guest, on any thread: the
        guest is paused for it
    """

    __slots__ = ("_changing", "_observers", "_spans", "regions", "report")

    def __init__(self) -> None:
        self.report: Callable[[RamError], None] = lambda _error: None
        self.regions: tuple[MemoryRegion, ...] = ()
        """In rising order of address; read only, another tuple after each change."""
        # What an access needs and no more: start, end, host address of guest address 0.
        self._spans: tuple[tuple[int, int, int, bool], ...] = ()
        self._changing = Lock()
        self._observers: list[MemoryObserver] = []

    def add(self, region: MemoryRegion) -> None:
        """Make *region* visible: to accesses here first, then to the observers, so that no guest
        can name memory that a device does not know. Any thread, while vCPUs run.

        :raises InternalError: it overlaps another, is not page-aligned or exceeds its backend
        :raises PyvmmError: an observer's; nobody has it then
        """
        aligned = (region.gpa | region.size | region.offset) & 0xFFF == 0
        inside = region.offset >= 0 and region.offset + region.size <= region.backend.size
        if not aligned or not inside or not 0 <= region.gpa < region.end <= _END:
            raise InternalError(f"memory region {region.name} at {region.gpa:#x} is malformed")
        with self._changing:
            before = self.regions
            for other in before:
                if region.gpa < other.end and other.gpa < region.end:
                    raise InternalError(f"memory regions {region.name} and {other.name} overlap")
            self._publish([*before, region])
            try:
                _all_or_none([_mapping(each, region) for each in self._observers])
            except BaseException:
                self._publish(before)
                raise

    def remove(self, region: MemoryRegion) -> None:
        """Take *region* away: from the observers first, so that the guest does not touch it any
        more, then from accesses here. Any thread, while vCPUs run.

        An access that began before may still be under way when this returns. Views, and host
        addresses that somebody holds (the rings of an enabled queue), go on to work: so the owner
        of the backend closes it when the devices have been drained and hold none.

        :raises InternalError: it is not there
        :raises PyvmmError: an observer's; all have it still then
        """
        with self._changing:
            if region not in self.regions:
                raise InternalError(f"memory region {region.name} is not there")
            _all_or_none([_mapping(each, region)[::-1] for each in self._observers])
            self._publish([each for each in self.regions if each is not region])

    def observe(self, observer: MemoryObserver) -> None:
        """Tell *observer* of all regions, and of each change from now on.

        :raises PyvmmError: its own, at one of the regions; it has none then, and is told no more
        """
        with self._changing:
            _all_or_none([_mapping(observer, region) for region in self.regions])
            self._observers.append(observer)

    def forget(self, observer: MemoryObserver) -> None:
        """Tell *observer* no more: it ends, with all that it knows. Idempotent."""
        with self._changing:
            if observer in self._observers:
                self._observers.remove(observer)

    def _publish(self, regions: Iterable[MemoryRegion]) -> None:
        self.regions = tuple(sorted(regions, key=lambda region: region.gpa))
        self._spans = tuple(
            [(each.gpa, each.end, each.address - each.gpa, each.readonly) for each in self.regions]
        )

    def add_ram(self, backend: RamBackend, ranges: Sequence[tuple[int, int, int]]) -> None:
        """Add one backend as RAM, in parts ``(gpa, size, offset)`` (see ``x86.layout``)."""
        for gpa, size, offset in ranges:
            self.add(MemoryRegion(backend.name, gpa, size, backend, offset))

    def read(self, gpa: int, size: int) -> bytes:
        """Return *size* bytes; the caller caps a size that the guest chose.

        :raises GuestMemoryError: some of it is not memory
        :raises RamError: the host cannot back some of it, as with all that follow
        """
        try:
            for start, end, base, _ in self._spans:
                if start <= gpa and gpa + size <= end and size >= 0:
                    return peek(base + gpa, size)
            return b"".join([peek(at, n) for at, n in self._pieces(gpa, size, False)])
        except OSError:
            raise self.fault(gpa, size) from None

    def write(self, gpa: int, data: bytes | bytearray | memoryview) -> None:
        """Store *data*; nothing is stored if not all of it is memory.

        :raises GuestMemoryError: some of it is not memory, or read-only
        """
        size = len(data)
        try:
            for start, end, base, readonly in self._spans:
                if start <= gpa and gpa + size <= end and not readonly:
                    poke(base + gpa, data)
                    return
            source = memoryview(data)
            done = 0
            for at, length in self._pieces(gpa, size, True):
                poke(at, source[done : done + length])
                done += length
        except OSError:
            raise self.fault(gpa, size) from None

    def fill(self, gpa: int, size: int, value: int = 0) -> None:
        """Store *size* bytes of *value*."""
        try:
            for at, length in self._pieces(gpa, size, True):
                fill(at, length, value)
        except OSError:
            raise self.fault(gpa, size) from None

    def touch(self, gpa: int, size: int, *, writable: bool = True) -> None:
        """See that the host backs *size* bytes, of which it may have to find some first. What a
        running guest or device has there stays.

        :param writable: whether they are to be written, which the host may refuse on its own
        """
        try:
            for at, length in self._pieces(gpa, size, writable):
                if writable:
                    touch(at, length)
                else:
                    for page in range(at & -_PAGE, at + length, _PAGE):
                        peek(page, 1)
        except OSError:
            raise self.fault(gpa, size) from None

    def forget_page(self, gpa: int) -> None:
        """Have KVM forget how it reaches the page at *gpa*, which stays as it is. Without effect
        where no memory is, or where the host does not do that."""
        if self.contains(gpa, _PAGE):
            lib.pyvmm_forget_page(ffi.cast("void *", self.host(gpa, _PAGE)), _PAGE)

    def fault(self, gpa: int | None = None, size: int = 1) -> RamError:
        """Return the error that says why an access could not be.

        :param gpa: where it began; None if that is not known
        """
        regions = [
            each for each in self.regions
            if gpa is None or (gpa < each.end and each.gpa < gpa + size)
        ]  # fmt: skip
        where = "" if gpa is None else f", guest address {gpa:#x}"
        reasons = []
        for region in regions:
            offset = None
            if gpa is not None:
                offset = region.offset + min(gpa + size, region.end) - 1 - region.gpa
            reason = region.backend.explain(offset, where)
            if reason not in reasons and not (gpa is None and region.readonly):
                reasons.append(reason)
        return RamError("; ".join(reasons))

    def view(self, gpa: int, size: int, *, writable: bool = True) -> memoryview:
        """Return the memory itself, *size* bytes in one region, for system calls. Release it
        before the end.

        :raises GuestMemoryError: not memory, or over a region's border
        """
        parts = self.views(gpa, size, writable=writable)
        if len(parts) > 1:
            raise GuestMemoryError(gpa, size, "two regions meet")
        if not parts:
            return memoryview(bytearray())
        return parts[0] if writable else parts[0].toreadonly()

    def views(self, gpa: int, size: int, *, writable: bool = True) -> list[memoryview]:
        """Return the memory itself, *size* bytes, in one part for each region, for system calls.

        :raises GuestMemoryError: some of it is not memory, or read-only
        """
        if gpa < 0 or size < 0 or gpa + size > _END:
            raise GuestMemoryError(gpa, size)
        found: list[memoryview] = []
        if not size:
            return found
        at, end = gpa, gpa + size
        for region in self.regions:
            limit = region.end
            if region.gpa <= at < limit:
                if writable and region.readonly:
                    raise GuestMemoryError(gpa, size, "only ROM")
                delta = region.offset - region.gpa
                whole = memoryview(region.backend.view)
                if end <= limit:
                    found.append(whole[at + delta : end + delta])
                    return found
                found.append(whole[at + delta : limit + delta])
                at = limit
        raise GuestMemoryError(gpa, size)

    def host(self, gpa: int, size: int, *, writable: bool = True) -> int:
        """Return the host address of *size* bytes in one region, for ``_native``.

        :raises GuestMemoryError: not memory, or over a region's border
        """
        pieces = self._pieces(gpa, size, writable)
        if len(pieces) != 1:
            raise GuestMemoryError(gpa, size, "two regions meet")
        return pieces[0][0]

    def contains(self, gpa: int, size: int, *, writable: bool = True) -> bool:
        """Return whether an access of *size* bytes would succeed."""
        for start, end, _, readonly in self._spans:
            if start <= gpa and gpa + size <= end and size >= 0:
                return not (writable and readonly)
        try:
            self._pieces(gpa, size, writable)
        except GuestMemoryError:
            return False
        return True

    def read_u8(self, gpa: int) -> int:
        """Return one byte."""
        return self.read(gpa, 1)[0]

    def read_u16(self, gpa: int) -> int:
        """Return a little-endian 16-bit value."""
        return int.from_bytes(self.read(gpa, 2), "little")

    def read_u32(self, gpa: int) -> int:
        """Return a little-endian 32-bit value."""
        return int.from_bytes(self.read(gpa, 4), "little")

    def read_u64(self, gpa: int) -> int:
        """Return a little-endian 64-bit value."""
        return int.from_bytes(self.read(gpa, 8), "little")

    def write_u8(self, gpa: int, value: int) -> None:
        """Store the low 8 bits of *value*."""
        self.write(gpa, bytes((value & 0xFF,)))

    def write_u16(self, gpa: int, value: int) -> None:
        """Store the low 16 bits of *value*, little-endian."""
        self.write(gpa, (value & 0xFFFF).to_bytes(2, "little"))

    def write_u32(self, gpa: int, value: int) -> None:
        """Store the low 32 bits of *value*, little-endian."""
        self.write(gpa, (value & 0xFFFFFFFF).to_bytes(4, "little"))

    def write_u64(self, gpa: int, value: int) -> None:
        """Store the low 64 bits of *value*, little-endian."""
        self.write(gpa, (value & (1 << 64) - 1).to_bytes(8, "little"))

    def _pieces(self, gpa: int, size: int, writing: bool) -> list[tuple[int, int]]:
        """Return ``(host address, length)`` of the parts of an access, in order."""
        for start, limit, base, readonly in self._spans:
            # Nearly all accesses lie within one region.
            if start <= gpa and gpa + size <= limit and size > 0 and not (writing and readonly):
                return [(base + gpa, size)]
        if gpa < 0 or size < 0 or gpa + size > _END:
            raise GuestMemoryError(gpa, size)
        pieces = []
        at, end = gpa, gpa + size
        for start, limit, base, readonly in self._spans:  # in rising order
            if at < end and start <= at < limit:
                if writing and readonly:
                    raise GuestMemoryError(gpa, size, "only ROM")
                length = min(end, limit) - at
                pieces.append((base + at, length))
                at += length
        if at < end:
            raise GuestMemoryError(gpa, size)
        return pieces


def _mapping(observer: MemoryObserver, region: MemoryRegion) -> Step:
    """Return how an observer is told that a region comes, and the undoing."""
    return lambda: observer.map(region), lambda: observer.unmap(region)


def _all_or_none(steps: list[Step]) -> None:
    """Do all steps; if one fails, undo those before it."""
    done: list[Callable[[], None]] = []
    try:
        for do, undo in steps:
            do()
            done.append(undo)
    except BaseException:
        for undo in reversed(done):
            undo()
        raise
