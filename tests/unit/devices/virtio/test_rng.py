"""virtio-rng: full buffers, bounded ones, and nothing else."""

from pyvmm.devices.virtio import mmio
from pyvmm.devices.virtio.rng import MOST, VirtioRng


def test_buffers_are_filled(loop, plug):
    driver = plug(VirtioRng(loop))
    driver.start()
    queue = driver.queues[0]
    whole = queue.add([], [64])
    parts = queue.add([], [10, 0, 300], indirect=True)
    queue.kick()
    driver.run()
    assert queue.reap() == [(whole, 64), (parts, 310)]
    assert whole.data() != bytes(64)
    assert whole.data() != parts.data(64)
    assert driver.interrupts() == 1


def test_large_buffer_gets_a_part(loop, plug):
    driver = plug(VirtioRng(loop))
    driver.start()
    request = driver.queues[0].add([], [1 << 20])
    driver.queues[0].kick()
    driver.run()
    assert driver.queues[0].reap() == [(request, MOST)]
    assert request.data()[MOST:] == bytes((1 << 20) - MOST)


def test_buffer_to_read_gets_nothing(loop, plug):
    driver = plug(VirtioRng(loop))
    driver.start()
    request = driver.queues[0].add([b"seed?"])
    driver.queues[0].kick()
    driver.run()
    assert driver.queues[0].reap() == [(request, 0)]
    assert driver.status == 15


def test_update(loop, plug):
    driver = plug(VirtioRng(loop))
    driver.start()
    request = driver.queues[0].add([], [64])
    driver.update(VirtioRng(loop))
    driver.run()
    assert driver.queues[0].reap() == [(request, 64)]
    assert driver.read(mmio.INTERRUPT_STATUS) == mmio.INT_USED


def test_bug_of_the_device_costs_the_device_only(loop, plug, capsys):
    class Broken(VirtioRng):
        def handle_chain(self, queue, chain):
            raise RuntimeError("injected")

    driver = plug(Broken(loop))
    driver.start()
    driver.queues[0].add([], [64])
    driver.queues[0].kick()
    driver.run()
    assert driver.status & mmio.S_NEEDS_RESET
    assert "injected" in driver.transport.properties()["error"]
    assert "injected" in capsys.readouterr().err
