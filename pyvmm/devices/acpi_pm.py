"""ACPI fixed hardware: the PM1a event and control blocks (ACPI 6.5, section 4.8.3).

Soft off and the power button, no more. Left out: the PM timer, sleep states other than S5, the
sleep button, SMI_CMD (ACPI mode is always on). Ports and the value of SLP_TYP for S5 are those
of QEMU's PIIX4, where guests write them without having read any table.

``on_read``/``on_write`` run on vCPU threads, ``handle_power_button`` on the main loop thread.
"""

from __future__ import annotations

from pyvmm.devices.base import Device
from pyvmm.vmstate.fields import Description, Record, u16

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from pyvmm.core.irq import IrqLine

IOBASE = 0x600
#: Status, enable, control: two bytes each.
PORTS = 6
#: Widest access that is not split, in bytes.
WIDTH = 2
SCI = 9

STATUS, ENABLE, CONTROL = 0, 2, 4

PWRBTN = 0x0100  # in status and enable
STATUS_MASK = PWRBTN
ENABLE_MASK = 0x0721  # timer, global lock, power and sleep button, RTC

CONTROL_SCI_EN = 0x0001
CONTROL_SLP_TYP = 0x1C00
CONTROL_SLP_EN = 0x2000  # reads as 0
CONTROL_MASK = CONTROL_SCI_EN | CONTROL_SLP_TYP | 0x0002  # BM_RLD
SLP_TYP_S5 = 0x0000


def _check(record: Record) -> None:
    for name, mask in (("sts", STATUS_MASK), ("en", ENABLE_MASK), ("cnt", CONTROL_MASK)):
        value = getattr(record, name)
        if value & ~mask:
            raise ValueError(f"{name} {value:#x} has bits that do not exist")


class AcpiPm(Device):
    """The two register blocks.

    :param sci: the interrupt line that reports the power button
    :param power_off: called when the guest goes to S5
    """

    name = "acpi_pm"
    vmstate = Description("acpi_pm", [u16("sts"), u16("en"), u16("cnt")], check=_check)

    def __init__(self, sci: IrqLine, power_off: Callable[[], None]) -> None:
        super().__init__()
        self._sci = sci
        self._power_off = power_off
        self.sts = self.en = 0
        self.cnt = CONTROL_SCI_EN

    def reset(self) -> None:
        self.sts = self.en = 0
        self.cnt = CONTROL_SCI_EN
        self._update_sci()

    def load(self, state: Record) -> None:
        super().load(state)
        # The irqchip's own state has the level that the line had.
        self._sci.restore_level(bool(self.sts & self.en))

    def handle_power_button(self) -> None:
        """The operator presses the power button; what comes of it is the guest's affair."""
        with self.lock:
            self.sts |= PWRBTN
            self._update_sci()

    def on_read(self, offset: int, size: int) -> int:
        registers = self.sts | self.en << 16 | self.cnt << 32
        return registers >> 8 * offset & (1 << 8 * size) - 1

    def on_write(self, offset: int, size: int, value: int) -> None:
        # Byte by byte: a guest may write one half of a register, or parts of two.
        for at, byte in enumerate(value.to_bytes(size, "little"), offset):
            self._write_byte(at & ~1, byte << 8 * (at & 1), 0xFF << 8 * (at & 1))
        self._update_sci()

    def _write_byte(self, register: int, value: int, lanes: int) -> None:
        if register == STATUS:
            self.sts &= ~value
        elif register == ENABLE:
            self.en = self.en & ~lanes | value & ENABLE_MASK
        else:
            self.cnt = self.cnt & ~lanes | value & CONTROL_MASK | CONTROL_SCI_EN
            if value & CONTROL_SLP_EN and self.cnt & CONTROL_SLP_TYP == SLP_TYP_S5:
                self._power_off()

    def _update_sci(self) -> None:
        self._sci.set_level(bool(self.sts & self.en))
