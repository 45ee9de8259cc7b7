"""Keyboard controller (Intel 8042, as on a PC) without a keyboard, and system port 0x92.

Both are here for what else hangs on them: the CPU reset and the A20 gate. The controller
answers the commands by which systems find out that it works; bytes for the keyboard or the
mouse get no answer, as with nothing plugged in. A20 is always open; that a guest closed it is
remembered and shown, no more. Left out: interrupts.

Called on vCPU threads only.
"""

from __future__ import annotations

from pyvmm.devices.base import Device
from pyvmm.vmstate.fields import Description, Record, u8

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

#: From the data port 0x60 to the command and status port 0x64; between them nobody answers.
PORTS = 5
DATA, COMMAND = 0, 4

STATUS_OUTPUT_FULL = 0x01
STATUS_SELF_TEST_PASSED = 0x04
STATUS_COMMAND = 0x08  # the last write went to the command port
STATUS_UNLOCKED = 0x10
STATUS_MASK = 0x1D

CMD_READ_MODE = 0x20
CMD_WRITE_MODE = 0x60
CMD_TEST_MOUSE_PORT = 0xA9
CMD_SELF_TEST = 0xAA
CMD_TEST_KEYBOARD = 0xAB
CMD_READ_OUTPUT_PORT = 0xD0
CMD_WRITE_OUTPUT_PORT = 0xD1
CMD_WRITE_MOUSE_BUFFER = 0xD3
CMD_DISABLE_A20 = 0xDD
CMD_ENABLE_A20 = 0xDF
CMD_PULSE = 0xF0  # to 0xff: pulls the output port's bits low that are 0 in the command
TAKES_DATA = (CMD_WRITE_MODE, CMD_WRITE_OUTPUT_PORT, CMD_WRITE_MOUSE_BUFFER)

SELF_TEST_OK = 0x55
PORT_TEST_CLOCK_LOW = 0x01
OUTPORT_NO_RESET = 0x01
OUTPORT_A20 = 0x02
OUTPORT_RESET = 0xCF

PORT92_RESET = 0x01
PORT92_A20 = 0x02


def _check(record: Record) -> None:
    if record.write_cmd not in (0, *TAKES_DATA):
        raise ValueError(f"write_cmd {record.write_cmd:#x} is no command that waits for data")
    if record.status & ~STATUS_MASK:
        raise ValueError(f"status {record.status:#x} has bits that do not exist")


class I8042(Device):
    """The controller.

    :param request_reset: called when the guest pulls the reset line
    """

    name = "pckbd"
    # Names are QEMU's, the layout is not: there is no keyboard queue to go with it.
    vmstate = Description(
        "pckbd",
        [u8("write_cmd"), u8("status"), u8("mode"), u8("outport"), u8("obdata")],
        check=_check,
    )

    def __init__(self, request_reset: Callable[[], None]) -> None:
        super().__init__()
        self._request_reset = request_reset
        self.reset()

    def reset(self) -> None:
        self.write_cmd = 0
        self.status = STATUS_COMMAND | STATUS_UNLOCKED
        self.mode = 0
        self.outport = OUTPORT_RESET
        self.obdata = 0

    def on_read(self, offset: int, size: int) -> int:
        if offset == DATA:
            self.status &= ~STATUS_OUTPUT_FULL
            return self.obdata
        return self.status if offset == COMMAND else 0xFF

    def on_write(self, offset: int, size: int, value: int) -> None:
        if offset == COMMAND:
            self.status |= STATUS_COMMAND
            self._command(value)
        elif offset == DATA:
            self.status &= ~STATUS_COMMAND
            command, self.write_cmd = self.write_cmd, 0
            if command == CMD_WRITE_MODE:
                self.mode = value
            elif command == CMD_WRITE_OUTPUT_PORT:
                self._set_outport(value)
            elif command == CMD_WRITE_MOUSE_BUFFER:
                # Comes back as if from the keyboard: there is no port for a mouse. Systems
                # look for one so, and wait for seconds if nothing comes.
                self._answer(value)

    def _command(self, value: int) -> None:
        self.write_cmd = value if value in TAKES_DATA else 0
        if value == CMD_READ_MODE:
            self._answer(self.mode)
        elif value == CMD_SELF_TEST:
            self.status |= STATUS_SELF_TEST_PASSED
            self._answer(SELF_TEST_OK)
        elif value == CMD_TEST_KEYBOARD:
            self._answer(0)
        elif value == CMD_TEST_MOUSE_PORT:
            self._answer(PORT_TEST_CLOCK_LOW)
        elif value == CMD_READ_OUTPUT_PORT:
            self._answer(self.outport)
        elif value == CMD_DISABLE_A20:
            self.outport &= ~OUTPORT_A20
        elif value == CMD_ENABLE_A20:
            self.outport |= OUTPORT_A20
        elif value >= CMD_PULSE and not value & OUTPORT_NO_RESET:
            self._request_reset()

    def _set_outport(self, value: int) -> None:
        self.outport = value | OUTPORT_NO_RESET
        if not value & OUTPORT_NO_RESET:
            self._request_reset()

    def _answer(self, value: int) -> None:
        self.obdata = value
        self.status |= STATUS_OUTPUT_FULL


class Port92(Device):
    """System control port A: the quick way to the same two lines.

    :param request_reset: called when the guest pulls the reset line
    """

    name = "port92"
    vmstate = Description("port92", [u8("outport")])

    def __init__(self, request_reset: Callable[[], None]) -> None:
        super().__init__()
        self._request_reset = request_reset
        self.reset()

    def reset(self) -> None:
        self.outport = PORT92_A20

    def on_read(self, offset: int, size: int) -> int:
        return self.outport

    def on_write(self, offset: int, size: int, value: int) -> None:
        rises = value & ~self.outport & PORT92_RESET
        self.outport = value
        if rises:
            self._request_reset()
