"""virtio-rng: full buffers, bounded ones, and nothing else."""

import os

import pytest

from pyvmm.backends.rng import RngConfig, RngFile
from pyvmm.cpr.handover import Handover
from pyvmm.devices.virtio import mmio, transport
from pyvmm.devices.virtio.rng import MOST, VirtioRng
from pyvmm.errors import ConfigError


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


def test_bug_of_the_device_costs_the_device_only(loop, plug, capfd):
    class Broken(VirtioRng):
        def handle_queue(self, index):
            raise RuntimeError("injected")

    driver = plug(Broken(loop))
    driver.start()
    driver.queues[0].add([], [64])
    driver.queues[0].kick()
    driver.run()
    assert driver.status & transport.S_NEEDS_RESET
    assert "injected" in driver.transport.properties()["error"]
    assert "injected" in capfd.readouterr().err


# ---- limits and sources --------------------------------------------------------------------


def until(driver, condition):
    for _ in range(1000):
        driver.run(0.02)
        if condition():
            return
    raise AssertionError("it never happened")


def test_limit(loop, plug):
    """What a period does not allow waits for the next one, and nothing is lost."""
    driver = plug(VirtioRng(loop, max_bytes=100, period_ms=50))
    driver.start()
    queue = driver.queues[0]
    requests = [queue.add([], [70]) for _ in range(4)]
    queue.kick()
    driver.run()
    done = queue.reap()
    assert done == [(requests[0], 70), (requests[1], 30)]
    until(driver, lambda: done.extend(queue.reap()) or len(done) == 4)
    assert done[2:] == [(requests[2], 70), (requests[3], 30)]


def test_limit_that_is_used_up_costs_no_processor_time(loop, plug):
    driver = plug(VirtioRng(loop, max_bytes=1, period_ms=3600_000))
    driver.start()
    for _ in range(3):
        driver.queues[0].add([], [8])
    driver.queues[0].kick()
    driver.run()
    before = loop_rounds(driver)
    assert before == 0
    assert len(driver.queues[0].reap()) == 1


def loop_rounds(driver):
    """How often the device was served in a while in which nothing came."""
    served = []
    serve = driver.device.handle_queue
    driver.device.handle_queue = lambda index: (served.append(index), serve(index))
    driver.run(0.05)
    del driver.device.handle_queue
    return len(served)


@pytest.fixture
def fifo(tmp_path):
    """A source that has what the test writes, and its configuration."""
    path = tmp_path / "source"
    os.mkfifo(path)
    writer = os.open(path, os.O_RDWR)
    yield writer, RngConfig("rng-random", {"id": "rng0", "filename": str(path)})
    os.close(writer)


def test_source_that_has_nothing_is_waited_for(loop, plug, fifo):
    writer, config = fifo
    driver = plug(VirtioRng(loop, RngFile(config, loop, Handover())))
    driver.start()
    queue = driver.queues[0]
    first, second = (queue.add([], [4]) for _ in range(2))
    queue.kick()
    driver.run()
    assert queue.reap() == []
    os.write(writer, b"rand")
    driver.run(1)
    assert queue.reap() == [(first, 4)]
    assert first.data() == b"rand"
    os.write(writer, b"om")
    driver.run(1)
    assert queue.reap() == [(second, 2)]


def test_source_goes_on_after_an_update(loop, plug, fifo):
    writer, config = fifo
    fds = Handover()
    driver = plug(VirtioRng(loop, RngFile(config, loop, fds)))
    driver.start()
    request = driver.queues[0].add([], [4])
    driver.queues[0].kick()
    driver.run()
    inherited = {key: os.dup(fd) for key, fd in fds.kept().items()}
    assert list(inherited) == [("rng/rng0", 0)]
    os.unlink(config.filename)
    driver.update(VirtioRng(loop, RngFile(config, loop, Handover(inherited))))
    os.write(writer, b"more")
    driver.run(1)
    assert driver.queues[0].reap() == [(request, 4)]
    assert request.data() == b"more"


def test_source_that_ends(loop, plug, tmp_path, capfd):
    path = tmp_path / "source"
    path.write_bytes(b"only this")
    config = RngConfig("rng-random", {"id": "rng0", "filename": str(path)})
    driver = plug(VirtioRng(loop, RngFile(config, loop, Handover())))
    driver.start()
    queue = driver.queues[0]
    requests = [queue.add([], [9]) for _ in range(2)]
    queue.kick()
    driver.run()
    assert queue.reap() == [(requests[0], 9)]
    assert f"rng/rng0: {path}: it is at its end" in capfd.readouterr().err
    assert driver.status == 15
    assert loop_rounds(driver) == 0


@pytest.mark.parametrize(
    ("path", "problem"), [("none", "No such file"), ("folder", "it is a directory")]
)
def test_source_that_cannot_be(loop, tmp_path, path, problem):
    (tmp_path / "folder").mkdir()
    config = RngConfig("rng-random", {"id": "a", "filename": str(tmp_path / path)})
    with pytest.raises(ConfigError, match=f"-object rng-random: filename=.*{problem}"):
        RngFile(config, loop, Handover())
