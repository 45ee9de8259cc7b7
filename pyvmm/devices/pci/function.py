"""One PCI function's configuration space (PCI Local Bus 3.0, chapter 6): identity, BARs,
capabilities. Which device is behind it is not known here.

Left out: expansion ROMs, bus mastering as a permission (a device of ours reads its rings whatever
the bit says, as QEMU's do not; a driver sets it before), and everything beyond 256 bytes.

What an evil guest can try: any write to any byte, while other vCPUs use the device. What is not
writable stays. The host (``host``) decides where BARs are decoded, under one lock for all of them.
"""

from __future__ import annotations

from pyvmm.vmstate.fields import Buffer, Description

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Protocol

    from pyvmm.core.bus import BusDevice, Region
    from pyvmm.vmstate.fields import Record

    class Host(Protocol):
        """What a function asks of its bus (``host.PciHost``)."""

        def decode(self) -> None: ...
        def assign(self, function: Function) -> None: ...
        def drive(self, function: Function) -> None: ...
        def restore(self, function: Function) -> None: ...


SIZE = 256

VENDOR_ID = 0x00
DEVICE_ID = 0x02
COMMAND = 0x04
STATUS = 0x06
REVISION = 0x08
CLASS = 0x09
CACHE_LINE_SIZE = 0x0C
HEADER_TYPE = 0x0E
BAR0 = 0x10
BARS = 6
SUBSYSTEM_VENDOR_ID = 0x2C
SUBSYSTEM_ID = 0x2E
CAPABILITIES = 0x34
INTERRUPT_LINE = 0x3C
INTERRUPT_PIN = 0x3D
FIRST_CAPABILITY = 0x40

COMMAND_IO = 1 << 0
COMMAND_MEMORY = 1 << 1
COMMAND_MASTER = 1 << 2
COMMAND_INTX_DISABLE = 1 << 10
STATUS_INTERRUPT = 1 << 3
STATUS_CAPABILITIES = 1 << 4
MULTIFUNCTION = 0x80

BAR_IO = 1
BAR_64 = 4
BAR_PREFETCHABLE = 8

#: How a function's writable and other registers are written: as they are. Those that no guest can
#: write have to be those of the function that loads them.
CONFIGURATION = Description("pci-configuration", [Buffer("space", SIZE)])


def place(slot: int, number: int) -> str:
    """Return where a function is, as states and ``info pci`` have it."""
    return f"0000:00:{slot:02x}.{number:x}"


class Kick:
    """A write that signals an eventfd in place of an exit.

    :param offset: in the BAR
    :param size: of the write, in bytes; its value does not matter
    """

    __slots__ = ("fd", "offset", "size")

    def __init__(self, offset: int, size: int, fd: int) -> None:
        self.offset = offset
        self.size = size
        self.fd = fd


class Bar:
    """A range of addresses that the guest places.

    :param index: of its register, the first of two if it has 64 bits
    :param flags: the register's low bits: BAR_IO, BAR_64, BAR_PREFETCHABLE
    :param width: bytes of the widest access
    :ivar region: where it is decoded now, if it is
    """

    __slots__ = ("device", "flags", "index", "kicks", "region", "size", "width")

    def __init__(self, index: int, size: int, device: BusDevice, flags: int, width: int) -> None:
        self.index = index
        self.size = size
        self.device = device
        self.flags = flags
        self.width = width
        self.kicks: list[Kick] = []
        self.region: Region | None = None

    @property
    def register(self) -> int:
        """Offset of its register."""
        return BAR0 + 4 * self.index

    @property
    def register_size(self) -> int:
        """Bytes of its register."""
        return 8 if self.flags & BAR_64 else 4


class Function:
    """One function.

    :param name: for ``info mtree`` and the like
    :param vendor: and ``device``: what drivers look for; ``subsystem`` likewise
    :param class_code: base class, subclass, programming interface, in 24 bits
    :param has_interrupt: whether it has INTA
    :ivar slot: on bus 0, and ``number``: which function of the slot; set by the host
    :ivar id: what ``-device ...,id=`` called the device
    :ivar host: the bus that it is on, once it is
    :ivar on_read: called with offset and size before each read of the guest's, with the host's lock
    :ivar on_change: likewise after each write
    """

    slot = number = 0
    id = ""

    def __init__(
        self,
        name: str,
        *,
        vendor: int,
        device: int,
        class_code: int,
        revision: int = 0,
        subsystem: tuple[int, int] = (0, 0),
        has_interrupt: bool = False,
    ) -> None:
        self.name = name
        self.bars: list[Bar] = []
        self.host: Host | None = None
        self.on_read: Callable[[int, int], None] | None = None
        self.on_change: Callable[[int, int], None] | None = None
        self._writable = bytearray(SIZE)
        self._space = bytearray(SIZE)
        self._end = FIRST_CAPABILITY
        self._last = CAPABILITIES
        self._asserts = False
        self.set(VENDOR_ID, 2, vendor)
        self.set(DEVICE_ID, 2, device)
        self.set(REVISION, 1, revision)
        self.set(CLASS, 3, class_code)
        self.set(SUBSYSTEM_VENDOR_ID, 2, subsystem[0])
        self.set(SUBSYSTEM_ID, 2, subsystem[1])
        self.set(INTERRUPT_PIN, 1, int(has_interrupt))
        self._allow(COMMAND, 2, COMMAND_IO | COMMAND_MEMORY | COMMAND_MASTER | COMMAND_INTX_DISABLE)
        self._allow(CACHE_LINE_SIZE, 1, 0xFF)
        self._allow(INTERRUPT_LINE, 1, 0xFF)

    # ---- what a device declares ------------------------------------------------------------

    def add_bar(
        self, index: int, size: int, device: BusDevice, *, flags: int = 0, width: int = 4
    ) -> Bar:
        """Give the function a BAR and return it.

        :param size: a power of two, 16 at least
        :param device: answers the accesses
        :param flags: BAR_IO, or BAR_64 and BAR_PREFETCHABLE
        """
        bar = Bar(index, size, device, flags, width)
        self.bars.append(bar)
        self.set(bar.register, 4, flags)
        self._allow(bar.register, bar.register_size, -size & ~0xF)
        return bar

    def add_capability(self, id: int, body: bytes, writable: bytes = b"") -> int:
        """Append a capability to the list; return its offset.

        :param body: what follows its id and the pointer to the next one
        :param writable: the bits of ``body`` that the guest can write
        """
        at = self._end
        self._end = (at + 2 + len(body) + 3) & ~3
        assert self._end <= SIZE
        self._space[at] = id
        self._space[at + 2 : at + 2 + len(body)] = body
        self._writable[at + 2 : at + 2 + len(writable)] = writable
        self._space[self._last] = at
        self._last = at + 1
        self.set(STATUS, 2, STATUS_CAPABILITIES)
        return at

    def get(self, offset: int, size: int) -> int:
        """Return a register."""
        return int.from_bytes(self._space[offset : offset + size], "little")

    def set(self, offset: int, size: int, value: int) -> None:
        """Set a register, whether the guest can write it or not."""
        self._space[offset : offset + size] = value.to_bytes(size, "little")

    def _allow(self, offset: int, size: int, bits: int) -> None:
        mask = bits & (1 << 8 * size) - 1
        self._writable[offset : offset + size] = mask.to_bytes(size, "little")

    # ---- guest accesses, with the host's lock ----------------------------------------------

    def read(self, offset: int, size: int) -> int:
        """Return what a guest reads, within 256 bytes."""
        if self.on_read is not None:
            self.on_read(offset, size)
        value = self.get(offset, size)
        if self._asserts and offset <= STATUS < offset + size:
            value |= STATUS_INTERRUPT << 8 * (STATUS - offset)
        return value

    def write(self, offset: int, size: int, value: int) -> None:
        """Take what a guest writes, within 256 bytes."""
        for at, byte in enumerate(value.to_bytes(size, "little"), offset):
            mask = self._writable[at]
            self._space[at] = self._space[at] & ~mask | byte & mask
        assert self.host is not None
        if offset < BAR0 + 4 * BARS and offset + size > COMMAND:
            self.host.decode()
        self.host.drive(self)
        if self.on_change is not None:
            self.on_change(offset, size)

    def address(self, bar: Bar) -> int | None:
        """Return where the guest wants to have a BAR decoded; None while it does not."""
        command = self.get(COMMAND, 2)
        if not command & (COMMAND_IO if bar.flags & BAR_IO else COMMAND_MEMORY):
            return None
        return self.get(bar.register, bar.register_size) & ~(3 if bar.flags & BAR_IO else 0xF)

    # ---- the interrupt line ----------------------------------------------------------------

    def set_interrupt(self, asserts: bool) -> None:
        """Drive INTA. Any thread."""
        if asserts != self._asserts:
            self._asserts = asserts
            if self.host is not None:
                self.host.drive(self)

    @property
    def has_pin(self) -> bool:
        """Whether it has INTA."""
        return self.get(INTERRUPT_PIN, 1) != 0

    @property
    def drives_line(self) -> bool:
        """Whether INTA is driven, and the guest lets it be."""
        return self._asserts and not self.get(COMMAND, 2) & COMMAND_INTX_DISABLE

    # ---- life and state --------------------------------------------------------------------

    def reset(self) -> None:
        """Go to what a guest finds after power-on, when firmware has placed the BARs."""
        for at, mask in enumerate(self._writable):
            self._space[at] &= ~mask
        if self.host is not None:
            self.host.assign(self)
            self.host.decode()

    @property
    def space(self) -> bytes:
        """All registers, for the state."""
        return bytes(self._space)

    def check(self, state: Record) -> None:
        """See that a state is of this function.

        :raises ValueError: it is of another one
        """
        pairs = zip(state.space, self._space, self._writable, strict=True)
        for at, (saved, own, mask) in enumerate(pairs):
            if (saved ^ own) & ~mask & 0xFF:
                raise ValueError(f"{self.name} has {saved:#x} at {at:#x}, where {own:#x} is fixed")

    def load(self, state: Record, *, asserts: bool) -> None:
        """Take over a state.

        :param asserts: whether it drives its interrupt line
        """
        self._space[:] = state.space
        self._asserts = asserts
        if self.host is not None:
            self.host.decode()
            self.host.restore(self)
