"""16550A UART (National Semiconductor PC16550D data sheet), a front end of one chardev.

Left out: baud rate and frame format (a byte takes no time), parity and framing errors, the
error bit per character of the FIFO (a break is reported at once, not when its NUL becomes the
oldest byte), the gate that a PC puts on OUT2, and sending a break. The modem lines say that a
modem is there and ready; they change in loopback only.

As a byte takes no time, the character time-out comes as soon as bytes below the trigger level
sit in the receive FIFO.

Native code sends, and answers what a driver that sends does besides (:data:`READS`,
:data:`WRITES`). What is sent so the guest takes for sent, while it waits to be written in a batch
(``output``). As soon as the chardev does not take all, it is *stalled*: the transmitter is not
empty, and the transmit FIFO behind what waits already takes 16 bytes more. It is not stalled any
more when all of it is written.

What an evil guest can try: fill memory (both FIFOs hold 16 bytes, what waits is bounded; the
chardev is asked for no more input than there is room), block a vCPU (what the guest writes on top
of a full FIFO is lost, as on the chip).

``on_read``/``on_write`` run on vCPU threads, the front end's methods on the main loop thread.
"""

from __future__ import annotations

from pyvmm._native import ffi, lib
from pyvmm.chardev.base import BREAK, CLOSED, OPENED, Frontend
from pyvmm.core.native import NativeAnswers, shared_lock
from pyvmm.devices.base import Device
from pyvmm.devices.output import SIZE as OUTPUT_SIZE
from pyvmm.devices.output import Output
from pyvmm.vmstate.fields import Buffer, Description, Record, Struct, i32, u8, u16, u32

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from pyvmm.chardev.base import Chardev
    from pyvmm.core.irq import IrqLine

#: Ports of one UART.
PORTS = 8

RBR = THR = DLL = 0
IER = DLM = 1
IIR = FCR = 2
LCR, MCR, LSR, MSR, SCR = 3, 4, 5, 6, 7

#: What native code answers, unless the divisor latch or the loopback is on, or output stalls.
READS = (IIR, LSR)
WRITES = (THR, IER)

IER_ERBFI = 0x01  # received data, and time-out
IER_ETBEI = 0x02  # transmitter empty
IER_ELSI = 0x04  # line status
IER_EDSSI = 0x08  # modem status
IER_MASK = 0x0F

IIR_MODEM = 0x00
IIR_NONE = 0x01
IIR_THR_EMPTY = 0x02
IIR_RECEIVED = 0x04
IIR_LINE = 0x06
IIR_TIMEOUT = 0x0C
IIR_ID_MASK = 0x0F
IIR_FIFO = 0xC0  # drivers tell a 16550A with working FIFOs by both bits

FCR_ENABLE = 0x01
FCR_CLEAR_RECEIVE = 0x02
FCR_CLEAR_TRANSMIT = 0x04
FCR_KEPT = 0xC9
TRIGGERS = (1, 4, 8, 14)

LCR_DLAB = 0x80

MCR_LOOP = 0x10
MCR_MASK = 0x1F

LSR_DR = 0x01
LSR_OE = 0x02
LSR_BI = 0x10
LSR_THRE = 0x20
LSR_TEMT = 0x40
LSR_EMPTY = LSR_THRE | LSR_TEMT
LSR_ERRORS = 0x1E

MSR_TERI = 0x04
MSR_DELTAS = 0x0F
MSR_READY = 0xB0  # DCD, DSR, CTS

FIFO_DEPTH = lib.PYVMM_FIFO_DEPTH
DIVIDER_9600 = 12


def _check_fifo(fifo: Record) -> None:
    if fifo.head >= FIFO_DEPTH or fifo.num > FIFO_DEPTH:
        raise ValueError(f"{fifo.num} bytes from {fifo.head} do not fit a FIFO of {FIFO_DEPTH}")


def _check_uart(uart: Record) -> None:
    for name, mask in (("ier", IER_MASK), ("mcr", MCR_MASK), ("fcr_vmstate", FCR_KEPT)):
        value = getattr(uart, name)
        if value & ~mask:
            raise ValueError(f"{name} {value:#x} has bits that do not exist")


def _check_recv(uart: Record) -> None:
    if not uart.fcr_vmstate & FCR_ENABLE or not uart.lsr & LSR_DR:
        raise ValueError("received bytes, but the FIFO is off or said to be empty")


def _check_xmit(uart: Record) -> None:
    if not uart.fcr_vmstate & FCR_ENABLE or uart.lsr & LSR_THRE:
        raise ValueError("bytes to send, but the FIFO is off or said to be empty")


def _check_tsr(uart: Record) -> None:
    if uart.tsr_retry and uart.lsr & LSR_TEMT:
        raise ValueError("a byte to send, but the shift register is said to be empty")


_FIFO = Description(
    "Fifo8", [Buffer("data", FIFO_DEPTH), u32("head"), u32("num")], check=_check_fifo
)

_UART = Description(
    "serial",
    [
        u16("divider"),
        u8("rbr"),
        u8("ier"),
        u8("iir"),
        u8("lcr"),
        u8("mcr"),
        u8("lsr"),
        u8("msr"),
        u8("scr"),
        u8("fcr_vmstate"),
    ],
    version=3,
    check=_check_uart,
    subsections=[
        Description(
            "serial/thr_ipending",
            [i32("thr_ipending")],
            # Mostly the interrupt that is reported tells it.
            needed=lambda uart: uart.thr_ipending != _reports_thr_empty(uart),
        ),
        Description(
            "serial/tsr",
            [u32("tsr_retry"), u8("thr"), u8("tsr")],
            needed=lambda uart: not (uart.fcr_vmstate & FCR_ENABLE or uart.lsr & LSR_THRE),
            check=_check_tsr,
        ),
        Description(
            "serial/recv_fifo",
            [Struct("recv_fifo", _FIFO)],
            needed=lambda uart: uart.recv_fifo.num > 0,
            check=_check_recv,
        ),
        Description(
            "serial/xmit_fifo",
            [Struct("xmit_fifo", _FIFO)],
            needed=lambda uart: uart.xmit_fifo.num > 0,
            check=_check_xmit,
        ),
        Description(
            # What the guest took for sent, and the chardev did not take.
            "serial/output",
            [u32("output_size"), Buffer("output", "output_size", OUTPUT_SIZE - 2 * FIFO_DEPTH)],
            needed=lambda uart: uart.output_size > 0,
        ),
    ],
)


def _reports_thr_empty(uart: Record) -> bool:
    return bool(uart.iir & IIR_ID_MASK == IIR_THR_EMPTY)


def _pack_fifo(content: bytes) -> Record:
    return Record(data=content.ljust(FIFO_DEPTH, b"\0"), head=0, num=len(content))


def _unpack_fifo(fifo: Record) -> bytes:
    # A ring: what is behind the end is at the beginning.
    turned = fifo.data[fifo.head :] + fifo.data[: fifo.head]
    return bytes(turned[: fifo.num])


class Serial(Device, Frontend):
    """One serial port. The builder attaches it: ``chardev.attach(serial)``.

    :param irq: its interrupt line (IRQ 4 for the first port)
    :param chardev: where its bytes come from and go to
    :param iobase: first port, for ``info qtree``
    :param index: number of the port, for ``info qtree``
    """

    name = "serial"
    vmstate = Description("serial", [Struct("state", _UART)], version=3)

    def __init__(
        self, irq: IrqLine, chardev: Chardev, *, iobase: int = 0x3F8, index: int = 0
    ) -> None:
        super().__init__()
        self.irq = irq
        self.chardev = chardev
        self.iobase = iobase
        self.index = index
        self.regs = regs = ffi.new("struct pyvmm_uart *", {"line": irq.wire})
        self.lock = shared_lock(ffi.addressof(regs, "lock"))
        self.answers = NativeAnswers(lib.PYVMM_UART, regs, READS, WRITES)
        self._output = Output(regs.output, chardev, self.lock, self._flush)
        self._power_on()

    def properties(self) -> dict[str, Any]:
        return {
            "index": self.index,
            "iobase": self.iobase,
            "irq": self.irq.number,
            "chardev": self.chardev.id,
        }

    def reset(self) -> None:
        self._power_on()
        self._update_irq()
        self.chardev.accept_input()

    def _power_on(self) -> None:
        regs = self.regs
        regs.divider = DIVIDER_9600
        regs.rbr = regs.ier = regs.lcr = regs.mcr = regs.scr = regs.fcr = 0
        regs.line_errors = regs.received_count = 0
        regs.msr = MSR_READY
        self._drop_held()
        regs.thr_ipending = False

    # Guest accesses

    def on_read(self, offset: int, size: int) -> int:
        regs = self.regs
        if regs.lcr & LCR_DLAB and offset in (DLL, DLM):
            return int(regs.divider >> 8 * offset & 0xFF)
        if offset == RBR:
            return self._read_rbr()
        if offset == IIR:
            return self._read_iir()
        if offset == LSR:
            value = self._lsr()
            regs.line_errors = 0
            self._update_irq()
            return value
        if offset == MSR:
            value = int(regs.msr)
            regs.msr &= ~MSR_DELTAS
            self._update_irq()
            return value
        return int((0, regs.ier, 0, regs.lcr, regs.mcr, 0, 0, regs.scr)[offset])

    def on_write(self, offset: int, size: int, value: int) -> None:
        regs = self.regs
        if regs.lcr & LCR_DLAB and offset in (DLL, DLM):
            kept = 0xFF00 >> 8 * offset
            regs.divider = regs.divider & kept | value << 8 * offset
        elif offset == THR:
            self._write_thr(value)
        elif offset == IER:
            self._write_ier(value & IER_MASK)
        elif offset == FCR:
            self._write_fcr(value)
        elif offset == LCR:
            regs.lcr = value
        elif offset == MCR:
            self._write_mcr(value & MCR_MASK)
        elif offset == SCR:
            regs.scr = value

    def _read_rbr(self) -> int:
        regs = self.regs
        if regs.received_count:
            regs.rbr = regs.received[0]
            regs.received_count -= 1
            ffi.memmove(regs.received, regs.received + 1, regs.received_count)
            # A read starts the character time-out anew: its interrupt goes away and comes
            # back. A handler that takes one byte each time depends on that edge.
            self._update_irq(timed_out=False)
            self._update_irq()
            if not regs.received_count:
                self.chardev.accept_input()
        return int(regs.rbr)

    def _read_iir(self) -> int:
        cause = self._cause()
        if cause == IIR_THR_EMPTY:
            self.regs.thr_ipending = False
            self._update_irq()
        return cause | (IIR_FIFO if self.regs.fcr & FCR_ENABLE else 0)

    def _write_thr(self, value: int) -> None:
        regs = self.regs
        # The line must be seen to go down before it comes up again for this byte, or a
        # driver that writes without reading IIR misses the edge.
        regs.thr_ipending = False
        self._update_irq()
        if regs.mcr & MCR_LOOP:
            self._take(value)
            regs.thr_ipending = True
        else:
            if not regs.is_stalled or regs.held < self._depth():
                self._output.put(bytes((value,)))
                regs.held += 1
            self._transmit()
            if not regs.is_stalled:
                regs.thr_ipending = True
        self._update_irq()

    def _write_ier(self, value: int) -> None:
        regs = self.regs
        if (value ^ regs.ier) & IER_ETBEI:
            # Enabling it with nothing to send raises it: that is how drivers begin to send.
            regs.thr_ipending = bool(value & IER_ETBEI) and not regs.is_stalled
        regs.ier = value
        self._update_irq()

    def _write_fcr(self, value: int) -> None:
        regs = self.regs
        if not value & FCR_ENABLE:
            value = 0
        if (value ^ regs.fcr) & FCR_ENABLE:
            value |= FCR_CLEAR_RECEIVE | FCR_CLEAR_TRANSMIT
        regs.fcr = value & FCR_KEPT
        if value & FCR_CLEAR_RECEIVE:
            regs.received_count = 0
        if value & FCR_CLEAR_TRANSMIT:
            self._drop_held()
            regs.thr_ipending = True
        self._update_irq()
        self.chardev.accept_input()

    def _write_mcr(self, value: int) -> None:
        regs = self.regs
        left_loop = regs.mcr & ~value & MCR_LOOP
        regs.mcr = value
        lines = _looped_lines(value) if value & MCR_LOOP else MSR_READY
        changed = (regs.msr ^ lines) >> 4
        # RI counts when it goes away, the other three when they change.
        if lines & MSR_TERI << 4:
            changed &= ~MSR_TERI
        regs.msr = lines | regs.msr & MSR_DELTAS | changed
        self._update_irq()
        if left_loop:
            self.chardev.accept_input()

    # The front end of the chardev

    def can_receive(self) -> int:
        """Return the room in the receive FIFO; 0 in loopback, where the line is cut off."""
        # Without the lock, as the chardev may ask while a vCPU is in here: the answer is old
        # as soon as it is given anyway.
        if self.regs.mcr & MCR_LOOP:
            return 0
        return max(self._depth() - int(self.regs.received_count), 0)

    def receive(self, data: bytes) -> None:
        with self.lock:
            for byte in data:
                self._take(byte)
            self._update_irq()

    def handle_event(self, event: str) -> None:
        with self.lock:
            if event == BREAK:
                if self.regs.received_count < self._depth():
                    self._take(0)
                self.regs.line_errors |= LSR_BI
            elif event in (OPENED, CLOSED):
                # With the peer gone nothing is cut short any more, so no handle_writable
                # would come for what waits here.
                self._transmit()
            self._update_irq()

    def handle_writable(self) -> None:
        with self.lock:
            self._flush()

    # Life and state

    def prepare(self) -> None:
        self._output.prepare()

    def attach(self) -> None:
        """Offer what was left to send to the chardev, and let input come."""
        self.chardev.attach(self)
        self.handle_writable()
        self._output.attach()

    def drain(self, timeout_s: float | None = None) -> None:
        self.handle_writable()

    def close(self) -> None:
        # One that is stalled the guest has seen stalled.
        self._output.close(patient=not self.regs.is_stalled)

    def save(self) -> Record:
        regs = self.regs
        fifo = regs.fcr & FCR_ENABLE
        received = bytes(regs.received[0 : regs.received_count])
        output = self._output.content()
        sent = len(output) - regs.held
        to_send = output[sent:]
        uart = Record(
            divider=regs.divider,
            rbr=regs.rbr if fifo or not received else received[0],
            ier=regs.ier,
            iir=self._cause() | (IIR_FIFO if fifo else 0),
            lcr=regs.lcr,
            mcr=regs.mcr,
            # What waits before the FIFO the subsection tells.
            lsr=self._lsr() & ~LSR_EMPTY | (0 if to_send else LSR_EMPTY),
            msr=regs.msr,
            scr=regs.scr,
            fcr_vmstate=regs.fcr,
            thr_ipending=int(regs.thr_ipending),
            tsr_retry=0,
            tsr=0,
            thr=to_send[0] if to_send else 0,
            recv_fifo=_pack_fifo(received if fifo else b""),
            xmit_fifo=_pack_fifo(to_send if fifo else b""),
            output_size=sent,
            output=output[:sent],
        )
        return Record(state=uart)

    def load(self, state: Record) -> None:
        regs, uart = self.regs, state.state
        for name in ("divider", "rbr", "ier", "lcr", "mcr", "msr", "scr"):
            setattr(regs, name, getattr(uart, name))
        regs.fcr = uart.fcr_vmstate
        regs.line_errors = uart.lsr & LSR_ERRORS
        regs.thr_ipending = bool(getattr(uart, "thr_ipending", _reports_thr_empty(uart)))
        received = to_send = b""
        if getattr(uart, "tsr_retry", 0):
            to_send += bytes((uart.tsr,))
        if regs.fcr & FCR_ENABLE:
            if hasattr(uart, "recv_fifo"):
                received = _unpack_fifo(uart.recv_fifo)
            if hasattr(uart, "xmit_fifo"):
                to_send += _unpack_fifo(uart.xmit_fifo)
        else:
            if uart.lsr & LSR_DR:
                received = bytes((uart.rbr,))
            if hasattr(uart, "thr") and not uart.lsr & LSR_THRE:
                to_send += bytes((uart.thr,))
        regs.received[0 : len(received)] = received
        regs.received_count = len(received)
        self._output.clear()
        self._output.put(getattr(uart, "output", b"") + to_send)
        regs.held = len(to_send)
        # Until the chardev has been asked.
        regs.is_stalled = len(self._output) > 0
        # The irqchip's own state has the level that the line had; only what changes from
        # here on may be an edge.
        self.irq.restore_level(self._cause() != IIR_NONE)

    # What the registers have in common

    def _depth(self) -> int:
        return FIFO_DEPTH if self.regs.fcr & FCR_ENABLE else 1

    def _take(self, byte: int) -> None:
        # Full only in loopback, or if the guest turned loopback on or the FIFO off after the
        # chardev had asked for room: then the byte was on a line that nobody listened to.
        regs = self.regs
        if regs.received_count < self._depth():
            regs.received[regs.received_count] = byte
            regs.received_count += 1
        else:
            regs.line_errors |= LSR_OE

    def _transmit(self) -> None:
        self._output.write()
        regs, waiting = self.regs, len(self._output)
        regs.held = min(regs.held, waiting)
        if regs.is_stalled and not waiting:
            regs.thr_ipending = True
        regs.is_stalled = waiting > 0

    def _flush(self) -> bool:
        self._transmit()
        self._update_irq()
        return not self.regs.is_stalled

    def _drop_held(self) -> None:
        regs = self.regs
        self._output.drop_latest(regs.held)
        regs.held = 0
        regs.is_stalled = bool(regs.is_stalled and len(self._output))

    def _lsr(self) -> int:
        regs = self.regs
        empty = 0 if regs.is_stalled else LSR_EMPTY
        return int(regs.line_errors) | empty | (LSR_DR if regs.received_count else 0)

    def _cause(self, timed_out: bool = True) -> int:
        # In the order of the data sheet's priorities (table III).
        regs = self.regs
        ier, count = regs.ier, regs.received_count
        if ier & IER_ELSI and regs.line_errors:
            return IIR_LINE
        if ier & IER_ERBFI and count:
            trigger = TRIGGERS[regs.fcr >> 6] if regs.fcr & FCR_ENABLE else 1
            if count >= trigger:
                return IIR_RECEIVED
            if timed_out:
                return IIR_TIMEOUT
        if ier & IER_ETBEI and regs.thr_ipending:
            return IIR_THR_EMPTY
        if ier & IER_EDSSI and regs.msr & MSR_DELTAS:
            return IIR_MODEM
        return IIR_NONE

    def _update_irq(self, timed_out: bool = True) -> None:
        self.irq.set_level(self._cause(timed_out) != IIR_NONE)


def _looped_lines(mcr: int) -> int:
    # In loopback RTS, DTR, OUT1 and OUT2 appear as CTS, DSR, RI and DCD.
    dtr, rts, outs = mcr & 1, mcr >> 1 & 1, mcr >> 2 & 3
    return rts << 4 | dtr << 5 | outs << 6
