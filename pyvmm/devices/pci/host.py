"""The host bridge of bus 0: configuration accesses by ports and in memory, and what is decoded
where.

Ports 0xCF8 and 0xCFC (PCI Local Bus 3.0, 3.2.2.3.2) and the memory that ACPI's MCFG tells of (PCI
Express 5.0, 7.2.2) lead to the same registers. One lock is held around every access to any of
them, since functions share what BARs are placed in.

A BAR is decoded where the guest put it if that lies in one of the windows that firmware told of,
and nothing else is there. Otherwise it is nowhere, until it or what is in its way moves: so no
BAR comes between the guest and its RAM, its interrupt controllers or another device.
"""

from __future__ import annotations

from pyvmm.core.bus import BusDevice
from pyvmm.core.threads import Lock
from pyvmm.devices.base import Device
from pyvmm.devices.pci.function import (
    BAR_64,
    BAR_IO,
    CONFIGURATION,
    HEADER_TYPE,
    INTERRUPT_LINE,
    MULTIFUNCTION,
    SIZE,
    Bar,
    Function,
    Kick,
)
from pyvmm.errors import ConfigError, InternalError, KvmError
from pyvmm.vmstate.fields import Description, Record, Struct, u32

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any, Protocol

    from pyvmm.core.bus import Bus
    from pyvmm.core.irq import IrqLine

    class Kicks(Protocol):
        """Who signals eventfds for a guest's writes (``kvm.irq``). Any thread."""

        def kick(
            self,
            gpa: int,
            value: int | None,
            fd: int,
            user: str,
            size: int = 4,
            *,
            is_port: bool = False,
        ) -> None: ...
        def unkick(self, gpa: int, value: int | None, *, is_port: bool = False) -> None: ...


SLOTS = 32
FUNCTIONS = 8
PORTS = 8
ENABLE = 1 << 31  # in the address register
ADDRESS_BITS = ENABLE | 0xFFFFFC
#: Bytes of one function's registers in memory; beyond the first 256 there are none.
ECAM_FUNCTION = 4096
ECAM_SIZE = SLOTS * FUNCTIONS * ECAM_FUNCTION
WIDTH = 4

VENDOR = 0x1B36  # Red Hat's, for virtual hardware
BRIDGE = 0x0008  # a PCI Express host bridge
CLASS_BRIDGE = 0x060000


class Window:
    """Addresses that BARs may lie at: from ``start`` up to ``end``."""

    __slots__ = ("_next", "end", "start")

    def __init__(self, start: int, end: int) -> None:
        self.start = start
        self.end = end
        self._next = start

    def contains(self, start: int, size: int) -> bool:
        """Return whether a range lies in it."""
        return self.start <= start and start + size <= self.end

    def take(self, size: int) -> int:
        """Return an address for a BAR of ``size`` bytes, behind those before.

        :raises ConfigError: there is no room
        """
        at = -(-self._next // size) * size
        if at + size > self.end:
            raise ConfigError("-device: the PCI bus has no addresses for so many; give fewer")
        self._next = at + size
        return at


class PciHost(Device):
    """Bus 0, and its host bridge, which is function 0 of slot 0.

    :param io: and the other two: the windows; ``high`` is above 4 GiB and may be empty
    :param lines: four interrupt lines, which the functions' INTA share
    """

    name = "pci-host"
    vmstate = Description("pci-host", [u32("address"), Struct("bridge", CONFIGURATION)])

    def __init__(
        self,
        ports: Bus,
        mmio: Bus,
        *,
        io: Window,
        low: Window,
        high: Window,
        lines: Sequence[IrqLine],
        kicks: Kicks,
    ) -> None:
        super().__init__()
        self.vmstate = Description(self.name, self.vmstate.fields, check=self._check)
        self.io, self.low, self.high = io, low, high
        self.functions: dict[tuple[int, int], Function] = {}
        self._ports = ports
        self._mmio = mmio
        self._lines = lines
        self._driven: list[set[Function]] = [set() for _ in lines]
        self._drive_lock = Lock()
        self._kicks = kicks
        self._first: dict[Bar, int] = {}  # where each BAR is at power-on
        self.address = 0
        self.bridge = Function(self.name, vendor=VENDOR, device=BRIDGE, class_code=CLASS_BRIDGE)
        self.add(self.bridge, (0, 0))

    # ---- functions -------------------------------------------------------------------------

    def add(
        self, function: Function, place: tuple[int, int], *, multifunction: bool = False
    ) -> None:
        """Put a function on the bus; its BARs are given addresses.

        :param place: slot and number
        :param multifunction: whether it says that its slot has others
        :raises ConfigError: there is one, or the windows are full
        """
        if place in self.functions:
            raise ConfigError(
                f"-device {function.name}: addr={place[0]:x}.{place[1]} has a device already;"
                " choose another"
            )
        for bar in function.bars:
            self._first[bar] = self._window(bar).take(bar.size)
        function.host = self
        function.slot, function.number = place
        self.functions[place] = function
        if multifunction:
            function.set(HEADER_TYPE, 1, MULTIFUNCTION)
        self.assign(function)

    def assign(self, function: Function) -> None:
        """Do for a function what firmware does: give its BARs addresses, which the guest enables,
        and tell it which interrupt it has."""
        for bar in function.bars:
            function.set(bar.register, bar.register_size, self._first[bar] | bar.flags)
        if function.has_pin:
            function.set(INTERRUPT_LINE, 1, self.line_of(function).number)

    def line_of(self, function: Function) -> IrqLine:
        """Return the interrupt line of a function's INTA."""
        return self._lines[function.slot % len(self._lines)]

    def _window(self, bar: Bar) -> Window:
        if bar.flags & BAR_IO:
            return self.io
        has_room = self.high.start < self.high.end
        return self.high if bar.flags & BAR_64 and has_room else self.low

    # ---- what is decoded -------------------------------------------------------------------

    def decode(self) -> None:
        """Have each BAR decoded where the guest wants it, or nowhere. With the lock held, or
        while no vCPU runs."""
        wanted = {bar: function.address(bar) for function, bar in self._bars()}
        for function, bar in self._bars():
            if bar.region is not None and bar.region.start != wanted[bar]:
                self._hide(function, bar)
        for function, bar in self._bars():
            start = wanted[bar]
            if bar.region is None and start is not None and self._may_be(bar, start):
                self._show(function, bar, start)

    def _bars(self) -> list[tuple[Function, Bar]]:
        return [(function, bar) for function in self.functions.values() for bar in function.bars]

    def _may_be(self, bar: Bar, start: int) -> bool:
        if bar.flags & BAR_IO:
            return self.io.contains(start, bar.size)
        return self.low.contains(start, bar.size) or self.high.contains(start, bar.size)

    def _show(self, function: Function, bar: Bar, start: int) -> None:
        bus = self._ports if bar.flags & BAR_IO else self._mmio
        name = f"{function.name} BAR {bar.index}"
        try:
            bar.region = bus.add(start, bar.size, bar.device, name, width=bar.width)
        except InternalError:
            return  # something else is there
        self._assign(function, bar)

    def _hide(self, function: Function, bar: Bar) -> None:
        self._deassign(bar)
        region, bar.region = bar.region, None
        assert region is not None
        (self._ports if bar.flags & BAR_IO else self._mmio).remove(region)

    def set_kicks(self, function: Function, bar: Bar, kicks: list[Kick]) -> None:
        """Give a BAR other kicks than it had. With the lock held, or while no vCPU runs."""
        self._deassign(bar)
        bar.kicks = kicks
        self._assign(function, bar)

    def _assign(self, function: Function, bar: Bar) -> None:
        if bar.region is None:
            return
        is_port = bool(bar.flags & BAR_IO)
        for kick in bar.kicks:
            at = bar.region.start + kick.offset
            try:
                self._kicks.kick(at, kick.value, kick.fd, function.name, kick.size, is_port=is_port)
            except KvmError:
                continue  # no room in KVM: it is an exit, which the bus leads to the device

    def _deassign(self, bar: Bar) -> None:
        if bar.region is None:
            return
        is_port = bool(bar.flags & BAR_IO)
        for kick in bar.kicks:
            try:
                self._kicks.unkick(bar.region.start + kick.offset, kick.value, is_port=is_port)
            except KvmError:
                continue  # KVM has no memory for that: a write there still kicks the device

    # ---- interrupt lines -------------------------------------------------------------------

    def drive(self, function: Function) -> None:
        """Have the line of a function's INTA follow it: it is high while one function drives it.
        Any thread."""
        with self._drive_lock:
            self.line_of(function).set_level(self._follow(function))

    def restore(self, function: Function) -> None:
        """The same for a level that the irqchip's loaded state contains."""
        self.line_of(function).restore_level(self._follow(function))

    def _follow(self, function: Function) -> bool:
        driven = self._driven[function.slot % len(self._lines)]
        (driven.add if function.drives_line else driven.discard)(function)
        return bool(driven)

    # ---- configuration accesses ------------------------------------------------------------

    def read_config(self, slot: int, number: int, offset: int, size: int) -> int:
        """Return what a configuration read gives, ``offset`` within 4 KiB. With the lock held."""
        function = self.functions.get((slot, number))
        if function is None or offset + size > SIZE:
            return (1 << 8 * size) - 1
        return function.read(offset, size)

    def write_config(self, slot: int, number: int, offset: int, size: int, value: int) -> None:
        """Make a configuration write, likewise."""
        function = self.functions.get((slot, number))
        if function is not None and offset + size <= SIZE:
            function.write(offset, size, value)

    def on_read(self, offset: int, size: int) -> int:
        if offset < 4:
            return self.address if (offset, size) == (0, 4) else (1 << 8 * size) - 1
        target = self._target(offset)
        return (1 << 8 * size) - 1 if target is None else self.read_config(*target, size)

    def on_write(self, offset: int, size: int, value: int) -> None:
        if offset < 4:
            # By 32 bits alone: single ports of it are other devices' on PCs.
            if (offset, size) == (0, 4):
                self.address = value & ADDRESS_BITS
            return
        target = self._target(offset)
        if target is not None:
            self.write_config(*target, size, value)

    def _target(self, offset: int) -> tuple[int, int, int] | None:
        # Slot, function and register that the address register selects; other buses are empty.
        if not self.address & ENABLE or self.address >> 16 & 0xFF:
            return None
        return self.address >> 11 & 0x1F, self.address >> 8 & 7, self.address & 0xFC | offset & 3

    # ---- life and state --------------------------------------------------------------------

    def properties(self) -> dict[str, Any]:
        return {"functions": len(self.functions)}

    def reset(self) -> None:
        self.address = 0
        self.bridge.reset()

    def save(self) -> Record:
        return Record(address=self.address, bridge=self.bridge)

    def _check(self, state: Record) -> None:
        if state.address & ~ADDRESS_BITS:
            raise ValueError(f"address {state.address:#x} has bits that do not exist")
        self.bridge.check(state.bridge)

    def load(self, state: Record) -> None:
        self.address = state.address
        self.bridge.load(state.bridge, asserts=False)


class Ecam(BusDevice):
    """The same registers in memory."""

    def __init__(self, host: PciHost) -> None:
        self.lock = host.lock
        self._host = host

    def on_read(self, offset: int, size: int) -> int:
        return self._host.read_config(*_split(offset), size)

    def on_write(self, offset: int, size: int, value: int) -> None:
        self._host.write_config(*_split(offset), size, value)


def _split(offset: int) -> tuple[int, int, int]:
    return offset >> 15, offset >> 12 & 7, offset & ECAM_FUNCTION - 1
