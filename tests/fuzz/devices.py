"""Targets that a guest can reach: registers, rings, and what devices make of requests."""

import os
import socket

from harness.uart import NativePort, act, fresh_port
from harness.virtio_echo import Echo, ask
from harness.virtio_network import Network, framed
from harness.virtio_ring import AVAIL, BUFFER, DESC, RAM, ROM, SIZE, Ring

from fuzz.inputs import Input
from pyvmm.backends.block import BlockFile
from pyvmm.backends.block_config import BlockConfig
from pyvmm.chardev.base import BREAK, CLOSED, OPENED
from pyvmm.core.eventloop import EventLoop
from pyvmm.cpr.handover import Handover
from pyvmm.devices.serial import PORTS
from pyvmm.devices.virtio import fastpath, mmio, transport
from pyvmm.devices.virtio.blk import VirtioBlk
from pyvmm.devices.virtio.console import Port, VirtioConsole
from pyvmm.devices.virtio.queue import QueueError
from pyvmm.machine.drivers import virtio_blk
from pyvmm.testing.memory_chardev import MemoryChardev
from pyvmm.testing.virtio_driver import VirtioDriver

REGISTERS = range(0, mmio.CONFIG + 16, 4)
VALUES = [0, 1, 2, 3, 4, 7, 8, 11, 15, 16, 0x80, 0x1000, 0x2000, 0xFFFF, 0x80000000, 0xFFFFFFFF]
PLACES = [0, DESC, AVAIL, RAM - 16, RAM - 1, ROM, ROM + 0xFFF, 1 << 32, (1 << 64) - 16]
LENGTHS = [0, 1, 12, 16, 17, 512, 4096, 1 << 20, 0xFFFFFFFF]
IMAGE = 1 << 16
BEYOND = 1 << 16
STEPS = 200


def serial(data):
    """A UART that native code answers for is the one that Python has alone."""
    given = Input(data)
    with fresh_port(NativePort) as native, fresh_port() as python:
        for _ in range(STEPS):
            if not given:
                break
            action = given.below(8)
            if action < 3:
                step = ("read", given.below(PORTS))
            elif action < 6:
                step = ("write", given.below(PORTS), given.number())
            elif action == 6:
                step = ("feed", given.bytes(given.below(20)))
            else:
                step = given.pick([("event", BREAK), ("event", CLOSED), ("event", OPENED)])
            assert act(native, *step) == act(python, *step), step
            assert native.irq.level == python.irq.level, step
        native.uart.drain()
        saved = [bytearray(), bytearray()]
        for out, port in zip(saved, (native, python), strict=True):
            port.uart.vmstate.save(out, port.uart.save())
        assert saved[0] == saved[1]


def _descriptor(given):
    where = given.below(8)
    gpa = BUFFER + given.number(2) if where < 4 else RAM - given.below(4096)
    if where == 7:
        gpa = given.pick(PLACES)
    return gpa, given.pick(LENGTHS) if given.below(2) else given.below(3000), given.below(8)


def rings(data):
    """Rings with anything in them: native code stays within the guest's memory and the disk, and
    Python finds chains that lie in it, or an error."""
    given = Input(data)
    it = Ring(event_idx=bool(given.below(2)), indirect=bool(given.below(2)), beyond=BEYOND)
    null = os.open(os.devnull, os.O_WRONLY)
    image = os.memfd_create("image")
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    ours.setblocking(False)
    try:
        os.pwrite(image, b"z" * IMAGE, 0)
        for table in (DESC, BUFFER):
            for slot in range(given.below(SIZE + 1)):
                it.desc(slot, *_descriptor(given), given.below(SIZE + 1), table)
        it.offer(*(given.below(SIZE + 1) for _ in range(given.below(2 * SIZE))))
        if not given.below(8):
            it.memory.write_u16(AVAIL + 2, given.number(2))
        buffer = memoryview(bytearray(b"y" * 4096))
        mergeable = bool(given.below(2))
        theirs.send(b"x" * given.below(3000))
        how = {"mergeable": mergeable, "plain": bool(given.below(2)), "budget": 8192, "least": 100}
        fastpath.receive(it.queue, ours.fileno(), buffer, 12, **how)
        fastpath.spread(it.queue, buffer[: 12 + given.below(3000)], mergeable=mergeable)
        fastpath.send(it.queue, null, 12, 1 << 16, SIZE)
        fastpath.pour(it.queue, null, given.below(64), budget=1 << 20, least=1)
        fastpath.serve(
            it.queue, image, 0, writable=True, block=512, longest=1 << 20, capacity=IMAGE, most=SIZE
        )
        for _ in range(2 * SIZE):
            chain = it.queue.pop()
            if chain is None:
                break
            for gpa, length in (*chain.readable, *chain.writable):
                assert it.memory.contains(gpa, length, writable=False)
            it.queue.push(chain.head, chain.write(chain.read(4096)))
    except QueueError:
        pass
    finally:
        assert it.memory.read(ROM, 0x1000) == bytes(0x1000)
        assert os.pread(it.backend.fd, BEYOND, RAM) == bytes(BEYOND)
        assert os.fstat(image).st_size == IMAGE
        for end in (ours, theirs):
            end.close()
        os.close(image)
        os.close(null)
        it.close()


class _Echoes:
    """Devices of one kind, and what is behind them."""

    def __init__(self):
        self.loop = EventLoop()
        self.driver = VirtioDriver(self.device(), ram_size=RAM)

    def device(self):
        return Echo(self.loop)

    def serve(self):
        self.driver.run()

    def close(self):
        self.driver.close()
        self.loop.close()


class _Consoles(_Echoes):
    def device(self):
        chardevs = [MemoryChardev(f"char{number}", loop=self.loop) for number in range(2)]
        for chardev in chardevs:
            chardev.feed(b"input")
        ports = [
            Port(0, chardevs[0], is_console=True),
            Port(1, chardevs[1], is_console=False, name="org.test"),
        ]
        return VirtioConsole(self.loop, ports, len(ports))


class _Disks(_Echoes):
    def __init__(self):
        self.image = os.memfd_create("image")
        os.truncate(self.image, IMAGE)
        config = BlockConfig("disk", f"/proc/self/fd/{self.image}")
        self.file = BlockFile(config, Handover())
        super().__init__()

    def device(self):
        values = virtio_blk.DRIVER.parse({"drive": "disk"}, "-device").values
        return VirtioBlk(self.loop, self.file, virtio_blk.config(values), lambda *_: None)

    def serve(self):
        self.driver.transport.drain()  # until the workers have done
        self.driver.transport.start()
        self.driver.run()

    def close(self):
        super().close()
        assert os.fstat(self.image).st_size == IMAGE
        self.file.close()
        os.close(self.image)


class _Networks(_Echoes):
    def __init__(self):
        self.network = Network()
        self.loop, self.driver = self.network.loop, self.network.driver
        self.network.peer.send(framed(b"frame" * 20))

    def close(self):
        self.network.close()


KINDS = (_Echoes, _Consoles, _Disks, _Networks)


def virtio(data):
    """Whatever a driver does to registers and rings, in any order, the device works after a
    reset, and its state can be saved and loaded."""
    given = Input(data)
    it = given.pick(KINDS)()
    try:
        driver = it.driver
        for _ in range(STEPS):
            if not given:
                break
            _step(given, driver)
            assert driver.status & ~(transport.S_DRIVERS | transport.S_NEEDS_RESET) == 0
        it.serve()
        driver.encode()
        driver.transport.start()
        driver.start()
        assert driver.status & transport.S_DRIVER_OK
        if isinstance(driver.device, Echo):
            assert ask(driver, b"still there") == b"still there"
    finally:
        it.close()


def _step(given, driver):
    action = given.below(8)
    queues = driver.queues
    if action == 0:
        value = given.pick(VALUES) if given.below(2) else given.number(4)
        driver.write(given.pick(REGISTERS), value)
    elif action == 1:
        size = given.pick((1, 2, 4, 8))
        driver.write(given.below(mmio.SIZE), given.number(size), size)
    elif action == 2:
        driver.read(given.below(mmio.SIZE), given.pick((1, 2, 4, 8)))
    elif action == 3:
        if driver.negotiate(driver.offered() & ~given.number(8)):
            driver.queues.clear()
            for index in range(len(driver.device.queue_sizes)):
                driver.set_up_queue(index, given.pick((8, 4, 2)))
            driver.set_driver_ok()
    elif action == 4 and queues:
        queue = given.pick(queues)
        if len(queue.free) > 3:
            queue.add(
                [given.bytes(given.below(64)) for _ in range(given.below(3))],
                [given.below(600) for _ in range(given.below(2))] + [1],
            )
    elif action == 5 and queues:
        queue = given.pick(queues)
        queue.write_descriptor(given.below(queue.size), *_descriptor(given), given.below(9))
        queue.offer(given.below(queue.size + 1))
    elif action == 6:
        driver.memory.write(given.below(1 << 14), given.bytes(given.below(16)))
    else:
        driver.notify(given.below(8))
        driver.run()


TARGETS = {
    "serial": (serial, [bytes(range(256))]),
    "rings": (rings, [bytes(range(256))]),
    "virtio": (virtio, [bytes((kind, 3, *range(256))) for kind in range(len(KINDS))]),
}
