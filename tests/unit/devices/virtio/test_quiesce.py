"""Devices that stand while the guest runs: nothing begins, nothing is lost, and only
unquiesce ends it."""

import struct

import pytest
from harness.virtio_disk import DEADLINE_S
from harness.virtio_network import frame, framed

from pyvmm.backends.block import BlockFile
from pyvmm.core.threads import Event, spawn
from pyvmm.devices.virtio import blk, mmio
from pyvmm.devices.virtio.console import Port, VirtioConsole
from pyvmm.devices.virtio.rng import VirtioRng
from pyvmm.testing.memory_chardev import MemoryChardev

HEADER = struct.pack("<IIQ", blk.T_IN, 0, 0)


@pytest.fixture
def rng(loop, plug):
    driver = plug(VirtioRng(loop))
    driver.start()
    return driver


def ask(driver):
    request = driver.queues[0].add([], [16])
    driver.queues[0].kick()
    driver.run()
    return request


def reaped(driver):
    driver.run()
    return [request for request, _ in driver.queues[0].reap()]


def test_kicks_are_made_up_for(rng):
    rng.transport.quiesce()
    request = ask(rng)
    assert reaped(rng) == []
    assert rng.transport.busy() == ""
    rng.transport.unquiesce()
    assert reaped(rng) == [request]


def test_a_machine_that_stops_and_goes_on_leaves_it_quiesced(rng):
    rng.transport.quiesce()
    rng.transport.drain()
    rng.transport.start()
    request = ask(rng)
    assert reaped(rng) == []
    rng.transport.unquiesce()
    assert reaped(rng) == [request]


def test_a_machine_that_stands_stands_after_unquiesce(rng):
    rng.transport.quiesce()
    rng.transport.drain()
    request = ask(rng)
    rng.transport.unquiesce()
    assert reaped(rng) == []
    rng.transport.start()
    assert reaped(rng) == [request]


@pytest.mark.parametrize("who", ["driver", "machine"])
def test_reset_leaves_it_quiesced(rng, who):
    rng.transport.quiesce()
    if who == "machine":
        rng.transport.drain()
        rng.transport.reset()
        rng.transport.start()
    rng.start()  # begins with a reset
    request = ask(rng)
    assert reaped(rng) == []
    rng.transport.unquiesce()
    assert reaped(rng) == [request]


def test_update_of_what_stands(rng, loop):
    rng.transport.quiesce()
    request = ask(rng)
    rng.update(VirtioRng(loop))
    assert reaped(rng) == [request]


def test_period_that_begins_meanwhile(loop, plug):
    driver = plug(VirtioRng(loop, max_bytes=16, period_ms=1))
    driver.start()
    assert reaped(driver) == []
    assert [ask(driver)] == reaped(driver)
    request = ask(driver)
    driver.transport.quiesce()
    driver.run(0.1)
    driver.transport.unquiesce()
    driver.run(0.1)
    assert reaped(driver) == [request]


def test_console(loop, plug):
    chardev = MemoryChardev(loop=loop)
    driver = plug(VirtioConsole(loop, [Port(0, chardev, is_console=True)]))
    driver.start()
    driver.transport.quiesce()
    request = driver.queues[0].add([], [8])
    driver.queues[0].kick()
    driver.queues[1].add([b"out"])
    driver.queues[1].kick()
    chardev.feed(b"in")
    driver.run()
    assert (reaped(driver), chardev.take_output(), chardev.unread) == ([], b"", b"in")
    driver.transport.unquiesce()
    driver.run()
    assert reaped(driver) == [request]
    assert (request.data(2), chardev.take_output()) == (b"in", b"out")


def test_network(network):
    n = network()
    n.start()
    n.driver.transport.quiesce()
    request = n.rx.add([], [2048])
    n.rx.kick()
    n.peer.sendall(framed(frame(b"in")))
    n.run(0.1)
    assert n.rx.reap() == []
    n.driver.transport.unquiesce()
    n.run(1)
    assert [one for one, _ in n.rx.reap()] == [request]


# ---- disks ----------------------------------------------------------------------------------


class Hang:
    """Requests to a disk that last until they are let go."""

    def __init__(self, monkeypatch):
        self.entered, self.go = Event(), Event()
        monkeypatch.setattr(BlockFile, "read", self._read)

    def _read(self, *_arguments):
        self.entered.set()
        assert self.go.wait(DEADLINE_S)


def read(one):
    request = one.driver.queues[0].add([HEADER], [512, 1])
    one.driver.queues[0].kick()
    one.driver.run()
    return request


def test_disk_tells_what_is_under_way_and_begins_no_more(disk, monkeypatch):
    one = disk(image={"direct": True})
    hang = Hang(monkeypatch)
    transport = one.driver.transport
    assert transport.waits_for_host
    first = read(one)
    assert hang.entered.wait(DEADLINE_S)
    transport.quiesce()
    second = read(one)
    assert transport.busy() == f"disk disk ('{one.config.filename}'): unfinished requests: 1"
    hang.go.set()
    assert [request for request, _ in one.wait(1)] == [first]
    transport.drain(DEADLINE_S)
    assert transport.busy() == ""
    transport.start()
    one.driver.run()
    assert one.driver.queues[0].reap() == []
    transport.unquiesce()
    assert [request for request, _ in one.wait(1)] == [second]


def test_queue_that_is_being_served_is_under_way(disk):
    one = disk()
    with one.driver.device.lock:
        assert "disk disk ('" in one.driver.transport.busy()
        assert "does not come to its end" in one.driver.transport.busy()
    assert one.driver.transport.busy() == ""


@pytest.mark.parametrize("register", [mmio.STATUS, mmio.QUEUE_READY])
def test_driver_that_takes_its_queue_back_is_under_way_until_it_has_it(disk, monkeypatch, register):
    one = disk(image={"direct": True})
    hang, back, failures = Hang(monkeypatch), Event(), []
    read(one)
    assert hang.entered.wait(DEADLINE_S)

    def take_back():
        one.driver.write(mmio.QUEUE_SEL, 0)
        one.driver.write(register, 0)
        back.set()

    spawn(take_back, failures.append)
    transport = one.driver.transport
    while not transport.holds_cpu:
        assert not failures
    transport.quiesce()
    assert "unfinished requests" in transport.busy()
    hang.go.set()
    assert back.wait(DEADLINE_S)
    assert transport.busy() == ""
    assert not transport.holds_cpu


def test_nothing_begins_for_a_queue_that_is_being_taken_back(disk, monkeypatch):
    """Not even if the machine, which could not stop that vCPU, lets all devices go on."""
    one = disk(image={"direct": True})
    hang, device = Hang(monkeypatch), one.driver.device
    read(one)
    assert hang.entered.wait(DEADLINE_S)
    real = device.drain

    def drain(timeout_s=None):
        one.driver.transport.start()  # the main loop's
        hang.go.set()
        real(DEADLINE_S)
        hang.go.clear()
        one.driver.queues[0].add([HEADER], [512, 1])  # the driver offers one more
        one.driver.transport.kick(0)
        one.driver.run()

    monkeypatch.setattr(device, "drain", drain)
    one.driver.write(mmio.QUEUE_SEL, 0)
    one.driver.write(mmio.QUEUE_READY, 0)
    assert device.busy() == ""
    hang.go.set()
