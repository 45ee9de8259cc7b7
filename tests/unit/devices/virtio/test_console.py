"""virtio-console: bytes both ways without a loss, ports and their messages, sizes."""

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyvmm.chardev.base import RESIZED
from pyvmm.core.eventloop import EventLoop
from pyvmm.core.threads import Event, spawn
from pyvmm.devices.virtio import mmio
from pyvmm.devices.virtio.console import (
    CONSOLE_PORT,
    CONTROL_IN,
    CONTROL_OUT,
    DEVICE_READY,
    EMERG_WRITE,
    F_MULTIPORT,
    MOST_INPUT,
    PORT_ADD,
    PORT_NAME,
    PORT_OPEN,
    PORT_READY,
    RESIZE,
    Port,
    VirtioConsole,
)
from pyvmm.devices.virtio.queue import Queue
from pyvmm.errors import VmStateError
from pyvmm.testing.memory_chardev import MemoryChardev
from pyvmm.testing.virtio_driver import VirtioDriver

IN, OUT = 0, 1


class Terminal(MemoryChardev):
    """A chardev with a person in front of it."""

    is_terminal = True
    size = (50, 132)

    def window_size(self):
        return self.size

    def resize(self, rows, cols):
        self.size = (rows, cols)
        self.frontend.handle_event(RESIZED)


class Console:
    """A device with one console, or with ports behind it, and its driver."""

    def __init__(self, plug, loop, ports=0, kind=MemoryChardev, **options):
        self.loop = loop
        self.chardevs = [
            kind(id=f"char{number}", loop=loop, **options) for number in range(ports + 1)
        ]
        self.driver = plug(self.device())
        self.driver.start()
        self.multiport = bool(self.driver.features & F_MULTIPORT)
        if self.multiport:
            self.give_control()

    def device(self):
        made = [Port(0, self.chardevs[0], is_console=True)]
        for number, chardev in enumerate(self.chardevs[1:], 1):
            made.append(Port(number, chardev, is_console=False, name=f"org.test.{number}"))
        return VirtioConsole(self.loop, made, len(made))

    @property
    def queues(self):
        return self.driver.queues

    def give_control(self, count=8):
        for _ in range(count):
            self.queues[CONTROL_IN].add([], [64])
        self.queues[CONTROL_IN].kick()

    def control(self, number, event, value=1):
        """Send a control message; what the device has said since."""
        self.queues[CONTROL_OUT].add([struct.pack("<IHH", number, event, value)])
        self.queues[CONTROL_OUT].kick()
        self.driver.run()
        self.queues[CONTROL_OUT].reap()
        return self.messages()

    def messages(self):
        self.driver.run()
        found = []
        for request, size in self.queues[CONTROL_IN].reap():
            data = request.data(size)
            found.append((*struct.unpack("<IHH", data[:8]), data[8:]))
            self.queues[CONTROL_IN].add([], [64])
        return found

    def give(self, *sizes, queue=IN):
        for size in sizes:
            self.queues[queue].add([], [size])
        self.queues[queue].kick()
        self.driver.run()

    def got(self, queue=IN):
        """What came in the buffers that were returned."""
        self.driver.run()
        return [request.data(size) for request, size in self.queues[queue].reap()]

    def send(self, *parts, queue=OUT):
        request = self.queues[queue].add(list(parts))
        self.queues[queue].kick()
        self.driver.run()
        return request


@pytest.fixture
def console(plug, loop):
    return lambda **options: Console(plug, loop, **options)


def test_output(console):
    it = console()
    first = it.send(b"hello ", b"world")
    second = it.send(b"!")
    assert it.queues[OUT].reap() == [(first, 0), (second, 0)]
    assert it.chardevs[0].take_output() == b"hello world!"
    assert it.driver.interrupts()


def test_output_that_is_not_taken_waits_in_the_guest(console):
    it = console(room=4)
    request = it.send(b"abc", b"defgh")
    other = it.send(b"XYZ")
    assert it.chardevs[0].take_output() == b"abcd"
    assert it.queues[OUT].reap() == []
    it.chardevs[0].make_room(3)
    it.driver.run()
    assert it.chardevs[0].take_output() == b"efg"
    assert it.queues[OUT].reap() == []
    it.chardevs[0].make_room(None)
    it.driver.run()
    assert it.chardevs[0].take_output() == b"hXYZ"
    assert it.queues[OUT].reap() == [(request, 0), (other, 0)]


def test_output_that_waits_goes_on_after_an_update(console):
    it = console(room=4)
    request = it.send(b"abc", b"defgh")
    it.driver.update(it.device())
    it.driver.run()
    assert it.queues[OUT].reap() == []
    it.chardevs[0].make_room(None)
    it.driver.run()
    assert it.chardevs[0].take_output() == b"abcdefgh"
    assert it.queues[OUT].reap() == [(request, 0)]


def test_output_with_nobody_there_is_dropped(console):
    it = console(room=0)
    request = it.send(b"abc")
    assert it.queues[OUT].reap() == []
    it.chardevs[0].disconnect()
    it.driver.run()
    assert it.queues[OUT].reap() == [(request, 0)]


def test_huge_output_is_taken_in_parts(console):
    it = console()
    base = it.driver.allocate(1 << 20)
    it.driver.memory.write(base, bytes(range(256)) * 4096)
    it.queues[OUT].add([(base, 1 << 20)] * 5, indirect=True)
    it.queues[OUT].kick()
    it.driver.run()
    assert len(it.queues[OUT].reap()) == 1
    assert it.chardevs[0].take_output() == bytes(range(256)) * 4096 * 5


def test_empty_output_is_returned(console):
    it = console(room=0)
    request = it.queues[OUT].add([b""])
    it.queues[OUT].kick()
    it.driver.run()
    assert it.queues[OUT].reap() == [(request, 0)]


def test_buffer_to_write_among_output_is_returned(console):
    it = console()
    request = it.queues[OUT].add([], [64])
    it.queues[OUT].kick()
    it.driver.run()
    assert it.queues[OUT].reap() == [(request, 0)]
    assert it.driver.status == 15


def test_input_comes_as_far_as_there_are_buffers(console):
    it = console()
    it.chardevs[0].feed(b"early")
    assert it.chardevs[0].unread == b"early"
    it.give(64)
    assert it.got() == [b"early"]
    it.chardevs[0].feed(b"later")
    assert it.chardevs[0].unread == b"later"
    it.give(2, 2, 2)
    assert it.got() == [b"la", b"te", b"r"]


def test_input_beyond_small_buffers_waits(console):
    it = console()
    it.give(2)
    it.chardevs[0].feed(b"abcdef")
    assert it.got() == [b"ab"]
    it.chardevs[0].feed(b"gh")
    it.driver.update(it.device())
    it.give(3)
    assert it.got() == [b"cde"]
    it.give(1, 64)
    assert it.got() == [b"f", b"gh"]


def test_flood_of_input_stays_outside(console):
    it = console()
    it.give(1)
    it.chardevs[0].feed(bytes(1 << 20))
    assert len(it.driver.device.ports[0].unread) <= MOST_INPUT
    assert len(it.chardevs[0].unread) >= (1 << 20) - MOST_INPUT - 1


def test_nothing_comes_before_there_is_a_driver_or_while_it_stands_still(console):
    it = console()
    it.give(64)
    it.driver.transport.drain()
    it.chardevs[0].feed(b"x")
    it.driver.run()
    assert it.got() == []
    it.driver.transport.start()
    assert it.got() == [b"x"]
    it.driver.write(mmio.STATUS, 0)
    it.chardevs[0].feed(b"y")
    assert it.chardevs[0].unread == b"y"


def test_reset_forgets_what_was_under_way(console):
    it = console(room=2)
    it.send(b"abcd")
    it.give(1)
    it.chardevs[0].feed(b"xy")
    it.driver.start()
    it.chardevs[0].make_room(None)
    it.chardevs[0].take_output()
    it.send(b"new")
    assert it.chardevs[0].take_output() == b"new"
    it.give(8)
    assert it.got() == []


def test_size_in_the_configuration_space(console):
    it = console(kind=Terminal)
    assert not it.multiport
    assert it.driver.config(0, 12) == struct.pack("<HHII", 132, 50, 1, 0)
    generation = it.driver.read(mmio.CONFIG_GENERATION)
    it.chardevs[0].resize(24, 80)
    assert it.driver.config(0, 4) == struct.pack("<HH", 80, 24)
    assert it.driver.read(mmio.INTERRUPT_STATUS) == mmio.INT_CONFIG
    assert it.driver.read(mmio.CONFIG_GENERATION) != generation


def test_no_driver_finds_half_a_size_with_one_generation(console):
    """A vCPU that reads at the very moment between columns and rows."""
    it = console(kind=Terminal)
    device, found, ended, failures = it.driver.device, [], Event(), []

    def look():
        read = it.driver.read
        before = read(mmio.CONFIG_GENERATION)
        size = read(mmio.CONFIG, 2), read(mmio.CONFIG + 2, 2)
        found.append((before == read(mmio.CONFIG_GENERATION), size))
        ended.set()

    class Watched(VirtioConsole):
        def __setattr__(self, name, value):
            super().__setattr__(name, value)
            if name == "rows":
                spawn(look, failures.append)
                ended.wait(0.5)  # it may have to wait for the columns

    device.__class__ = Watched
    it.chardevs[0].resize(24, 80)
    assert ended.wait(20)
    assert not failures
    ((settled, size),) = found
    assert not settled or size in ((132, 50), (80, 24))


def test_terminal_that_was_resized_during_an_update(console):
    it = console(kind=Terminal)
    device = it.device()
    it.driver.update(device, lambda: setattr(it.chardevs[0], "size", (25, 90)))
    assert it.driver.config(0, 4) == struct.pack("<HH", 90, 25)
    assert it.driver.read(mmio.INTERRUPT_STATUS) == mmio.INT_CONFIG


def test_no_size_is_told_where_there_is_no_terminal(console):
    assert console().driver.config(0, 4) == bytes(4)


def test_emergency_write(plug, loop):
    chardev = MemoryChardev(loop=loop)
    driver = plug(VirtioConsole(loop, [Port(0, chardev, is_console=True)]))
    for byte in b"panic":
        driver.write(mmio.CONFIG + EMERG_WRITE, byte)
    assert chardev.take_output() == b"panic"
    driver.write(mmio.CONFIG, 1)
    assert chardev.take_output() == b""


@pytest.mark.parametrize("index", [IN, OUT])
def test_driver_that_never_stops_does_not_keep_the_loop(console, index):
    """Buffers without bytes, each given again as soon as it is taken."""
    it = console()
    queue = it.queues[index]
    taken = []

    class Endless(Queue):
        __slots__ = ()

        def pop(self):
            chain = super().pop()
            if chain is not None:
                taken.append(chain.head)
                queue.offer(chain.head)
            return chain

    it.driver.device.queues[index].__class__ = Endless
    queue.add([(0x100, 0)])
    if index == IN:
        it.chardevs[0].feed(b"for nobody")
    queue.kick()
    it.loop.run_once(0)
    assert 0 < len(taken) <= 3 * queue.size
    before = len(taken)
    it.loop.run_once(0)
    assert before < len(taken) <= before + 3 * queue.size
    it.driver.write(mmio.STATUS, 0)


# ---- ports ---------------------------------------------------------------------------------


def open_all(it):
    it.control(0, DEVICE_READY)
    for number in range(len(it.chardevs)):
        it.control(number, PORT_READY)
        it.control(number, PORT_OPEN)


def test_ports_introduce_themselves(console):
    it = console(ports=2, kind=Terminal)
    assert it.driver.config(4, 4) == struct.pack("<I", 3)
    assert it.control(0, DEVICE_READY) == [(number, PORT_ADD, 1, b"") for number in range(3)]
    size = struct.pack("<HH", 132, 50)
    assert it.control(0, PORT_READY) == [
        (0, CONSOLE_PORT, 1, b""),
        (0, RESIZE, 1, size),
        (0, PORT_OPEN, 1, b""),
    ]
    assert it.control(2, PORT_READY) == [
        (2, PORT_NAME, 1, b"org.test.2"),
        (2, PORT_OPEN, 1, b""),
    ]
    it.control(0, PORT_OPEN)
    it.chardevs[0].resize(10, 20)
    assert it.messages() == [(0, RESIZE, 1, struct.pack("<HH", 20, 10))]


def test_port_carries_bytes_once_the_guest_has_it_open(console):
    it = console(ports=1)
    it.control(0, DEVICE_READY)
    it.control(1, PORT_READY)
    it.give(64, queue=4)
    it.chardevs[1].feed(b"in")
    assert it.got(queue=4) == []
    it.control(1, PORT_OPEN)
    assert it.got(queue=4) == [b"in"]
    it.send(b"out", queue=5)
    assert it.chardevs[1].take_output() == b"out"
    assert it.chardevs[0].take_output() == b""
    it.control(1, PORT_OPEN, 0)
    it.give(64, queue=4)
    it.chardevs[1].feed(b"more")
    assert it.got(queue=4) == []


def test_peer_that_comes_and_goes_is_told(console):
    it = console(ports=1)
    it.chardevs[1].disconnect()
    it.control(0, DEVICE_READY)
    assert it.control(1, PORT_READY) == [(1, PORT_NAME, 1, b"org.test.1")]
    it.chardevs[1].connect()
    assert it.messages() == [(1, PORT_OPEN, 1, b"")]
    it.chardevs[1].disconnect()
    assert it.messages() == [(1, PORT_OPEN, 0, b"")]
    it.chardevs[0].disconnect()
    assert it.messages() == []  # a console takes all there is


def test_peer_that_went_during_an_update_is_told(console):
    it = console(ports=1)
    open_all(it)
    it.driver.update(it.device(), lambda: setattr(it.chardevs[1], "_connected", False))
    assert it.messages() == [(1, PORT_OPEN, 0, b"")]


def test_update_carries_open_ports_and_what_is_owed(console):
    it = console(ports=2)
    open_all(it)
    it.driver.update(it.device())
    it.give(64, queue=6)
    it.chardevs[2].feed(b"hello")
    assert it.got(queue=6) == [b"hello"]
    assert it.messages() == []


def test_messages_wait_for_buffers_and_do_not_pile_up(plug, loop):
    it = Console.__new__(Console)
    it.loop, it.multiport = loop, True
    it.chardevs = [MemoryChardev(id=f"c{number}", loop=loop) for number in range(3)]
    it.driver = plug(it.device())
    it.driver.start()
    for _ in range(300):
        assert it.control(0, DEVICE_READY) == []
    it.driver.update(it.device())
    it.give_control(20)
    assert it.messages() == [(number, PORT_ADD, 1, b"") for number in range(3)]


@pytest.mark.parametrize(
    "message",
    [
        b"",
        b"\0" * 7,
        struct.pack("<IHH", 9, PORT_OPEN, 1),
        struct.pack("<IHH", 0xFFFFFFFF, 3, 1),
        struct.pack("<IHH", 0, 0xFFFF, 1),
        struct.pack("<IHH", 0, PORT_READY, 0),
    ],
)
def test_senseless_message_is_passed_over(console, message):
    it = console(ports=1)
    it.queues[CONTROL_OUT].add([message])
    it.queues[CONTROL_OUT].kick()
    it.driver.run()
    assert len(it.queues[CONTROL_OUT].reap()) == 1
    assert it.messages() == []
    assert it.driver.status == 15


def test_driver_without_multiport_has_the_console(console):
    it = console(ports=1)
    it.driver.start(it.driver.offered() & ~F_MULTIPORT)
    it.give(64)
    it.chardevs[0].feed(b"in")
    assert it.got() == [b"in"]
    it.send(b"out")
    assert it.chardevs[0].take_output() == b"out"


def test_queues_of_ports_that_do_not_exist(plug, loop):
    chardev = MemoryChardev(loop=loop)
    device = VirtioConsole(loop, [Port(2, chardev, is_console=False)], 4)
    driver = plug(device)
    driver.start()
    for index in range(len(device.queue_sizes)):
        driver.queues[index].add([b"x"])
        driver.queues[index].kick()
    driver.run()
    assert driver.status == 15
    assert chardev.take_output() == b"x"


def test_state_of_other_ports_is_refused(console):
    it = console(ports=1)
    device = VirtioConsole(it.loop, [Port(1, it.chardevs[1], is_console=False)], 2)
    with pytest.raises(VmStateError, match="ports"):
        it.driver.update(device)


@given(st.data())
def test_every_byte_arrives_once_whatever_happens(data):
    """Random sizes, a chardev that takes what it likes, updates in between."""
    loop = EventLoop()
    drivers = []

    def plug(device):
        drivers.append(VirtioDriver(device))
        return drivers[0]

    it = Console(plug, loop)
    sent, wanted, got = b"", b"", b""
    try:
        chardev = it.chardevs[0]
        for _ in range(data.draw(st.integers(1, 12))):
            act = data.draw(st.sampled_from(["send", "room", "feed", "give", "update", "reap"]))
            if act == "send" and len(it.queues[OUT].free) > 4:
                parts = [
                    bytes(data.draw(st.integers(0, 255)) for _ in range(3)) * size
                    for size in data.draw(st.lists(st.integers(0, 400), min_size=1, max_size=3))
                ]
                it.send(*parts)
                sent += b"".join(parts)
            elif act == "room":
                chardev.make_room(data.draw(st.one_of(st.none(), st.integers(0, 600))))
            elif act == "feed":
                fed = bytes([data.draw(st.integers(0, 255))]) * data.draw(st.integers(1, 500))
                wanted += fed
                chardev.feed(fed)
            elif act == "give" and it.queues[IN].free:
                it.give(data.draw(st.integers(1, 300)))
            elif act == "update":
                it.driver.update(it.device())
            it.driver.run()
            it.queues[OUT].reap()
            got += b"".join(it.got())
        chardev.make_room(None)
        it.driver.run()
        assert chardev.take_output() == sent
        while len(got) < len(wanted):
            before = len(got)
            it.give(500)
            got += b"".join(it.got())
            assert len(got) > before
        assert got == wanted
        assert it.driver.status == 15
    finally:
        it.driver.close()
        loop.close()
