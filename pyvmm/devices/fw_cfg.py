"""QEMU's firmware configuration device (docs/specs/fw_cfg.rst): items that firmware and kernels
made for QEMU ask for, by key and by name, over two ports and by DMA.

What items there are is made at the first access (``machine.fw_cfg``): most guests never ask. Left
out: writing by the data port, which QEMU has given up, too.

An evil guest can give any address, length and key. A length is taken in slices: the first by the
vCPU, which has to be able to stop, the rest by the main loop, while the guest polls the control
word as the specification tells it to. One transfer is under way at a time; a further one is
refused.

``on_read``/``on_write`` run on vCPU threads, ``handle_...`` on the main loop thread.
"""

from __future__ import annotations

import os
import struct

from pyvmm.devices.base import Device
from pyvmm.errors import RamError
from pyvmm.memory.guest import GuestMemoryError
from pyvmm.vmstate.fields import Description, Record, boolean, u16, u32, u64

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import Protocol

    from pyvmm.core.eventloop import EventLoop
    from pyvmm.memory.guest import GuestMemory

    class Item(Protocol):
        """What a key selects."""

        size: int
        is_writable: bool  # such an item is small

        def read(self, offset: int, size: int) -> bytes:
            """Return ``size`` bytes, all of which are in it."""

        def write(self, offset: int, data: bytes) -> None:
            """Take bytes, for which there is room."""

    #: From the files that a guest is booted from, by option, to the items, by key.
    MakeItems = Callable[[Mapping[str, int]], dict[int, Item]]

#: Widest access that is not split, in bytes.
WIDTH = 4
# Ports 2 and 3 nobody has.
SELECTOR, DATA, DMA_HIGH, DMA_LOW = 0, 1, 4, 8

SIGNATURE, ID = 0x00, 0x01
FILE_DIR, FILE_FIRST = 0x19, 0x20
WRITE_CHANNEL = 0x4000  # in a key: means nothing any more
ARCH_LOCAL = 0x8000  # in a key: of this architecture
#: Keys without these two bits.
KEY_MASK = 0x3FFF
#: The keys of what the guest is booted from (kernel, initial RAM disk, setup).
BOOT_KEYS = frozenset((0x07, 0x08, 0x0A, 0x0B, 0x11, 0x12, 0x16, 0x17, 0x18))

ID_TRADITIONAL, ID_DMA = 0x1, 0x2
#: What a read of the transfer's address gives.
DMA_SIGNATURE = b"QEMU CFG"

# The control word of a transfer.
ERROR, READ, SKIP, SELECT, WRITE = 0x01, 0x02, 0x04, 0x08, 0x10

#: Bytes that are copied with the device's lock held.
SLICE = 1 << 20

# control, length, address
_ACCESS = struct.Struct(">IIQ")
#: Bytes of a file that are read at once for a guest that takes them one by one.
_AHEAD = 4096
_NOBODY = b"\xff\xff"


class Bytes:
    """An item that is there as a whole."""

    __slots__ = ("_data", "size")
    is_writable = False

    def __init__(self, data: bytes) -> None:
        self._data = data
        self.size = len(data)

    def read(self, offset: int, size: int) -> bytes:
        """Return some of it."""
        return self._data[offset : offset + size]

    def write(self, offset: int, data: bytes) -> None:
        """Nothing is written to it."""


class FilePart:
    """An item that is a part of a file.

    :param fd: of the file, which stays the caller's
    """

    __slots__ = ("_ahead", "_at", "_fd", "_start", "size")
    is_writable = False

    def __init__(self, fd: int, start: int, size: int) -> None:
        self._fd = fd
        self._start = start
        self.size = size
        # A guest that reads byte by byte makes no system call for each.
        self._at, self._ahead = 0, b""

    def read(self, offset: int, size: int) -> bytes:
        """Return some of it; zeros for what the file has lost since."""
        if size > 1:
            return self._read(offset, size)
        if not self._at <= offset < self._at + len(self._ahead):
            self._at = offset
            self._ahead = self._read(offset, min(_AHEAD, self.size - offset))
        return self._ahead[offset - self._at : offset - self._at + 1]

    def write(self, offset: int, data: bytes) -> None:
        """Nothing is written to it."""

    def _read(self, offset: int, size: int) -> bytes:
        try:
            return os.pread(self._fd, size, self._start + offset).ljust(size, b"\0")
        except OSError:
            return bytes(size)


def _no_items(_files: Mapping[str, int]) -> dict[int, Item]:
    return {}


def _check(record: Record) -> None:
    if record.control & ~(ERROR | READ | SKIP | WRITE):
        raise ValueError(f"control {record.control:#x} is none of a transfer under way")


class FwCfg(Device):
    """The device.

    :param memory: where transfers read and write
    :param loop: goes on with a transfer that is long
    :ivar make_items: called for the items at the first access, on whatever thread that is; and once
        more when the files have changed
    :ivar ask_files: called in a new image for the files if the guest is about to read them
    """

    name = "fw_cfg"
    is_optional = True
    vmstate = Description(
        "fw_cfg",
        [
            u16("cur_entry"),
            u32("cur_offset"),
            u32("dma_high"),
            # The transfer that is under way: where its control word is, and what is left of it.
            boolean("is_transferring"),
            u64("access"),
            u32("control"),
            u32("length"),
            u64("address"),
        ],
        check=_check,
    )

    def __init__(self, memory: GuestMemory, loop: EventLoop) -> None:
        super().__init__()
        self.make_items: MakeItems = _no_items
        self.ask_files: Callable[[], object] = lambda: None
        self._memory = memory
        self._loop = loop
        self._items: dict[int, Item] | None = None
        self._files: Mapping[str, int] = {}
        self._works = self._is_queued = False
        self._clear()

    def _clear(self) -> None:
        self.cur_entry = self.cur_offset = self.dma_high = 0
        self.is_transferring = False
        self.access = self.control = self.length = self.address = 0

    @property
    def has_state(self) -> bool:
        return bool(self.cur_entry or self.cur_offset or self.dma_high or self.is_transferring)

    def reset(self) -> None:
        self._clear()

    def start(self) -> None:
        if self.cur_entry & KEY_MASK in BOOT_KEYS and not self._files:
            self.ask_files()
        with self.lock:
            self._works = True
            if self.is_transferring:
                self._queue()

    def drain(self, timeout_s: float | None = None) -> None:
        with self.lock:
            self._works = False

    def close(self) -> None:
        self._works = False

    def lend(self, files: Mapping[str, int]) -> None:
        """Take note of the files that the guest is booted from, by option: of descriptors that stay
        the caller's, and open until there are others. Main loop."""
        with self.lock:
            self._files = files
            self._items = None

    # ---- registers -------------------------------------------------------------------------

    def on_read(self, offset: int, size: int) -> int:
        if offset <= DATA:
            # Both ports, since they cannot be told apart in QEMU either.
            return self._next_byte() if size == 1 else 0
        registers = _NOBODY + DMA_SIGNATURE
        return int.from_bytes(registers[offset - 2 : offset - 2 + size], "little")

    def on_write(self, offset: int, size: int, value: int) -> None:
        if offset == SELECTOR and size == 2:
            self._select(value)
        elif offset == DMA_HIGH and size == 4:
            self.dma_high = _swapped(value)
        elif offset == DMA_LOW and size == 4:
            # Behind a RamError the access is made once more.
            self._begin(self.dma_high << 32 | _swapped(value))
            self.dma_high = 0

    def _select(self, key: int) -> None:
        self.cur_entry = key
        self.cur_offset = 0

    def _item(self) -> Item | None:
        if self._items is None:
            self._items = self.make_items(self._files)
        return self._items.get(self.cur_entry & ~WRITE_CHANNEL)

    def _next_byte(self) -> int:
        item = self._item()
        if item is None or self.cur_offset >= item.size:
            return 0
        self.cur_offset += 1
        return item.read(self.cur_offset - 1, 1)[0]

    # ---- transfers -------------------------------------------------------------------------

    def _begin(self, access: int) -> None:
        memory = self._memory
        if self.is_transferring:
            self._answer(access, ERROR)
            return
        try:
            control, length, address = _ACCESS.unpack(memory.read(access, _ACCESS.size))
        except GuestMemoryError:
            self._answer(access, ERROR)
            return
        if control & SELECT:
            self._select(control >> 16)
        # Of several the first counts.
        operation = next((bit for bit in (READ, WRITE, SKIP) if control & bit), 0)
        self.access, self.control, self.address = access, operation, address
        self.length = length if operation else 0
        self.is_transferring = True
        self._go_on()
        if self.is_transferring:
            self._queue()

    def handle_transfer(self) -> None:
        """Go on with the transfer that is under way."""
        with self.lock:
            self._is_queued = False
            if self._works and self.is_transferring and self._go_on():
                self._queue()

    def _queue(self) -> None:
        if not self._is_queued:
            self._is_queued = True
            self._loop.call_soon(self.handle_transfer)

    def _go_on(self) -> bool:
        """Do a slice; return whether the next can follow at once."""
        try:
            self._do_slice()
        except GuestMemoryError:
            self.control, self.length = ERROR, 0
        except RamError as error:
            # The guest is paused, and starts the device when it goes on.
            self._memory.report(error)
            return False
        if self.length:
            return True
        try:
            self._answer(self.access, self.control & ERROR)
        except RamError as error:
            self._memory.report(error)
            return False
        self.is_transferring = False
        return False

    def _do_slice(self) -> None:
        item = self._item()
        left = max(item.size - self.cur_offset, 0) if item else 0
        inside = min(self.length, left)
        if self.control & READ:
            size = min(inside or self.length, SLICE)
            if item and inside:
                self._memory.write(self.address, item.read(self.cur_offset, size))
                self.cur_offset += size
            else:
                self._memory.fill(self.address, size)
            self.address += size
            self.length -= size
        elif self.control & WRITE:
            # All of it or nothing, and no more than there is.
            if item and item.is_writable and 0 < self.length <= left:
                item.write(self.cur_offset, self._memory.read(self.address, self.length))
                self.cur_offset += self.length
            elif self.length:
                self.control = ERROR
            self.length = 0
        else:
            self.cur_offset += inside
            self.length = 0

    def _answer(self, access: int, control: int) -> None:
        try:
            self._memory.write(access, control.to_bytes(4, "big"))
        except GuestMemoryError:
            pass  # nobody can be told


def _swapped(value: int) -> int:
    return int.from_bytes(value.to_bytes(4, "little"), "big")
