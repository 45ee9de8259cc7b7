"""Rings and buffers that the host cannot back: the guest is paused, and the device serves them when
it goes on, each request once."""

import struct

import pytest
from harness.scarce import Scarce
from harness.virtio_disk import pattern
from harness.virtio_network import frame, framed
from harness.virtio_stream import Stream, arrived

from pyvmm.devices.virtio import blk, mmio, transport
from pyvmm.devices.virtio.console import Port, VirtioConsole
from pyvmm.devices.virtio.rng import VirtioRng
from pyvmm.errors import RamError
from pyvmm.memory.guest import GuestMemoryError
from pyvmm.testing.memory_chardev import MemoryChardev

SECTOR = 512
CONTENT = pattern(1 << 20)
OK = transport.S_ACKNOWLEDGE | transport.S_DRIVER | transport.S_DRIVER_OK | transport.S_FEATURES_OK


def starve(scarce, run, done):
    """Serve what waits while the memory is gone, twice, and then with it."""
    scarce.take()
    run()
    for _ in range(2):
        scarce.pause()
        assert scarce.driver.status == OK
        scarce.cont()
    scarce.pause()
    scarce.give()
    scarce.cont()
    run()
    assert done()
    assert scarce.errors == []
    assert scarce.driver.status == OK


# ---- entropy -----------------------------------------------------------------------------------


@pytest.fixture(params=["rings", "buffers"])
def where(request):
    """What of the driver's is scarce."""
    return request.param


def plug_scarce(plug, device, where):
    driver = plug(device)
    if where == "rings":
        scarce = Scarce(driver)
        driver.start()
    else:
        driver.start()
        scarce = Scarce(driver)
    return driver, scarce


def test_entropy(loop, plug, where):
    driver, scarce = plug_scarce(plug, VirtioRng(loop), where)
    queue = driver.queues[0]
    requests = [queue.add([], [64]), queue.add([], [10, 300], indirect=True)]
    queue.kick()
    starve(scarce, driver.run, lambda: queue.reap() == [(requests[0], 64), (requests[1], 310)])
    assert requests[0].data() != bytes(64)
    assert driver.interrupts()


def test_queue_that_has_no_place_to_answer(loop, plug):
    driver = plug(VirtioRng(loop))
    assert driver.negotiate()
    scarce = Scarce(driver)
    scarce.take()
    with pytest.raises(RamError):
        driver.set_up_queue(0)
    assert not driver.read(mmio.QUEUE_READY)
    scarce.give()
    # As the vCPU does, which makes the same access again.
    driver.write(mmio.QUEUE_READY, 1)
    assert driver.read(mmio.QUEUE_READY)


# ---- disks -------------------------------------------------------------------------------------


def start_disk(disk, where, **options):
    one = disk(CONTENT, **options)
    if where == "rings":
        scarce = Scarce(one.driver)
        one.driver.start()
    else:
        scarce = Scarce(one.driver)
    return one, scarce


def header(kind, sector):
    return struct.pack("<IIQ", kind, 0, sector)


SIZES = [SECTOR, 4096, 256 << 10]


@pytest.mark.parametrize("size", SIZES)
def test_disk_reads(disk, kind, where, size):
    one, scarce = start_disk(disk, where)
    queue = one.driver.queues[0]
    request = queue.add([header(blk.T_IN, 8)], [size, 1])
    queue.kick()
    served = []

    def done():
        served.extend(queue.reap())
        return [each for each, _ in served] == [request]

    starve_waiting(scarce, one, done)
    assert request.data() == CONTENT[8 * SECTOR : 8 * SECTOR + size] + b"\0"


def starve_waiting(scarce, one, done):
    """The same as :func:`starve` where workers answer, which takes some time."""

    def wait():
        for _ in range(2000):
            one.driver.run(0.005)
            if scarce.errors:
                return
        raise AssertionError("nothing happens")

    scarce.take()
    wait()
    for _ in range(2):
        scarce.pause()
        scarce.cont()
        wait()
    scarce.pause()
    scarce.give()
    scarce.cont()
    for _ in range(2000):
        if done():
            break
        one.driver.run(0.005)
    assert done()
    assert scarce.errors == []
    assert one.errors == []
    assert one.driver.status == OK


@pytest.mark.parametrize("size", SIZES)
def test_disk_writes(disk, kind, where, size):
    one, scarce = start_disk(disk, where)
    queue = one.driver.queues[0]
    data = pattern(size, seed=99)
    request = queue.add([header(blk.T_OUT, 16), data], [1])
    queue.kick()
    served = []

    def done():
        served.extend(queue.reap())
        return [each for each, _ in served] == [request]

    starve_waiting(scarce, one, done)
    assert request.data() == b"\0"
    assert one.contents()[16 * SECTOR : 16 * SECTOR + size] == data


def test_disk_request_that_waits_is_part_of_the_state(disk):
    one, scarce = start_disk(disk, "buffers")
    queue = one.driver.queues[0]
    room = one.driver.allocate(256 << 10)
    request = queue.add([header(blk.T_IN, 0)], [(room, 256 << 10), 1])
    queue.kick()
    scarce.take()
    for _ in range(2000):
        one.driver.run(0.005)
        if scarce.errors:
            break
    scarce.pause()
    one.driver.update(one.device(), scarce.give)
    ((done, _),) = one.wait(1)
    assert done is request
    assert request.data() == CONTENT[: 256 << 10] + b"\0"


# ---- networks ----------------------------------------------------------------------------------


def start_network(network, where, **options):
    n = network()
    if where == "rings":
        scarce = Scarce(n.driver)
        n.start(**options)
    else:
        n.start(**options)
        scarce = Scarce(n.driver)
    return n, scarce


def test_frames_of_the_guest(network, where):
    n, scarce = start_network(network, where)
    frames = [frame(b"%d" % number, 60 + number) for number in range(3)]
    n.send(*frames, kick=False)
    n.tx.kick()
    starve(scarce, n.run, lambda: len(n.tx.reap()) == 3)
    assert n.from_guest(3) == frames
    assert n.silent()


@pytest.mark.parametrize("sizes", [[2000], [100, 100]], ids=str)
def test_frames_for_the_guest(network, where, sizes):
    n, scarce = start_network(network, where)
    for _ in range(3):
        for size in sizes:
            n.rx.add([], [size])
    n.rx.kick()
    frames = [frame(b"%d" % number, 150) for number in range(3)]
    n.peer.sendall(framed(*frames))
    found = []

    def done():
        found.extend(request.data(written) for request, written in n.rx.reap())
        return len(b"".join(found)) == 3 * (12 + 150)

    starve(scarce, n.run, done)
    text = b"".join(found)
    assert [text[at + 12 : at + 162] for at in range(0, len(text), 162)] == frames


# ---- consoles ----------------------------------------------------------------------------------


def start_console(plug, loop, where):
    chardev = MemoryChardev("c", loop=loop)
    device = VirtioConsole(loop, [Port(0, chardev, is_console=True)])
    return *plug_scarce(plug, device, where), chardev


def test_console_output(plug, loop, where):
    driver, scarce, chardev = start_console(plug, loop, where)
    queue = driver.queues[1]
    for text in (b"one ", b"two ", b"three"):
        queue.add([text])
    queue.kick()
    starve(scarce, driver.run, lambda: len(queue.reap()) == 3)
    assert chardev.take_output() == b"one two three"


def test_console_output_to_a_stream(plug, loop, where):
    chardev = Stream(loop)
    try:
        device = VirtioConsole(loop, [Port(0, chardev, is_console=True)])
        driver, scarce = plug_scarce(plug, device, where)
        queue = driver.queues[1]
        parts = [bytes([n]) * 1500 for n in range(20)]
        for part in parts:
            queue.add([part])
        queue.kick()
        found = []

        def run():
            for _ in range(20):
                driver.run()
                loop.run_once(0)
                found.append(arrived(chardev.peer))

        starve(scarce, run, lambda: len(queue.reap()) == 20)
        assert b"".join(found) == b"".join(parts)
    finally:
        chardev.close()


def test_console_input(plug, loop, where):
    driver, scarce, chardev = start_console(plug, loop, where)
    queue = driver.queues[0]
    driver.run()
    for _ in range(3):
        queue.add([], [4])
    chardev.unread += b"hello, world"

    def run():
        queue.kick()
        driver.run()

    found = []

    def done():
        found.extend(request.data(size) for request, size in queue.reap())
        return b"".join(found) == b"hello, world"

    starve(scarce, run, done)


def test_console_messages(plug, loop):
    chardevs = [MemoryChardev(f"c{number}", loop=loop) for number in range(2)]
    ports = [
        Port(0, chardevs[0], is_console=True),
        Port(1, chardevs[1], is_console=False, name="one"),
    ]
    driver = plug(VirtioConsole(loop, ports, 2))
    driver.start()
    scarce = Scarce(driver)
    control_in, control_out = driver.queues[2], driver.queues[3]
    for _ in range(4):
        control_in.add([], [64])
    control_out.add([struct.pack("<IHH", 0, 0, 1)])  # DEVICE_READY
    control_out.kick()
    found = []

    def done():
        found.extend(request.data(size) for request, size in control_in.reap())
        return len(found) == 2 and len(control_out.reap()) == 1

    starve(scarce, driver.run, done)
    assert found == [struct.pack("<IHH", number, 1, 1) for number in range(2)]  # PORT_ADD


def test_a_broken_ring_is_still_the_drivers_fault(loop, plug):
    driver = plug(VirtioRng(loop))
    driver.start()
    scarce = Scarce(driver)
    with pytest.raises(GuestMemoryError):
        driver.memory.read(driver.backend.size, 1)
    driver.queues[0].add([], [(driver.backend.size, 16)])
    driver.queues[0].kick()
    driver.run()
    assert scarce.errors == []
    assert driver.status & transport.S_NEEDS_RESET
