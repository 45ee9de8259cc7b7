"""MSI-X (PCI Local Bus 3.0, 6.8.2): a table of messages that the guest fills, each an interrupt.

Table and pending bits are in a BAR, the table at its beginning. A message that is masked, alone or
with all others, waits as a pending bit. Whoever serves a device in our place signals an eventfd,
which has a route: its message is that of the table while it may be sent, and otherwise none, so
that the eventfd is what waits.

What an evil guest can try: messages to any address. Only those to the local APICs are sent.
"""

from __future__ import annotations

import struct

from pyvmm.core.bus import BusDevice
from pyvmm.core.threads import Lock
from pyvmm.errors import KvmError
from pyvmm.vmstate.fields import Description, Record, StructArray, boolean, u16, u32, u64

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Protocol

    from pyvmm.devices.pci.function import Function

    class Route(Protocol):
        """What an eventfd sends (``kvm.irq.MsiRoute``). Any thread."""

        @property
        def is_signalled(self) -> bool: ...
        def set(self, message: tuple[int, int] | None) -> None: ...


CAPABILITY = 0x11
ENABLE = 1 << 15
MASK_ALL = 1 << 14
MASKED = 1  # in an entry's vector control
ENTRY = 16
PENDING = 0x800
#: Bytes of the BAR.
SIZE = 0x1000
MAX_VECTORS = PENDING // ENTRY
#: Addresses of messages to local APICs (SDM volume 3, 11.11.1).
APICS = 0xFEE


def _check(state: Record) -> None:
    for vector in state.vectors:
        if vector.control & ~MASKED:
            raise ValueError(f"vector control {vector.control:#x} has bits that do not exist")


STATE = Description(
    "msix",
    [
        u16("count"),
        StructArray(
            "vectors",
            Description(
                "msix-vector", [u64("address"), u32("data"), u32("control"), boolean("pending")]
            ),
            "count",
            MAX_VECTORS,
        ),
    ],
    check=_check,
)


class Vector:
    """One entry of the table.

    :ivar route: of the eventfd that is signalled for it, if it has one
    """

    __slots__ = ("address", "control", "data", "pending", "route")

    def __init__(self) -> None:
        self.route: Route | None = None
        self.clear()

    @property
    def waits(self) -> bool:
        """The pending bit."""
        return self.pending or (self.route is not None and self.route.is_signalled)

    def clear(self) -> None:
        """Go to the state after a reset."""
        self.address = self.data = 0
        self.control = MASKED
        self.pending = False


class Msix(BusDevice):
    """The table of one function, and its capability.

    :param bar: index of the BAR that has it
    :param count: how many vectors
    :param send: sends a message, by address and data; any thread
    """

    def __init__(
        self, function: Function, bar: int, count: int, send: Callable[[int, int], None]
    ) -> None:
        self.lock = Lock()
        self.vectors = [Vector() for _ in range(count)]
        self._function = function
        self._send = send
        body = struct.pack("<HII", count - 1, bar, PENDING | bar)
        at = function.add_capability(CAPABILITY, body, struct.pack("<H", ENABLE | MASK_ALL))
        self._control = at + 2
        function.add_bar(bar, SIZE, self)
        function.msix = self

    @property
    def count(self) -> int:
        """Number of vectors."""
        return len(self.vectors)

    @property
    def is_enabled(self) -> bool:
        """Whether the guest uses messages in place of the line."""
        return bool(self._function.get(self._control, 2) & ENABLE)

    def notify(self, number: int) -> None:
        """Send a vector's message, or have it wait. Any thread.

        :param number: below ``count``
        """
        with self.lock:
            self.vectors[number].pending = True
            self._deliver(self.vectors[number])

    def connect(self, number: int, route: Route) -> None:
        """Have the eventfd of a route do what :meth:`notify` does. Any thread.

        :param number: below ``count``
        """
        with self.lock:
            self.vectors[number].route = route
            self._deliver(self.vectors[number])

    def update(self) -> None:
        """Send what waits and is not masked any more: the control register was written, or the
        vCPUs are about to run, perhaps after an update."""
        with self.lock:
            for vector in self.vectors:
                self._deliver(vector)

    def _deliver(self, vector: Vector) -> None:
        control = self._function.get(self._control, 2)
        may_send = control & (ENABLE | MASK_ALL) == ENABLE and not vector.control & MASKED
        is_for_apic = vector.address >> 20 == APICS
        if vector.route is not None:
            message = (vector.address, vector.data) if may_send and is_for_apic else None
            try:
                vector.route.set(message)
            except KvmError:
                pass  # no room in KVM: it waits as if it were masked, for the next change
        if vector.pending and may_send:
            vector.pending = False
            if is_for_apic:
                self._send(vector.address, vector.data)

    # ---- guest accesses: aligned, of 4 or 8 bytes; the bus makes two of the latter ------------

    def on_read(self, offset: int, size: int) -> int:
        if offset >= PENDING:
            bits = sum(vector.waits << n for n, vector in enumerate(self.vectors))
            return bits >> 8 * (offset - PENDING)
        number, at = divmod(offset, ENTRY)
        if number >= self.count:
            return 0
        vector = self.vectors[number]
        entry = struct.pack("<QII", vector.address, vector.data, vector.control)
        return int.from_bytes(entry[at : at + size], "little")

    def on_write(self, offset: int, size: int, value: int) -> None:
        number, at = divmod(offset, ENTRY)
        if number >= self.count or size != 4 or at & 3:
            return
        vector = self.vectors[number]
        if at == 0:
            vector.address = vector.address & ~0xFFFFFFFF | value & ~3
        elif at == 4:
            vector.address = vector.address & 0xFFFFFFFF | value << 32
        elif at == 8:
            vector.data = value
        else:
            vector.control = value & MASKED
        self._deliver(vector)

    # ---- life and state --------------------------------------------------------------------

    def reset(self) -> None:
        """Go to the state after power-on."""
        for vector in self.vectors:
            vector.clear()
        self.update()

    def check(self, state: Record) -> None:
        """See that a state is of this table.

        :raises ValueError: it is of another one
        """
        if state.count != self.count:
            raise ValueError(f"{state.count} MSI-X vectors, the device has {self.count}")

    def load(self, state: Record) -> None:
        """Take over a state. Eventfds send nothing before :meth:`update`: another VM still has
        them."""
        for vector, saved in zip(self.vectors, state.vectors, strict=True):
            for name in ("address", "data", "control", "pending"):
                setattr(vector, name, getattr(saved, name))
