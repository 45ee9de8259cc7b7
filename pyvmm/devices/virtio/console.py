"""The console device (virtio 1.3, 5.3): consoles and generic ports, each a front end of a
chardev.

A device with one console and nothing else does not offer MULTIPORT: its size is then told in
the configuration space. With MULTIPORT it is told by a control message whose two fields Linux
before 6.17 reads in the wrong order. Left out: adding and removing ports while the guest runs.

Output goes natively to a chardev that is a stream and nothing more. Chardevs of other kinds (a mux,
a ring buffer) and chains as drivers seldom make them are for Python, which goes on where native
code has stopped.

Output that the chardev does not take stays in the guest's buffers: the chain is put back and
taken again when the chardev can, ``sent`` bytes further on. Input is asked for only as far as
the guest has given buffers; if it took them away meanwhile, what had come waits in ``unread``.

What an evil guest can try: buffers of gigabytes (copied in parts), control messages without end
(what is owed to it is a few bits for each port, whatever it asks), ports that do not exist.

All but ``write_config`` and the resets runs on the main loop thread.
"""

from __future__ import annotations

import struct

from pyvmm.chardev.base import CLOSED, OPENED, RESIZED, Frontend
from pyvmm.devices.virtio import fastpath
from pyvmm.devices.virtio.device import VirtioDevice
from pyvmm.devices.virtio.queue import QueueError
from pyvmm.errors import RamError
from pyvmm.vmstate.fields import Buffer, Description, Record, StructArray, boolean, u8, u16, u32

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from pyvmm.chardev.base import Chardev
    from pyvmm.core.eventloop import EventLoop
    from pyvmm.devices.virtio.queue import Chain, Queue

F_SIZE = 1 << 0
F_MULTIPORT = 1 << 1
F_EMERG_WRITE = 1 << 2

DEVICE_READY = 0
PORT_ADD = 1
PORT_READY = 3
CONSOLE_PORT = 4
RESIZE = 5
PORT_OPEN = 6
PORT_NAME = 7

_CONTROL = struct.Struct("<IHH")
_SIZE = struct.Struct("<HH")
_CONFIG = struct.Struct("<HHII")
EMERG_WRITE = 8

#: Messages that a port can owe the driver: bits of ``owed``, in the order of sending.
OWED = (PORT_ADD, CONSOLE_PORT, RESIZE, PORT_NAME, PORT_OPEN)
_OWED_MASK = sum(1 << event for event in OWED)

QUEUE_SIZE = 128
CONTROL_SIZE = 32
CONTROL_IN, CONTROL_OUT = 2, 3

#: Output copied at once, and served without giving others a turn; a chain, however short,
#: counts for more than its bytes.
CHUNK = 64 << 10
TURN = 1 << 20
CHAIN = TURN // (2 * QUEUE_SIZE)
#: What a buffer of input is taken to hold, and how much is asked for at once.
BUFFER = 4 << 10
MOST_INPUT = 16 << 10
MAX_PORTS = 31


def _check_port(port: Record) -> None:
    if port.owed & ~_OWED_MASK:
        raise ValueError(f"owed {port.owed:#x} has messages that do not exist")


_PORT = Description(
    "virtio-console-port",
    [
        u32("number"),
        boolean("guest_open"),
        boolean("host_open"),
        u8("owed"),
        u32("sent"),
        u32("unread_size"),
        Buffer("unread", "unread_size", MOST_INPUT),
    ],
    check=_check_port,
)


class Port(Frontend):
    """One port.

    :param number: its number; 0 is the one that a driver without MULTIPORT knows
    :param chardev: where its bytes come from and go to; None for nowhere
    :param is_console: a console rather than a generic port
    :param name: what the guest calls a generic port
    :ivar guest_open: whether a program of the guest has it open
    :ivar host_open: whether the guest was told that somebody is at the other end
    :ivar owed: bits (1 << event) of messages that the driver has to get
    :ivar sent: bytes of the oldest chain of output that the chardev has taken
    :ivar unread: input that found no buffer
    """

    def __init__(
        self, number: int, chardev: Chardev | None, *, is_console: bool, name: str = ""
    ) -> None:
        self.number = number
        self.chardev = chardev
        self.is_console = is_console
        self.name = name
        self.host_open = is_console
        self.input_index = 2 * number + (2 if number else 0)
        self.device: VirtioConsole
        self.clear()

    @property
    def unread_size(self) -> int:
        """Length of ``unread``, for the state."""
        return len(self.unread)

    def clear(self) -> None:
        """Forget the driver."""
        self.guest_open = False
        self.owed = 0
        self.sent = 0
        self.unread = b""

    # ---- the front end of the chardev ------------------------------------------------------

    def can_receive(self) -> int:
        device = self.device
        queue = device.queues[self.input_index]
        # The lock because a vCPU may be resetting the device.
        with device.lock:
            if not device.running or self.unread or (device.multiport and not self.guest_open):
                return 0
            try:
                waiting = queue.waiting
                if not waiting and queue.enable_notifications():
                    waiting = queue.waiting
            except RamError as error:
                device.memory.report(error)
                return 0
        return min(waiting * BUFFER, MOST_INPUT)

    def receive(self, data: bytes) -> None:
        self.device.work(self.put_input, data)

    def handle_event(self, event: str) -> None:
        if event in (OPENED, CLOSED):
            self.set_host_open(event == OPENED)
            # With the peer gone nothing is cut short any more.
            self.handle_writable()
        elif event == RESIZED:
            self.device.handle_resize(self)

    def handle_writable(self) -> None:
        if self.device.running:
            self.device.kick(self.input_index + 1)

    def set_host_open(self, is_open: bool) -> None:
        """Tell the driver whether somebody is at the other end; not of a console, to which guests
        always write."""
        if not self.is_console and is_open != self.host_open:
            self.host_open = is_open
            self.device.work(self.device.owe, self, PORT_OPEN)

    # ---- its queues; with the device's lock held -------------------------------------------

    def put_input(self, data: bytes = b"") -> None:
        """Give input to the driver, as far as there are buffers."""
        queue = self.device.queues[self.input_index]
        data = self.unread + data
        try:
            for _ in range(queue.size):
                chain = queue.pop() if data else None
                if chain is not None:
                    data = data[queue.answer(chain, data) :]
                elif not data or not queue.enable_notifications():
                    break
            else:
                self.device.kick(self.input_index)
        finally:
            self.unread = data[:MOST_INPUT]
        self.device.notify_used(self.input_index)

    def take_output(self) -> None:
        """Give output to the chardev, as far as it takes it."""
        index = self.input_index + 1
        queue = self.device.queues[index]
        queue.disable_notifications()
        left = TURN
        while left > 0:
            if self.chardev is not None:
                moved, is_full = self.chardev.pour(self._pour)
                if is_full:
                    break  # handle_writable comes
                left -= moved
            heads, sizes, data = self._gather(queue)
            if not heads:
                if not queue.enable_notifications():
                    break
                continue
            taken = len(data) if self.chardev is None else self.chardev.write(data)
            left -= max(taken, CHAIN * len(heads))
            cut_short = taken < len(data)
            taken += self.sent
            done = 0
            while done < len(heads) and taken >= sizes[done]:
                taken -= sizes[done]
                done += 1
            queue.push_all([(head, 0) for head in heads[:done]])
            queue.unpop(len(heads) - done)
            self.sent = taken if done < len(heads) else 0
            if cut_short:
                break  # handle_writable comes
        else:
            self.device.kick(index)
        self.device.notify_used(index)

    def _pour(self, fd: int) -> tuple[int, bool]:
        queue = self.device.queues[self.input_index + 1]
        spent, self.sent, is_full = fastpath.pour(queue, fd, self.sent, budget=TURN, least=CHAIN)
        return spent, is_full

    def _gather(self, queue: Queue) -> tuple[list[int], list[int], bytes]:
        """Take chains for one write: a call for each of them would cost more than all else. Return
        their heads, their sizes, and those of their bytes that were not sent yet."""
        heads: list[int] = []
        sizes: list[int] = []
        parts: list[bytes] = []
        room = CHUNK
        taken = 0
        try:
            while room > 0 and len(heads) < queue.size and (chain := queue.pop()) is not None:
                taken += 1
                size = chain.readable_size
                if not heads:
                    # The driver may have changed the chain that was begun.
                    self.sent = min(self.sent, size)
                part = chain.read(room, 0 if heads else self.sent)
                heads.append(chain.head)
                sizes.append(size)
                parts.append(part)
                room -= len(part)
        except RamError:
            queue.unpop(taken)
            raise
        except QueueError:
            if not heads:
                raise  # those in front of it come first
        return heads, sizes, b"".join(parts)


def _check(state: Record) -> None:
    numbers = [port.number for port in state.ports]
    if numbers != sorted(set(numbers)):
        raise ValueError(f"ports {numbers} are not in order")


class VirtioConsole(VirtioDevice):
    """The device: its ports.

    :param ports: in rising order of their numbers, below ``max_ports``
    :param max_ports: how many numbers there are; more than one needs MULTIPORT
    """

    virtio_id = 3
    name = "virtio-serial-device"
    vmstate = Description(
        "virtio-console",
        [
            u16("cols"),
            u16("rows"),
            u16("port_count"),
            StructArray("ports", _PORT, "port_count", MAX_PORTS),
        ],
        check=_check,
    )

    def __init__(self, loop: EventLoop, ports: list[Port], max_ports: int = 1) -> None:
        super().__init__(loop)
        self.ports = ports
        self.max_ports = max_ports
        self.features = F_SIZE | F_EMERG_WRITE
        self.queue_sizes = (QUEUE_SIZE, QUEUE_SIZE)
        if max_ports > 1:
            self.features |= F_MULTIPORT
            control = (CONTROL_SIZE, CONTROL_SIZE)
            self.queue_sizes += control + (QUEUE_SIZE, QUEUE_SIZE) * (max_ports - 1)
        self._by_queue: dict[int, Port] = {}
        for port in ports:
            port.device = self
            self._by_queue[port.input_index] = self._by_queue[port.input_index + 1] = port
        self.rows, self.cols = self._window_size()

    def properties(self) -> dict[str, Any]:
        found: dict[str, Any] = {"max_ports": self.max_ports}
        for port in self.ports:
            kind = "virtconsole" if port.is_console else "virtserialport"
            chardev = port.chardev.id if port.chardev is not None else ""
            found[f"port {port.number}"] = f"{kind} {port.name or '-'} chardev {chardev or '-'}"
        return found

    @property
    def multiport(self) -> bool:
        """Whether MULTIPORT was negotiated."""
        return bool(self.driver_features & F_MULTIPORT)

    @property
    def port_count(self) -> int:
        """Number of ports, for the state."""
        return len(self.ports)

    # ---- configuration space ---------------------------------------------------------------

    def read_config(self, offset: int, size: int) -> bytes:
        return _CONFIG.pack(self.cols, self.rows, self.max_ports, 0)[offset : offset + size]

    def write_config(self, offset: int, data: bytes) -> None:
        # A character from a guest that cannot do better: no queue need be there.
        port = self._by_queue.get(0)
        if offset == EMERG_WRITE and port is not None and port.chardev is not None:
            port.chardev.write(data[:1])

    def handle_resize(self, port: Port) -> None:
        """Tell the driver that the terminal of a console has another size. Main loop thread."""
        if not port.is_console:
            return
        if port.number == 0:
            rows, cols = self._window_size()
            self.change_config(lambda: self._set_size(rows, cols), tell=not self.multiport)
        if self.multiport and port.guest_open:
            self.work(self.owe, port, RESIZE)

    def _set_size(self, rows: int, cols: int) -> None:
        self.rows, self.cols = rows, cols

    def _window_size(self) -> tuple[int, int]:
        port = self._by_queue.get(0)
        return _window_size(port) if port is not None else (0, 0)

    # ---- queues ----------------------------------------------------------------------------

    def handle_queue(self, index: int) -> None:
        if self.multiport and index == CONTROL_IN:
            self._send_control()
        elif self.multiport and index == CONTROL_OUT:
            super().handle_queue(index)
            self._send_control()
        else:
            port = self._by_queue.get(index)
            if port is None:
                return
            if index & 1:
                port.take_output()
            else:
                port.put_input()
                if port.chardev is not None:
                    port.chardev.accept_input()

    def handle_chain(self, queue: Queue, chain: Chain) -> None:
        """A control message of the driver's."""
        data = chain.read(_CONTROL.size)
        queue.push(chain.head, 0)
        if len(data) < _CONTROL.size:
            return
        number, event, value = _CONTROL.unpack(data)
        if event == DEVICE_READY:
            for each in self.ports if value else ():
                each.owed |= 1 << PORT_ADD
            return
        port = self._by_queue.get(2 * number + 2 if number else 0)
        if port is None:
            return
        if event == PORT_READY and value:
            for message, wanted in (
                (CONSOLE_PORT, port.is_console),
                (RESIZE, port.is_console and _window_size(port) != (0, 0)),
                (PORT_NAME, port.name),
                (PORT_OPEN, port.host_open),
            ):
                port.owed |= 1 << message if wanted else 0
        elif event == PORT_OPEN:
            port.guest_open = bool(value)
            if port.chardev is not None:
                port.chardev.accept_input()

    def owe(self, port: Port, event: int) -> None:
        """Send the driver a message about a port when it can. With the lock held."""
        if self.multiport:
            port.owed |= 1 << event
            if self.running:
                self._send_control()

    def _send_control(self) -> None:
        queue = self.queues[CONTROL_IN]
        owed = [(port, event) for port in self.ports for event in OWED if port.owed & 1 << event]
        while owed:
            chain = queue.pop()
            if chain is None:
                if not queue.enable_notifications():
                    break
                continue
            port, event = owed.pop(0)
            queue.answer(chain, _message(port, event))
            port.owed &= ~(1 << event)
        self.notify_used(CONTROL_IN)

    # ---- life ------------------------------------------------------------------------------

    def reset(self) -> None:
        for port in self.ports:
            port.clear()

    def attach(self) -> None:
        for port in self.ports:
            if port.chardev is not None:
                # The peer may have gone, or the terminal changed, while nobody looked.
                port.set_host_open(port.chardev.connected)
                if port.number == 0 and _window_size(port) != (self.rows, self.cols):
                    self.handle_resize(port)
                port.chardev.attach(port)

    def load(self, state: Record) -> None:
        self.cols, self.rows = state.cols, state.rows
        for port, saved in zip(self.ports, state.ports, strict=True):
            for name in ("guest_open", "host_open", "owed", "sent", "unread"):
                setattr(port, name, getattr(saved, name))

    def check(self, state: Record) -> None:
        numbers = [port.number for port in self.ports]
        found = [port.number for port in state.ports]
        if found != numbers:
            raise ValueError(f"ports {found}, the device has {numbers}")


def _window_size(port: Port) -> tuple[int, int]:
    # (0, 0) if nobody knows.
    chardev = port.chardev
    return chardev.window_size() if chardev is not None and chardev.is_terminal else (0, 0)


def _message(port: Port, event: int) -> bytes:
    value = 1
    tail = b""
    if event == PORT_OPEN:
        value = int(port.host_open)
    elif event == RESIZE:
        rows, cols = _window_size(port)
        tail = _SIZE.pack(cols, rows)
    elif event == PORT_NAME:
        tail = port.name.encode()
    return _CONTROL.pack(port.number, event, value) + tail
