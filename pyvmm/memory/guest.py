"""Guest-physical memory as the VMM sees it: every access to guest RAM goes through here.

Addresses come from the guest, so each access is bounds-checked; one that runs over the border of
two adjacent regions is put together once, here. Any thread may read and write, as on a real
machine without ordering between them; aligned ``u16`` to ``u64`` accesses are single loads and
stores. Left out: dirty tracking, and anything that is not memory (see ``core.bus``).
"""

from __future__ import annotations

import struct

from pyvmm.errors import GuestError, InternalError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from mmap import mmap
    from typing import Literal

    from pyvmm.memory.backend import RamBackend

_END = 1 << 64
# Little-endian is the host's own order: one memcpy of the item's size, which is one load.
_U16 = struct.Struct("<H")
_U32 = struct.Struct("<I")
_U64 = struct.Struct("<Q")
_FORMATS: dict[int, Literal["H", "I", "Q"]] = {2: "H", 4: "I", 8: "Q"}


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


class GuestMemory:
    """All memory of one guest, by guest-physical address."""

    __slots__ = ("_spans", "regions")

    def __init__(self) -> None:
        self.regions: list[MemoryRegion] = []
        """In rising order of address; read only, see :meth:`add`."""
        # What an access needs and no more: start, end, mapping, mapping offset of address 0.
        self._spans: list[tuple[int, int, mmap, int, bool]] = []

    def add(self, region: MemoryRegion) -> None:
        """Make *region* visible. Only before the first vCPU runs.

        :raises InternalError: it overlaps another, is not page-aligned or exceeds its backend
        """
        aligned = (region.gpa | region.size | region.offset) & 0xFFF == 0
        inside = region.offset >= 0 and region.offset + region.size <= region.backend.size
        if not aligned or not inside or not 0 <= region.gpa < region.end <= _END:
            raise InternalError(f"memory region {region.name} at {region.gpa:#x} is malformed")
        for other in self.regions:
            if region.gpa < other.end and other.gpa < region.end:
                raise InternalError(f"memory regions {region.name} and {other.name} overlap")
        self.regions = sorted([*self.regions, region], key=lambda entry: entry.gpa)
        self._spans = [
            (each.gpa, each.end, each.backend.view, each.offset - each.gpa, each.readonly)
            for each in self.regions
        ]

    def add_ram(self, backend: RamBackend, ranges: Sequence[tuple[int, int, int]]) -> None:
        """Add one backend as RAM, in parts ``(gpa, size, offset)`` (see ``x86.layout``)."""
        for gpa, size, offset in ranges:
            self.add(MemoryRegion(backend.name, gpa, size, backend, offset))

    def read(self, gpa: int, size: int) -> bytes:
        """Return *size* bytes; the caller caps a size that the guest chose.

        :raises GuestMemoryError: some of it is not memory
        """
        for start, end, view, delta, _ in self._spans:
            if start <= gpa and gpa + size <= end and size >= 0:
                return view[gpa + delta : gpa + delta + size]
        return b"".join(view[at : at + n] for view, at, n in self._pieces(gpa, size, False))

    def write(self, gpa: int, data: bytes | bytearray | memoryview) -> None:
        """Store *data*; nothing is stored if not all of it can be.

        :raises GuestMemoryError: some of it is not memory, or read-only
        """
        source = memoryview(data).cast("B")
        done = 0
        for view, at, size in self._pieces(gpa, len(source), True):
            view[at : at + size] = source[done : done + size]
            done += size

    def fill(self, gpa: int, size: int, value: int = 0) -> None:
        """Store *size* bytes of *value*, in steps that need little memory."""
        for view, at, length in self._pieces(gpa, size, True):
            block = bytes([value]) * min(length, 1 << 20)
            for done in range(0, length, len(block) or 1):
                step = min(len(block), length - done)
                view[at + done : at + done + step] = block[:step]

    def view(self, gpa: int, size: int, *, writable: bool = True) -> memoryview:
        """Return the memory itself, *size* bytes in one region. Release it before the end.

        :raises GuestMemoryError: not memory, or over a region's border
        """
        pieces = self._pieces(gpa, size, writable)
        if len(pieces) > 1:
            raise GuestMemoryError(gpa, size, "two regions meet")
        if not pieces:
            return memoryview(bytearray())
        view, at, _ = pieces[0]
        whole = memoryview(view)
        part = whole[at : at + size]
        return part if writable else part.toreadonly()

    def views(self, gpa: int, size: int, *, writable: bool = True) -> list[memoryview]:
        """Return the memory itself, *size* bytes, in one part for each region.

        :raises GuestMemoryError: some of it is not memory, or read-only
        """
        return [memoryview(view)[at : at + n] for view, at, n in self._pieces(gpa, size, writable)]

    def contains(self, gpa: int, size: int, *, writable: bool = True) -> bool:
        """Whether an access of *size* bytes would succeed."""
        for start, end, _, _, readonly in self._spans:
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
        return self._load(_U16, gpa)

    def read_u32(self, gpa: int) -> int:
        """Return a little-endian 32-bit value."""
        return self._load(_U32, gpa)

    def read_u64(self, gpa: int) -> int:
        """Return a little-endian 64-bit value."""
        return self._load(_U64, gpa)

    def write_u8(self, gpa: int, value: int) -> None:
        """Store the low 8 bits of *value*."""
        self.write(gpa, bytes((value & 0xFF,)))

    def write_u16(self, gpa: int, value: int) -> None:
        """Store the low 16 bits of *value*, little-endian."""
        self._store(2, gpa, value)

    def write_u32(self, gpa: int, value: int) -> None:
        """Store the low 32 bits of *value*, little-endian."""
        self._store(4, gpa, value)

    def write_u64(self, gpa: int, value: int) -> None:
        """Store the low 64 bits of *value*, little-endian."""
        self._store(8, gpa, value)

    def _load(self, kind: struct.Struct, gpa: int) -> int:
        for start, end, view, delta, _ in self._spans:
            if start <= gpa and gpa + kind.size <= end:
                value: int = kind.unpack_from(view, gpa + delta)[0]
                return value
        return int.from_bytes(self.read(gpa, kind.size), "little")

    def _store(self, size: int, gpa: int, value: int) -> None:
        value &= (1 << 8 * size) - 1
        for start, end, view, delta, readonly in self._spans:
            if start <= gpa and gpa + size <= end and not readonly:
                # Not struct.pack_into: it clears the bytes first, and another vCPU would see a
                # ring index of 0. A typed view stores the item at once.
                at = gpa + delta
                memoryview(view)[at : at + size].cast(_FORMATS[size])[0] = value
                return
        self.write(gpa, value.to_bytes(size, "little"))

    def _pieces(self, gpa: int, size: int, writing: bool) -> list[tuple[mmap, int, int]]:
        """Return ``(mapping, offset, length)`` of the parts of an access, in order."""
        for start, limit, view, delta, readonly in self._spans:
            # Nearly all accesses lie within one region.
            if start <= gpa and gpa + size <= limit and size > 0 and not (writing and readonly):
                return [(view, gpa + delta, size)]
        if gpa < 0 or size < 0 or gpa + size > _END:
            raise GuestMemoryError(gpa, size)
        pieces = []
        at, end = gpa, gpa + size
        for start, limit, view, delta, readonly in self._spans:  # in rising order
            if at < end and start <= at < limit:
                if writing and readonly:
                    raise GuestMemoryError(gpa, size, "only ROM")
                length = min(end, limit) - at
                pieces.append((view, at + delta, length))
                at += length
        if at < end:
            raise GuestMemoryError(gpa, size)
        return pieces
