"""QEMU's ``pci-testdev`` (its docs/specs/pci-testdev.rst): accesses to a BAR that cost nothing but
themselves, which test programs take the time of.

A test is chosen by a write of its number to the first byte of BAR 0 (memory) or BAR 1 (ports), and
the header in front of the BAR tells the rest: which byte at which offset is to be written. Writes
are counted; those that KVM turns into a signal nobody counts. BAR 2 is as large as the operator
says, and empty.

What an evil guest can try: to start and stop tests without end, while BARs move. There is one
eventfd, at one address at a time.
"""

from __future__ import annotations

import os
import struct

from pyvmm.core.bus import BusDevice, Nobody
from pyvmm.devices.base import Device
from pyvmm.devices.pci.function import (
    BAR_64,
    BAR_IO,
    BAR_PREFETCHABLE,
    CONFIGURATION,
    Function,
    Kick,
)
from pyvmm.vmstate.fields import Description, Record, Struct, i32, u32

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from pyvmm.devices.pci.host import PciHost

VENDOR, DEVICE = 0x1B36, 0x0005
CLASS = 0x00FF00
#: Bytes of BAR 0 and of BAR 1; what tests write is in the second half.
SIZES = (4096, 256)
KINDS = ("no-eventfd", "wildcard-eventfd", "datamatch-eventfd")
TYPES = ("mmio", "portio")
NO_TEST = -1
WIDTH = 1
MATCHED, ANY = 0xFA, 0xCE


class Test:
    """One test.

    :ivar offset: of the byte that it writes, in its BAR
    :ivar data: what to write; ``matches``: whether nothing else counts
    """

    __slots__ = ("data", "has_fd", "matches", "name", "number", "offset")

    def __init__(self, number: int) -> None:
        self.number = number
        kind = KINDS[number % len(KINDS)]
        self.name = f"{TYPES[number // len(KINDS)]}-{kind}"
        self.offset = SIZES[number // len(KINDS)] // 2 + number
        self.matches = kind != "wildcard-eventfd"
        self.has_fd = kind != "no-eventfd"
        self.data = MATCHED if self.matches else ANY

    def header(self, count: int) -> bytes:
        """Return what the guest reads in front of the BAR."""
        numbers = struct.pack("<BBxxIII", self.number, WIDTH, self.offset, self.data, count)
        return numbers + self.name.encode() + b"\0"


TESTS = [Test(number) for number in range(len(TYPES) * len(KINDS))]


class TestBar(BusDevice):
    """BAR 0 or 1."""

    def __init__(self, device: PciTestdev, number: int) -> None:
        self.lock = device.lock
        self._device = device
        self._number = number

    def on_read(self, offset: int, size: int) -> int:
        return self._device.read(offset)

    def on_write(self, offset: int, size: int, value: int) -> None:
        self._device.write(self._number, offset, value)


class PciTestdev(Device):
    """The device.

    :param host: its bus, whose lock is the device's: a test that starts changes what KVM signals
    :param kick_fd: an eventfd, owned from now on
    :param membar: bytes of BAR 2; 0: there is none
    """

    name = "pci-testdev"

    @staticmethod
    def _check(state: Record) -> None:
        if not NO_TEST <= state.current < len(TESTS):
            raise ValueError(f"test {state.current} does not exist")

    vmstate = Description(
        name, [Struct("function", CONFIGURATION), i32("current"), u32("count")], check=_check
    )

    def __init__(self, host: PciHost, kick_fd: int, membar: int = 0) -> None:
        super().__init__()
        self.lock = host.lock
        self.vmstate = Description(self.name, self.vmstate.fields, check=self._check_all)
        self.membar = membar
        self.current = NO_TEST
        self.count = 0
        self._host = host
        self._kick_fd = kick_fd
        self.function = Function(self.name, vendor=VENDOR, device=DEVICE, class_code=CLASS)
        self._bars = [
            self.function.add_bar(number, size, TestBar(self, number), flags=flags, width=1)
            for number, (size, flags) in enumerate(zip(SIZES, (0, BAR_IO), strict=True))
        ]
        if membar:
            flags = BAR_64 | BAR_PREFETCHABLE
            self.function.add_bar(2, membar, Nobody(), flags=flags, width=8)

    def properties(self) -> dict[str, Any]:
        function = self.function
        return {"addr": f"{function.slot:02x}.{function.number:x}", "membar": self.membar}

    # ---- guest accesses --------------------------------------------------------------------

    def read(self, offset: int) -> int:
        """Return a byte of the header of the test that runs."""
        if self.current == NO_TEST:
            return 0
        header = TESTS[self.current].header(self.count)
        return header[offset] if offset + 1 < len(header) else 0

    def write(self, bar: int, offset: int, value: int) -> None:
        """Take a byte that is written to a BAR: it starts a test, or is what one counts."""
        if offset == 0:
            self._choose(bar * len(KINDS) + value if value < len(KINDS) else NO_TEST)
        elif self.current != NO_TEST:
            test = TESTS[self.current]
            if offset == test.offset and (value == test.data or not test.matches):
                self.count = self.count + 1 & 0xFFFFFFFF

    def _choose(self, current: int) -> None:
        self.current, self.count = current, 0
        self._signal()

    def _signal(self) -> None:
        # Have KVM signal the eventfd for what the test writes, in place of an exit.
        test = None if self.current == NO_TEST else TESTS[self.current]
        for number, bar in enumerate(self._bars):
            kicks = []
            if test is not None and test.has_fd and test.number // len(KINDS) == number:
                value = test.data if test.matches else None
                kicks.append(Kick(test.offset, WIDTH, self._kick_fd, value))
            self._host.set_kicks(self.function, bar, kicks)

    # ---- life and state --------------------------------------------------------------------

    def reset(self) -> None:
        self._choose(NO_TEST)
        self.function.reset()

    def close(self) -> None:
        os.close(self._kick_fd)

    def _check_all(self, state: Record) -> None:
        self._check(state)
        self.function.check(state.function)

    def load(self, state: Record) -> None:
        self.current, self.count = state.current, state.count
        self._signal()
        self.function.load(state.function, asserts=False)
