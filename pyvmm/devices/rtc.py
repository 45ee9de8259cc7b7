"""MC146818 real-time clock and CMOS RAM (Motorola data sheet; 128 bytes as on a PC).

The clock is the host's UTC time plus an offset, which changes when the guest sets the time, so
it goes on by itself while the guest is stopped or the VMM is replaced. Left out: alarm,
periodic and update-ended interrupts (their flags in register C never come up), daylight saving,
stopping the clock by the divider bits. The day of the week follows from the date. Bit 7 of
the index port, which masks the NMI on a PC, does nothing.

What an evil guest can try: dates that do not exist, which count on from the last one that does.

Called on vCPU threads only.
"""

from __future__ import annotations

import time

from pyvmm.devices.base import Device
from pyvmm.vmstate.fields import Buffer, Description, Record, i64, u8

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

#: Index port 0x70 and data port 0x71.
PORTS = 2
SIZE = 128

SECONDS, MINUTES, HOURS, WEEKDAY, DAY, MONTH, YEAR = 0, 2, 4, 6, 7, 8, 9
CENTURY = 0x32
TIME_REGISTERS = (SECONDS, MINUTES, HOURS, WEEKDAY, DAY, MONTH, YEAR, CENTURY)
REG_A, REG_B, REG_C, REG_D = 10, 11, 12, 13

A_RESET = 0x26  # 32.768 kHz crystal, 1024 Hz periodic rate
A_UIP = 0x80
B_SET = 0x80
B_INTERRUPTS = 0x78  # PIE, AIE, UIE and the square wave: what a reset clears
B_BINARY = 0x04
B_24H = 0x02
D_VALID = 0x80
HOUR_PM = 0x80

# An update of the time registers is announced this long before it happens.
UPDATE_NOTICE_S = 244e-6

# Beyond any date that the registers can hold.
OFFSET_LIMIT_S = 1 << 41


def _check(record: Record) -> None:
    if record.cmos_index >= SIZE:
        raise ValueError(f"cmos_index {record.cmos_index} is beyond the {SIZE} bytes there are")
    if abs(record.offset) > OFFSET_LIMIT_S:
        raise ValueError(f"offset {record.offset} is no time that the clock can show")


class Rtc(Device):
    """The clock and its RAM.

    :param clock: the time that a guest finds which never sets it, in seconds since the epoch
    """

    name = "mc146818rtc"
    # Names are QEMU's, the layout is not: its timers are left out here.
    vmstate = Description(
        "mc146818rtc", [Buffer("cmos_data", SIZE), u8("cmos_index"), i64("offset")], check=_check
    )

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        super().__init__()
        self._clock = clock
        self.cmos_data = bytearray(SIZE)
        self.cmos_data[REG_A] = A_RESET
        self.cmos_data[REG_B] = B_24H
        self.cmos_data[REG_D] = D_VALID
        self.cmos_index = 0
        self.offset = 0  # seconds

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

    def load(self, state: Record) -> None:
        super().load(state)
        self.cmos_data = bytearray(state.cmos_data)

    def on_read(self, offset: int, size: int) -> int:
        if offset == 0:
            return 0xFF
        index = self.cmos_index
        if index in TIME_REGISTERS:
            self._refresh()
        elif index == REG_A and not self._is_set() and self._now() % 1 >= 1 - UPDATE_NOTICE_S:
            return self.cmos_data[REG_A] | A_UIP
        return self.cmos_data[index]

    def on_write(self, offset: int, size: int, value: int) -> None:
        index = self.cmos_index
        if offset == 0:
            self.cmos_index = value % SIZE
        elif index in TIME_REGISTERS:
            self._refresh()
            self.cmos_data[index] = value
            self._adopt()
        elif index == REG_A:
            self.cmos_data[REG_A] = value & ~A_UIP
        elif index == REG_B:
            # What was set by hand counts from the moment in which SET is taken back, in the
            # format that is chosen with it.
            was_set = self._is_set()
            self._refresh()
            self.cmos_data[REG_B] = value
            if was_set:
                self._adopt()
        elif index not in (REG_C, REG_D):
            self.cmos_data[index] = value

    def _now(self) -> float:
        return self._clock() + self.offset

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
        hour = self.cmos_data[HOURS]
        if self.cmos_data[REG_B] & B_24H:
            hour = self._number(hour)
        else:
            hour = self._number(hour & ~HOUR_PM) % 12 + (12 if hour & HOUR_PM else 0)
        year = self._get(CENTURY) * 100 + self._get(YEAR)
        days = _days(year, self._get(MONTH), self._get(DAY))
        then = (days * 24 + hour) * 3600 + self._get(MINUTES) * 60 + self._get(SECONDS)
        # The fraction of the running second stays.
        self.offset = then - int(self._clock() // 1)

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
