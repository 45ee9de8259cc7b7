"""MC146818 real-time clock and CMOS RAM (Motorola data sheet; 128 bytes as on a PC).

The clock is the host's UTC time plus an offset, which changes when the guest sets the time, so
it goes on by itself while the guest is stopped or the VMM is replaced. The flags of register C
follow from the time that has passed since they were last looked at; a timer runs only while one
of the three interrupts is enabled and has not come. Left out: daylight saving, stopping the
clock by the divider bits, and the square wave. The day of the week follows from the date. Bit 7
of the index port, which masks the NMI on a PC, does nothing.

What an evil guest can try: dates that do not exist, which count on from the last one that does;
alarms that never come; periodic interrupts in quick succession, of which the timer delivers no
more than a thousand a second.

``on_read``/``on_write`` run on vCPU threads, ``handle_timer`` on the main loop thread.
"""

from __future__ import annotations

import time

from pyvmm.devices.base import Device
from pyvmm.vmstate.fields import Buffer, Description, Record, i64, u8

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from pyvmm.core.eventloop import EventLoop
    from pyvmm.core.irq import IrqLine

#: Index port 0x70 and data port 0x71.
PORTS = 2
SIZE = 128

SECONDS, MINUTES, HOURS, WEEKDAY, DAY, MONTH, YEAR = 0, 2, 4, 6, 7, 8, 9
CENTURY = 0x32
SECONDS_ALARM, MINUTES_ALARM, HOURS_ALARM = 1, 3, 5
TIME_REGISTERS = (SECONDS, MINUTES, HOURS, WEEKDAY, DAY, MONTH, YEAR, CENTURY)
REG_A, REG_B, REG_C, REG_D = 10, 11, 12, 13

A_RESET = 0x26  # 32.768 kHz crystal, 1024 Hz periodic rate
A_UIP = 0x80
A_RATE = 0x0F
B_SET = 0x80
B_INTERRUPTS = 0x78  # PIE, AIE, UIE and the square wave: what a reset clears
B_BINARY = 0x04
B_24H = 0x02
# Interrupts: enable bits in register B, flags in C.
PERIODIC, ALARM, UPDATE = 0x40, 0x20, 0x10
INTERRUPTS = PERIODIC | ALARM | UPDATE
C_IRQ = 0x80
C_MASK = C_IRQ | INTERRUPTS
D_VALID = 0x80
HOUR_PM = 0x80
ALARM_ANY = 0xC0  # an alarm register from here on matches whatever the time is

TICKS = 32768  # of the crystal, in a second
# A second's alarm is looked for anew at least this often, since the host's clock may be set.
LONGEST_WAIT_S = 1.0
SHORTEST_WAIT_S = 0.001

# An update of the time registers is announced this long before it happens.
UPDATE_NOTICE_S = 244e-6

# Beyond any date that the registers can hold.
OFFSET_LIMIT_S = 1 << 41


def _check(record: Record) -> None:
    if record.cmos_index >= SIZE:
        raise ValueError(f"cmos_index {record.cmos_index} is beyond the {SIZE} bytes there are")
    if abs(record.offset) > OFFSET_LIMIT_S:
        raise ValueError(f"offset {record.offset} is no time that the clock can show")
    if record.cmos_data[REG_C] & ~C_MASK:
        raise ValueError(f"register C {record.cmos_data[REG_C]:#x} has bits that do not exist")


def _check_interrupts(record: Record) -> None:
    if abs(record.seen) > 2 * OFFSET_LIMIT_S * TICKS:
        raise ValueError(f"seen {record.seen} is no time that the clock can show")


class Rtc(Device):
    """The clock and its RAM.

    :param irq: its interrupt line
    :param loop: runs its timer
    :param clock: returns the time of a guest that has not set it, in seconds since the epoch
    """

    name = "mc146818rtc"
    # Names are QEMU's, the layout is not: its timers are left out here.
    vmstate = Description(
        "mc146818rtc",
        [Buffer("cmos_data", SIZE), u8("cmos_index"), i64("offset")],
        check=_check,
        subsections=[
            Description(
                "mc146818rtc/interrupts",
                [i64("seen")],
                needed=lambda rtc: rtc.cmos_data[REG_B] & INTERRUPTS,
                check=_check_interrupts,
            )
        ],
    )

    def __init__(
        self, irq: IrqLine, loop: EventLoop, clock: Callable[[], float] = time.time
    ) -> None:
        super().__init__()
        self._irq = irq
        self._loop = loop
        self._clock = clock
        # When the timer comes, on the host's monotonic clock.
        self._due: float | None = None
        self._closed = False
        self.cmos_data = bytearray(SIZE)
        self.cmos_data[REG_A] = A_RESET
        self.cmos_data[REG_B] = B_24H
        self.cmos_data[REG_D] = D_VALID
        self.cmos_index = 0
        self.offset = 0  # seconds
        # Up to when the flags tell what happened, in ticks of the clock's time.
        self.seen = self._now_ticks()

    def set_memory_size(self, below_4g: int, above_4g: int) -> None:
        """Enter the RAM size where firmware and old kernels look for it.

        :param below_4g: bytes of RAM from address 0
        :param above_4g: bytes of RAM from 4 GiB
        """
        self._set_word(0x15, min(below_4g >> 10, 640))
        above_1m = min(max((below_4g >> 10) - 1024, 0), 0xFFFF)  # KiB
        self._set_word(0x17, above_1m)
        self._set_word(0x30, above_1m)
        self._set_word(0x34, min(max((below_4g >> 16) - 256, 0), 0xFFFF))  # 64 KiB above 16 MiB
        self.cmos_data[0x5B:0x5E] = min(above_4g >> 16, 0xFFFFFF).to_bytes(3, "little")

    def reset(self) -> None:
        # A battery keeps the rest.
        self.cmos_data[REG_B] &= ~B_INTERRUPTS
        self._take_flags()

    def load(self, state: Record) -> None:
        super().load(state)
        self.cmos_data = bytearray(state.cmos_data)
        if not hasattr(state, "seen"):
            self.seen = self._now_ticks()
        self._irq.restore_level(bool(self.cmos_data[REG_C] & C_IRQ))

    def attach(self) -> None:
        self.handle_timer()

    def close(self) -> None:
        self._closed = True

    def handle_timer(self) -> None:
        """See what has happened, and what to wait for next."""
        if self._closed:
            return  # the loop may serve other machines yet
        with self.lock:
            self._catch_up()
            wait = self._next_wait()
        if wait is None:
            return
        # A timer that comes too early only looks. One that a sooner timer has replaced does
        # nothing, or each would start another, and a guest could make ever more of them.
        due = time.monotonic() + wait
        if self._due is None or due < self._due:
            self._due = due
            self._loop.call_later(wait, lambda: self._handle_due(due))

    def _handle_due(self, due: float) -> None:
        if due == self._due:
            self._due = None
            self.handle_timer()

    def on_read(self, offset: int, size: int) -> int:
        if offset == 0:
            return 0xFF
        index = self.cmos_index
        if index in TIME_REGISTERS:
            self._refresh()
        elif index == REG_A and not self._is_set() and self._now() % 1 >= 1 - UPDATE_NOTICE_S:
            return self.cmos_data[REG_A] | A_UIP
        elif index == REG_C:
            return self._take_flags()
        return self.cmos_data[index]

    def on_write(self, offset: int, size: int, value: int) -> None:
        index = self.cmos_index
        if offset == 0:
            self.cmos_index = value % SIZE
        elif index in TIME_REGISTERS:
            self._catch_up()
            self._refresh()
            self.cmos_data[index] = value
            self._adopt()
        elif index == REG_A:
            self._catch_up()
            self.cmos_data[REG_A] = value & ~A_UIP
            self._changed()
        elif index == REG_B:
            # What was set by hand counts from the moment in which SET is taken back, in the
            # format that is chosen with it.
            was_set = self._is_set()
            self._refresh()
            self._catch_up()
            self.cmos_data[REG_B] = value
            if was_set:
                self._adopt()
            if value & B_SET:
                self.cmos_data[REG_B] &= ~UPDATE
            self._changed()
        elif index in (SECONDS_ALARM, MINUTES_ALARM, HOURS_ALARM):
            self._catch_up()
            self.cmos_data[index] = value
            self._changed()
        elif index not in (REG_C, REG_D):
            self.cmos_data[index] = value

    # ---- interrupts; the lock is held -----------------------------------------------------

    def _changed(self) -> None:
        self._update_irq()
        # The timer belongs to the main loop.
        if self.cmos_data[REG_B] & INTERRUPTS:
            self._loop.call_soon(self.handle_timer)

    def _take_flags(self) -> int:
        # Reading register C clears it, and lets the line go: only now another edge can come.
        self._catch_up()
        flags = self.cmos_data[REG_C]
        self.cmos_data[REG_C] = 0
        self._changed()
        return flags

    def _update_irq(self) -> None:
        flags = self.cmos_data[REG_C] & INTERRUPTS
        level = bool(flags & self.cmos_data[REG_B])
        self.cmos_data[REG_C] = flags | (C_IRQ if level else 0)
        self._irq.set_level(level)

    def _catch_up(self) -> None:
        # Bring the flags up to date. A host's clock that was set back makes nothing happen.
        since, self.seen = self.seen, self._now_ticks()
        for flag in (PERIODIC, ALARM, UPDATE):
            when = self._next(flag, since)
            if when is not None and when <= self.seen:
                self.cmos_data[REG_C] |= flag
        self._update_irq()

    def _next_wait(self) -> float | None:
        # Seconds until one of the enabled interrupts may come; None if none can: while the line
        # is high another would be no edge.
        if self.cmos_data[REG_C] & C_IRQ:
            return None
        times = [
            when
            for flag in (PERIODIC, ALARM, UPDATE)
            if self.cmos_data[REG_B] & flag and (when := self._next(flag, self.seen)) is not None
        ]
        if not times:
            return None
        return min(max((min(times) - self.seen) / TICKS, SHORTEST_WAIT_S), LONGEST_WAIT_S)

    def _next(self, flag: int, since: int) -> int | None:
        # When it happens for the first time after *since*, in ticks; None for never.
        if flag == PERIODIC:
            rate = self.cmos_data[REG_A] & A_RATE
            if not rate:
                return None
            # 2^(rate - 1), but rates 1 and 2 are those of 8 and 9.
            period = 1 << (rate - 1 if rate > 2 else rate + 6)
            return (since // period + 1) * period
        if self._is_set():
            return None
        second = since // TICKS + 1
        if flag == UPDATE:
            return second * TICKS
        alarm = self._next_alarm(second)
        return None if alarm is None else alarm * TICKS

    def _next_alarm(self, second: int) -> int | None:
        # The first second, from this one on, that the alarm registers match.
        numbers = [
            None if value >= ALARM_ANY else convert(value)
            for value, convert in (
                (self.cmos_data[HOURS_ALARM], self._hour),
                (self.cmos_data[MINUTES_ALARM], self._number),
                (self.cmos_data[SECONDS_ALARM], self._number),
            )
        ]
        # A step to the next match of one may carry into a larger one, up to twice.
        for _ in range(3):
            for number, unit, count in zip(numbers, (3600, 60, 1), (24, 60, 60), strict=True):
                if number is None:
                    continue
                if number >= count:
                    return None
                ahead = (number - second // unit) % count
                if ahead:
                    second = (second // unit + ahead) * unit
        return second

    # ---- the clock ------------------------------------------------------------------------

    def _now(self) -> float:
        return self._clock() + self.offset

    def _now_ticks(self) -> int:
        return int(self._clock() * TICKS) + self.offset * TICKS

    def _is_set(self) -> bool:
        return bool(self.cmos_data[REG_B] & B_SET)

    def _refresh(self) -> None:
        # Bring the registers up to date, unless the guest is at work on them.
        if self._is_set():
            return
        now = time.gmtime(self._now() // 1)
        hour = now.tm_hour
        if not self.cmos_data[REG_B] & B_24H:
            hour = hour % 12 or 12
        self._put(SECONDS, min(now.tm_sec, 59))
        self._put(MINUTES, now.tm_min)
        self._put(HOURS, hour)
        if not self.cmos_data[REG_B] & B_24H and now.tm_hour >= 12:
            self.cmos_data[HOURS] |= HOUR_PM
        self._put(WEEKDAY, (now.tm_wday + 1) % 7 + 1)
        self._put(DAY, now.tm_mday)
        self._put(MONTH, now.tm_mon)
        self._put(YEAR, now.tm_year % 100)
        self._put(CENTURY, now.tm_year // 100)

    def _adopt(self) -> None:
        # Make what the registers say the time, unless the guest is still at work on them.
        if self._is_set():
            return
        hour = self._hour(self.cmos_data[HOURS])
        year = self._get(CENTURY) * 100 + self._get(YEAR)
        days = _days(year, self._get(MONTH), self._get(DAY))
        then = (days * 24 + hour) * 3600 + self._get(MINUTES) * 60 + self._get(SECONDS)
        # The fraction of the running second stays.
        self.offset = then - int(self._clock() // 1)
        self.seen = self._now_ticks()

    def _hour(self, value: int) -> int:
        if self.cmos_data[REG_B] & B_24H:
            return self._number(value)
        return self._number(value & ~HOUR_PM) % 12 + (12 if value & HOUR_PM else 0)

    def _put(self, index: int, number: int) -> None:
        if not self.cmos_data[REG_B] & B_BINARY:
            number = number // 10 % 10 << 4 | number % 10
        self.cmos_data[index] = number & 0xFF

    def _get(self, index: int) -> int:
        return self._number(self.cmos_data[index])

    def _number(self, value: int) -> int:
        if self.cmos_data[REG_B] & B_BINARY:
            return value
        return (value >> 4) * 10 + (value & 15)

    def _set_word(self, index: int, value: int) -> None:
        self.cmos_data[index : index + 2] = value.to_bytes(2, "little")


def _days(year: int, month: int, day: int) -> int:
    # Days since the epoch, of any three numbers. Years are counted from March here, so that
    # a leap day is the last day of its year.
    year, month = year + (month - 3) // 12, (month - 3) % 12
    leaps = year // 4 - year // 100 + year // 400
    return year * 365 + leaps + (month * 153 + 2) // 5 + day - 719469
