"""A serial port on a bus, as a guest and the host see it, for the tests of the UART."""

import contextlib

from harness.native import NativeBuses
from pyvmm.core.bus import Bus
from pyvmm.devices import serial as uart
from pyvmm.devices.serial import IIR, LSR, RBR, THR, Serial
from pyvmm.testing.fake_irq import FakeIrq
from pyvmm.testing.memory_chardev import MemoryChardev

NONE, MODEM, THRE, DATA, LINE, TIMEOUT = 1, 0, 2, 4, 6, 12


RECEIVE, TRANSMIT, STATUS, MODEM_STATUS = 1, 2, 4, 8  # IER


TRIGGER_14 = 0xC1


IDLE = 0x60


class Port:
    """A serial port on a bus, as a guest and the host see it."""

    def __init__(self, chardev):
        self.chardev = chardev
        self.irq = FakeIrq()
        self.uart = Serial(self.irq, chardev)
        self.bus = Bus("I/O", 8)
        self.bus.add(0, uart.PORTS, self.uart, "serial")
        chardev.attach(self.uart)
        chardev.loop.run_once(0)  # attaching asked for input

    def read(self, register):
        return self.bus.read(register, 1)

    def write(self, register, value):
        self.bus.write(register, 1, value)

    def send(self, data):
        for byte in data:
            self.write(THR, byte)

    def drain(self):
        """Read for as long as there is data, as a driver does."""
        data = bytearray()
        while self.read(LSR) & 1:
            data.append(self.read(RBR))
        return bytes(data)

    def sent(self):
        return self.chardev.take_output()

    def cause(self):
        return self.read(IIR) & 15


class NativePort(Port):
    """The same, with native code to answer what it can."""

    def __init__(self, chardev):
        super().__init__(chardev)
        self.buses = NativeBuses(self.bus)
        self.uart.prepare()
        self.uart.attach()
        chardev.loop.run_once(0)

    def read(self, register):
        return self.buses.read(register, 1)

    def write(self, register, value):
        self.buses.write(register, 1, value)

    def flush(self):
        """Have the chardev be given what waits, as the main loop does soon."""
        self.uart.handle_writable()


def act(port, action, *arguments):
    """Do one of the things that a guest and the host do to a port; what a read gave, or None."""
    if action == "read":
        value = port.read(*arguments)
        assert 0 <= value <= 255
        return value
    if action == "write":
        port.write(*arguments)
    elif action == "feed":
        port.chardev.feed(*arguments)
    elif action == "room":
        port.chardev.make_room(*arguments)
    elif action == "event":
        port.uart.handle_event(*arguments)
    else:
        port.chardev.loop.run_once(0)
    return None


@contextlib.contextmanager
def fresh_port(kind=Port, **options):
    """A port for one example of a property."""
    chardev = MemoryChardev(**options)
    try:
        port = kind(chardev)
        yield port
        port.uart.close()
    finally:
        chardev.close()
