"""ACPI fixed hardware: the PM1a event and control blocks, and the PM timer (ACPI 6.5, sections
4.8.3.1 to 4.8.3.3).

Soft off, the power button and a timer of 24 bits, no more. Left out: sleep states other than S5,
the sleep button, SMI_CMD (ACPI mode is always on). Ports and the value of SLP_TYP for S5 are those
of QEMU's PIIX4, where guests write them without having read any table.

The timer counts the host's boot clock, as kvmclock does, so that an update finds it where it is;
it goes on while the guest is paused, as the TSC does. Native code answers who polls it.

``on_read``/``on_write`` run on vCPU threads, ``handle_...`` on the main loop thread.
"""

from __future__ import annotations

import time

from pyvmm._native import ffi, lib
from pyvmm.core.native import NativeAnswers
from pyvmm.devices.base import Device
from pyvmm.vmstate.fields import Description, Record, i64, u16, u64

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from pyvmm.core.eventloop import EventLoop
    from pyvmm.core.irq import IrqLine

IOBASE = 0x600
#: Status, enable, control: two bytes each; two that nobody has; the timer.
PORTS = 12
#: Widest access that is not split, in bytes.
WIDTH = 4
SCI = 9

STATUS, ENABLE, CONTROL, NOBODY, TIMER = 0, 2, 4, 6, 8

TMR = 0x0001  # in status and enable: the timer's highest bit has changed
PWRBTN = 0x0100  # likewise
STATUS_MASK = PWRBTN  # what is kept as such; TMR follows from the time
ENABLE_MASK = 0x0721  # timer, global lock, power and sleep button, RTC

CONTROL_SCI_EN = 0x0001
CONTROL_SLP_TYP = 0x1C00
CONTROL_SLP_EN = 0x2000  # reads as 0
CONTROL_MASK = CONTROL_SCI_EN | CONTROL_SLP_TYP | 0x0002  # BM_RLD
SLP_TYP_S5 = 0x0000

TIMER_HZ = 3579545
TIMER_MASK = 0xFFFFFF
#: Ticks from one change of the timer's highest bit to the next.
HALF = TIMER_MASK + 1 >> 1
_NS = 1000000000


def _check(record: Record) -> None:
    for name, mask in (("sts", STATUS_MASK), ("en", ENABLE_MASK), ("cnt", CONTROL_MASK)):
        value = getattr(record, name)
        if value & ~mask:
            raise ValueError(f"{name} {value:#x} has bits that do not exist")


def boottime() -> int:
    """Return the host's boot clock, in ns."""
    return time.clock_gettime_ns(time.CLOCK_BOOTTIME)


def forget_boottime(record: Record, saved: int) -> None:
    """Let the timer of a state that was read, and is not loaded yet, go on from what it showed: the
    boot clock is another one.

    :param saved: what the boot clock showed when the state was written, in ns
    """
    record.offset = getattr(record, "offset", 0) + saved - boottime()
    record.carry = getattr(record, "carry", 0)


class AcpiPm(Device):
    """The register blocks.

    :param sci: the interrupt line that reports the power button and the timer
    :param power_off: called when the guest goes to S5
    :param loop: runs the timer's interrupt
    :ivar carry: the count, from the boot clock's beginning and of any number of bits, from which on
        TMR is set in the status
    """

    name = "acpi_pm"
    vmstate = Description(
        "acpi_pm",
        [u16("sts"), u16("en"), u16("cnt")],
        check=_check,
        subsections=[
            Description(
                "acpi_pm/timer",
                [i64("offset"), u64("carry")],
                # All kernels take the status back when they start. Without its interrupt that is
                # lost: they find it set again some time before the timer sets it.
                needed=lambda pm: pm.offset or (pm.carry and pm.en & TMR),
            )
        ],
    )

    def __init__(self, sci: IrqLine, power_off: Callable[[], None], loop: EventLoop) -> None:
        super().__init__()
        self._sci = sci
        self._power_off = power_off
        self._loop = loop
        # Whether the loop comes back for the timer.
        self._is_awaited = False
        self._closed = False
        self.sts = self.en = self.carry = 0
        self.cnt = CONTROL_SCI_EN
        self._timer = ffi.new("struct pyvmm_pm_timer *")
        self.answers = NativeAnswers(lib.PYVMM_PM_TIMER, self._timer, (TIMER,))

    @property
    def offset(self) -> int:
        """From the host's boot clock to what the timer counts, in ns."""
        return int(self._timer.offset)

    @offset.setter
    def offset(self, value: int) -> None:
        self._timer.offset = value

    def reset(self) -> None:
        self.sts = self.en = self.carry = 0
        self.cnt = CONTROL_SCI_EN
        self._update_sci()

    def load(self, state: Record) -> None:
        super().load(state)
        # The irqchip's own state has the level that the line had. It may be up for the timer, too:
        # then it is so once more when the guest runs.
        self._sci.restore_level(bool(self.sts & self.en))

    def start(self) -> None:
        self.handle_timer()

    def close(self) -> None:
        self._closed = True

    def handle_power_button(self) -> None:
        """The operator presses the power button; what comes of it is the guest's affair."""
        with self.lock:
            self.sts |= PWRBTN
            self._update_sci()

    def handle_timer(self) -> None:
        """See whether the timer's highest bit has changed, and if the guest waits for that, when it
        will."""
        with self.lock:
            self._is_awaited = False
            if self._closed:
                return  # the loop may serve other machines yet
            self._update_sci()
            if not self._awaits_timer():
                return
            self._is_awaited = True
            ticks = min(self.carry - self._count(), HALF)
        # One that comes too early only looks.
        self._loop.call_later(max(ticks, 0) / TIMER_HZ, self.handle_timer)

    def on_read(self, offset: int, size: int) -> int:
        registers = self._status() | self.en << 16 | self.cnt << 32 | 0xFFFF << 48
        registers |= (self._count() & TIMER_MASK) << 64
        return registers >> 8 * offset & (1 << 8 * size) - 1

    def on_write(self, offset: int, size: int, value: int) -> None:
        # Byte by byte: a guest may write one half of a register, or parts of two.
        for at, byte in enumerate(value.to_bytes(size, "little"), offset):
            self._write_byte(at & ~1, byte << 8 * (at & 1), 0xFF << 8 * (at & 1))
        self._update_sci()
        if not self._is_awaited and self._awaits_timer():
            self._is_awaited = True
            self._loop.call_soon(self.handle_timer)

    def _write_byte(self, register: int, value: int, lanes: int) -> None:
        if register == STATUS:
            self.sts &= ~value
            if value & TMR and self._status() & TMR:
                self.carry = (self._count() // HALF + 1) * HALF
        elif register == ENABLE:
            self.en = self.en & ~lanes | value & ENABLE_MASK
        elif register == CONTROL:
            self.cnt = self.cnt & ~lanes | value & CONTROL_MASK | CONTROL_SCI_EN
            if value & CONTROL_SLP_EN and self.cnt & CONTROL_SLP_TYP == SLP_TYP_S5:
                self._power_off()

    def _count(self) -> int:
        return (boottime() + self.offset) % (1 << 64) * TIMER_HZ // _NS

    def _status(self) -> int:
        return self.sts | (TMR if self._count() >= self.carry else 0)

    def _awaits_timer(self) -> bool:
        return bool(self.en & TMR and not self._status() & TMR)

    def _update_sci(self) -> None:
        self._sci.set_level(bool(self._status() & self.en))
