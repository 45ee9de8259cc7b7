"""A transport under registers that are none of virtio-mmio's: what a driver finds is the same
with either face, and a third party can serve a queue by its descriptors."""

import os

import pytest

from pyvmm.devices.virtio.device import F_VERSION_1, VirtioDevice
from pyvmm.devices.virtio.queue import Queue
from pyvmm.devices.virtio.transport import (
    MAX_QUEUES,
    QUEUE,
    S_NEEDS_RESET,
    Interrupts,
    Transport,
    check_status,
)
from pyvmm.errors import VmStateError
from pyvmm.testing.virtio_driver import VirtioDriver
from pyvmm.testing.virtio_pci_driver import VirtioPciDriver
from pyvmm.vmstate.fields import Description, StructArray, u8, u16, u32, u64

# Registers of 8 bytes, and of each queue so many more.
STATUS, OFFERED, ACCEPTED, GENERATION, QUEUES, CONFIG = 0x00, 0x08, 0x10, 0x18, 0x40, 0x100
SIZE, DESC, AVAIL, USED, ENABLE, VECTOR, KICK, STRIDE = (*range(0, 0x38, 8), 0x40)
AREAS = {DESC: "desc", AVAIL: "avail", USED: "used"}
NO_VECTOR = 0xFF


class Vectors(Interrupts):
    """An interrupt of its own for each queue: an eventfd, as an irqfd would have it."""

    def __init__(self, count):
        self.fds = [os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK) for _ in range(count + 1)]

    def used(self, queue):
        os.eventfd_write(self.fds[queue], 1)

    def config(self):
        os.eventfd_write(self.fds[-1], 1)

    def call_fd(self, queue):
        return self.fds[queue]


class Card(Transport):
    """The registers. One of them is no other face's: whether queues interrupt at all."""

    layout = Description(
        "test-card",
        [
            u8("status"),
            u8("vector"),
            u32("config_generation"),
            u64("driver_features"),
            u16("queue_count"),
            StructArray("queues", QUEUE, "queue_count", MAX_QUEUES),
        ],
        check=lambda state: check_status(state.status),
    )

    def clear_registers(self):
        self.vector = NO_VECTOR

    def load_registers(self, state):
        self.vector = state.vector

    def on_read(self, offset, size):
        if offset >= CONFIG:
            return self.read_config(offset - CONFIG, size)
        if offset == STATUS:
            return self.status
        if offset == OFFERED:
            return self.read_features(0) | self.read_features(1) << 32
        if offset == GENERATION:
            return self.read_generation()
        queue = self.find_queue((offset - QUEUES) // STRIDE)
        return queue.max_size if queue is not None else 0

    def on_write(self, offset, size, value):
        if offset == STATUS:
            self.write_status(value)
        elif offset == ACCEPTED:
            self.write_features(0, value & 0xFFFFFFFF)
            self.write_features(1, value >> 32)
        elif QUEUES <= offset < CONFIG:
            index, register = divmod(offset - QUEUES, STRIDE)
            self._write_queue(index, register, value)

    def _write_queue(self, index, register, value):
        queue = self.find_queue(index)
        if register == SIZE:
            self.write_queue_size(queue, value)
        elif register in AREAS:
            self.write_queue_address(queue, AREAS[register], 1, value >> 32)
            self.write_queue_address(queue, AREAS[register], 0, value & 0xFFFFFFFF)
        elif register == ENABLE:
            self.enable_queue(queue) if value else self.disable_queue(queue)
        elif register == VECTOR:
            self.vector = value
        elif register == KICK:
            self.kick(index)


class CardDriver(VirtioDriver):
    """Its driver."""

    width = 8
    vectors = None

    def make_transport(self, device, kick_fds):
        self.vectors = self.vectors or Vectors(len(device.queue_sizes))
        return Card(device, self.memory, self.vectors, kick_fds)

    def config(self, offset, size):
        return bytes(self.read(CONFIG + offset + at, 1) for at in range(size))

    @property
    def status(self):
        return self.read(STATUS)

    def set_status(self, value):
        self.write(STATUS, value)

    def offered(self):
        return self.read(OFFERED)

    def accept(self, features):
        self.write(ACCEPTED, features)

    def max_size(self, index):
        return self.read(QUEUES + STRIDE * index)

    def enable(self, queue):
        at = QUEUES + STRIDE * queue.index
        self.write(at + SIZE, queue.size)
        for register, area in AREAS.items():
            self.write(at + register, getattr(queue, area))
        self.write(at + ENABLE, 1)

    def notify(self, index):
        self.write(QUEUES + STRIDE * index + KICK, 1)

    def interrupts(self, vector=None):
        """How many came since the last call, of one vector or of all."""
        count = 0
        for fd in self.vectors.fds if vector is None else [self.vectors.fds[vector]]:
            try:
                count += os.eventfd_read(fd)
            except BlockingIOError:
                continue
        return count

    def close(self):
        super().close()
        for fd in self.vectors.fds:
            os.close(fd)


class MessageDriver(VirtioPciDriver):
    """That of PCI, by messages."""

    def put_on_bus(self):
        super().put_on_bus()
        self.enable_msix()


class Upper(VirtioDevice):
    """Answers each request on either of two queues in capitals."""

    virtio_id = 42
    name = "virtio-upper-device"
    queue_sizes = (8, 4)
    features = 1 << 3 | 1 << 40
    config = b"upper"
    vmstate = Description("virtio-upper", [u32("served")])

    def __init__(self, loop):
        super().__init__(loop)
        self.served = 0

    def handle_chain(self, queue, chain):
        self.served += 1
        queue.push(chain.head, chain.write(chain.read(4096).upper()))


@pytest.fixture(params=[VirtioDriver, MessageDriver, CardDriver], ids=["mmio", "pci", "card"])
def driver(loop, request):
    """A driver that has not begun, over any face."""
    driver = request.param(Upper(loop))
    yield driver
    driver.close()


@pytest.fixture
def card(loop):
    """A driver that has begun, over the other face."""
    driver = CardDriver(Upper(loop))
    driver.start()
    yield driver
    driver.close()


def ask(driver, text, index=0):
    request = driver.queues[index].add([text], [64])
    driver.queues[index].kick()
    driver.run()
    assert [reaped for reaped, _ in driver.queues[index].reap()] == [request]
    return request.data(len(text))


# ---- the same with either face ---------------------------------------------------------------


def test_requests_go_round(driver):
    driver.start()
    assert driver.status == 15
    assert driver.offered() == driver.transport.features
    assert driver.config(0, 5) == b"upper"
    assert ask(driver, b"one") == b"ONE"
    assert ask(driver, b"two", 1) == b"TWO"
    assert driver.interrupts() == 2


def test_features_are_negotiated(driver):
    assert not driver.negotiate(F_VERSION_1 | 1 << 6)
    assert not driver.negotiate(1 << 3)  # without VERSION_1
    assert driver.negotiate(F_VERSION_1 | 1 << 40)
    assert driver.device.driver_features == F_VERSION_1 | 1 << 40


def test_queue_that_cannot_be_breaks_the_device_until_its_reset(driver):
    assert driver.negotiate()
    driver.set_up_queue(0, 3)
    assert driver.status & S_NEEDS_RESET
    assert "3 entries" in driver.transport.properties()["error"]
    driver.start()
    assert ask(driver, b"well") == b"WELL"


def test_reset_forgets_the_driver(driver):
    driver.start()
    ask(driver, b"x")
    driver.set_status(0)
    assert driver.status == 0
    assert not any(queue.ready for queue in driver.transport.queues)


def test_device_that_stands_makes_up_for_its_kicks(driver):
    driver.start()
    transport = driver.transport
    for stand, go_on in (
        (transport.drain, transport.start),
        (transport.quiesce, transport.unquiesce),
    ):
        stand()
        request = driver.queues[1].add([b"later"], [64])
        driver.queues[1].kick()
        driver.run()
        assert driver.queues[1].reap() == []
        go_on()
        driver.run()
        assert driver.queues[1].reap() == [(request, 5)]


def test_update_carries_everything(driver, loop):
    driver.start()
    ask(driver, b"before")
    driver.device.change_config(lambda: None)
    generation = driver.transport.config_generation
    request = driver.queues[0].add([b"meanwhile"], [64])
    driver.queues[0].kick()
    driver.update(Upper(loop))
    driver.run()
    assert driver.queues[0].reap() == [(request, 9)]
    assert driver.device.served == 2
    assert driver.device.driver_features == driver.features
    assert driver.transport.config_generation == generation
    assert ask(driver, b"after", 1) == b"AFTER"


# ---- what is the face's own ------------------------------------------------------------------


def test_interrupts_are_named_by_queue(card):
    ask(card, b"x", 1)
    assert [card.interrupts(vector) for vector in range(3)] == [0, 1, 0]
    ask(card, b"x", 0)
    assert [card.interrupts(vector) for vector in range(3)] == [1, 0, 0]
    card.device.change_config(lambda: None)
    assert [card.interrupts(vector) for vector in range(3)] == [0, 0, 1]
    card.set_status(0)
    card.device.change_config(lambda: None)
    assert card.interrupts() == 0  # nobody is there to be told


def test_registers_of_a_face_are_reset_and_carried_with_it(card, loop):
    assert card.transport.vector == NO_VECTOR
    card.write(QUEUES + VECTOR, 7)
    card.update(Upper(loop))
    assert card.transport.vector == 7
    card.set_status(0)
    assert card.transport.vector == NO_VECTOR


def test_state_is_checked_with_any_face(card):
    data = bytearray(card.encode())
    assert Card.description(Upper).name == "virtio-upper-device"
    data[0] = 7
    with pytest.raises(VmStateError, match="without features"):
        card.decode(bytes(data))


def test_third_party_serves_a_queue_by_its_descriptors(loop):
    """As vhost will: it has the addresses, the kick and the call, and the device is not asked."""
    driver = CardDriver(Upper(loop))
    loop.remove(driver.transport.kick_fds[0])
    driver.start()
    kick, call = driver.transport.kick_fds[0], driver.transport.interrupts.call_fd(0)
    rings = driver.transport.queues[0]
    theirs = Queue(driver.memory, rings.max_size)
    theirs.size, theirs.desc, theirs.avail, theirs.used = (
        *(rings.size, rings.desc, rings.avail, rings.used),
    )
    theirs.enable()
    request = driver.queues[0].add([b"x"], [64])
    driver.queues[0].kick()
    driver.run()
    assert os.eventfd_read(kick) == 1
    chain = theirs.pop()
    theirs.push(chain.head, chain.write(b"theirs"))
    os.eventfd_write(call, 1)
    assert driver.interrupts(0) == 1
    assert driver.queues[0].reap() == [(request, 6)]
    assert driver.device.served == 0
    driver.close()


def test_line_of_virtio_mmio_has_no_descriptor_of_a_queue(loop, plug):
    assert plug(Upper(loop)).transport.interrupts.call_fd(0) is None
