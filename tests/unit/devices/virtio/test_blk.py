"""The block device, driven as a guest drives it: every request, and what evil guests do."""

import os
import struct
import time

import pytest
from harness.virtio_disk import DEADLINE_S, SECTORS, SIZE, pattern, segment

from pyvmm.backends.block import BlockFile
from pyvmm.backends.block_config import BlockConfig
from pyvmm.core.eventloop import EventLoop
from pyvmm.core.threads import Event
from pyvmm.core.workers import Workers
from pyvmm.cpr.handover import Handover
from pyvmm.devices.virtio import blk, mmio
from pyvmm.devices.virtio.blk import BlkConfig, VirtioBlk
from pyvmm.devices.virtio.device import F_EVENT_IDX, F_INDIRECT_DESC, F_VERSION_1
from pyvmm.errors import ConfigError

# ---- what a driver may do -------------------------------------------------------------------


def test_what_is_written_is_read(disk, kind):
    one = disk()
    data = pattern(8192)
    assert one.ask(blk.T_OUT, 16, data) == (blk.S_OK, b"")
    assert one.ask(blk.T_IN, 16, room=8192) == (blk.S_OK, data)
    assert one.ask(blk.T_FLUSH) == (blk.S_OK, b"")
    assert one.contents() == bytes(8192) + data + bytes(SIZE - 16384)
    assert one.driver.interrupts() > 0


def test_any_framing(disk, kind):
    one = disk()
    data = pattern(1024)
    header = struct.pack("<IIQ", blk.T_OUT, 0, 5)
    # The device must not care how header, data and status are cut (2.7.4).
    assert one.raw([header[:7], header[7:] + data[:100], data[100:]], [1]) == (0, b"")
    header = struct.pack("<IIQ", blk.T_IN, 0, 5)
    assert one.raw([header[:1], header[1:]], [1, 1000, 24]) == (0, data)
    assert one.raw([header], [1025], indirect=True) == (0, data)


def test_many_requests_at_once(disk, kind):
    one = disk()
    queue = one.driver.queues[0]
    for sector in range(0, 400, 8):
        header = struct.pack("<IIQ", blk.T_OUT, 0, sector)
        queue.add([header + pattern(4096, sector)], [1], indirect=True)
    queue.kick()
    assert len(one.wait(50)) == 50
    requests = {}
    for sector in range(0, 400, 8):
        header = struct.pack("<IIQ", blk.T_IN, 0, sector)
        requests[queue.add([header], [4096, 1], indirect=True).head] = sector
    queue.kick()
    for request, _ in one.wait(50):
        assert request.data() == pattern(4096, requests[request.head]) + b"\0"


def test_workers_serve_several_requests_at_a_time(disk, monkeypatch):
    one = disk(image={"direct": True})
    started = []
    go = Event()

    def fdatasync(_fd):
        started.append(None)
        assert go.wait(DEADLINE_S)

    monkeypatch.setattr(os, "fdatasync", fdatasync)
    for _ in range(4):
        one.driver.queues[0].add([struct.pack("<IIQ", blk.T_FLUSH, 0, 0)], [1])
    one.driver.queues[0].kick()
    end = time.monotonic() + DEADLINE_S
    while len(started) < 4:
        assert time.monotonic() < end
        one.driver.run(0.001)
    # A read overtakes what waits.
    assert one.ask(blk.T_IN, 0, room=512)[0] == blk.S_OK
    go.set()
    assert [request.data() for request, _ in one.wait(4)] == [b"\0"] * 4


@pytest.mark.parametrize(
    ("size", "with_workers"), [(blk.INLINE_MAX, False), (blk.INLINE_MAX + 512, True)]
)
def test_large_copies_go_on_beside_each_other(disk, monkeypatch, size, with_workers):
    one = disk(pattern(SIZE))
    given = []
    real = Workers.submit
    monkeypatch.setattr(Workers, "submit", lambda *args: (given.append(None), real(*args)))
    assert one.ask(blk.T_IN, 0, room=size) == (0, pattern(size))
    assert one.ask(blk.T_OUT, 0, bytes(size)) == (0, b"")
    assert len(given) == 2 * with_workers
    assert one.contents() == bytes(size) + pattern(SIZE)[size:]


def test_serial_number(disk):
    assert disk(serial="abc").ask(blk.T_GET_ID, room=20) == (0, b"abc".ljust(20, b"\0"))


def test_serial_number_of_full_length_into_little_room(disk):
    one = disk(serial="x" * 20)
    assert one.ask(blk.T_GET_ID, room=20) == (0, b"x" * 20)
    assert one.ask(blk.T_GET_ID, room=3) == (0, b"xxx")
    assert one.ask(blk.T_GET_ID) == (0, b"")


def test_discard_and_write_zeroes(disk, kind):
    one = disk(b"x" * SIZE, image={"unmap": True})
    assert one.ask(blk.T_DISCARD, data=segment(8, 8) + segment(24, 8)) == (0, b"")
    assert one.ask(blk.T_WRITE_ZEROES, data=segment(40, 8)) == (0, b"")
    assert one.ask(blk.T_WRITE_ZEROES, data=segment(56, 8, blk.UNMAP)) == (0, b"")
    assert one.ask(blk.T_WRITE_ZEROES, data=segment(0, 0)) == (0, b"")
    want = (b"x" * 4096 + bytes(4096)) * 4
    assert one.contents() == want + b"x" * (SIZE - len(want))


def test_discard_is_a_hint(disk):
    one = disk(b"x" * SIZE)  # discard=ignore
    assert one.ask(blk.T_DISCARD, data=segment(0, 8)) == (0, b"")
    assert one.contents() == b"x" * SIZE


def test_configuration_space(disk):
    config = struct.unpack("<QIIIIBBHIBxHIIIIIB3x", disk().driver.config(0, 60))
    assert config == (
        *(SECTORS, 0, 254, 0, 512, 0, 0, 0, 0, 1, 1),
        *(1 << 22, 32, 1, 1 << 19, 1, 0),
    )


def test_block_sizes(disk):
    one = disk(bytes(SIZE - 512), logical_block_size="4096", physical_block_size="32768")
    config = one.driver.config(0, 60)
    assert struct.unpack_from("<Q", config) == (SECTORS - 8,)  # whole blocks only
    assert struct.unpack_from("<IB", config, 20) == (4096, 3)
    assert one.ask(blk.T_IN, 8, room=4096)[0] == blk.S_OK
    assert one.ask(blk.T_IN, 1, room=4096)[0] == blk.S_IOERR
    assert one.ask(blk.T_IN, 8, room=512)[0] == blk.S_IOERR


def test_block_size_below_that_of_the_image(tmp_path):
    (tmp_path / "x").write_bytes(bytes(SIZE))
    file = BlockFile(BlockConfig("disk", str(tmp_path / "x")), Handover())
    file.alignment = 4096
    with pytest.raises(ConfigError, match="has blocks of 4096; give a multiple"):
        VirtioBlk(EventLoop(), file, BlkConfig("disk", block_size=512))
    file.close()


BASE_FEATURES = F_VERSION_1 | F_EVENT_IDX | F_INDIRECT_DESC
WRITER = blk.F_SEG_MAX | blk.F_BLK_SIZE | blk.F_FLUSH | blk.F_TOPOLOGY | blk.F_CONFIG_WCE
CLEARING = blk.F_DISCARD | blk.F_WRITE_ZEROES


@pytest.mark.parametrize(
    ("image", "properties", "features"),
    [
        ({}, {}, WRITER | CLEARING),
        ({"read_only": True}, {}, WRITER | blk.F_RO),
        ({}, {"config-wce": "off"}, WRITER & ~blk.F_CONFIG_WCE | CLEARING),
        ({}, {"discard": "off", "write-zeroes": "off"}, WRITER),
    ],
)
def test_features(disk, image, properties, features):
    assert disk(image=image, **properties).driver.offered() == BASE_FEATURES | features


def test_read_only(disk, kind):
    one = disk(b"x" * SIZE, image={"read_only": True})
    assert one.ask(blk.T_IN, 0, room=512) == (0, b"x" * 512)
    for request in ((blk.T_OUT, b"y" * 512), (blk.T_DISCARD, segment(0, 8))):
        assert one.ask(request[0], data=request[1])[0] == blk.S_IOERR
    assert one.ask(blk.T_WRITE_ZEROES, data=segment(0, 8))[0] == blk.S_IOERR
    assert one.ask(blk.T_FLUSH)[0] == blk.S_OK
    assert one.contents() == b"x" * SIZE


# ---- when writes are durable ----------------------------------------------------------------


@pytest.fixture
def durable(monkeypatch, python_only):
    """What each write was: True if it was to be durable."""
    seen = []
    real = BlockFile.write

    def write(self, buffers, offset, *, durable=False):
        seen.append(durable)
        real(self, buffers, offset, durable=durable)

    monkeypatch.setattr(BlockFile, "write", write)
    return seen


@pytest.mark.parametrize(
    ("image", "properties", "without", "expected"),
    [
        ({}, {}, 0, False),
        ({"writeback": False}, {}, 0, True),
        ({}, {"write-cache": "off"}, 0, True),
        ({"writeback": False}, {"write-cache": "on"}, 0, False),
        ({}, {}, blk.F_CONFIG_WCE, False),
        # A driver that knows no flush has to be able to rely on each write (5.2.5.2).
        ({}, {}, blk.F_FLUSH, True),
        ({}, {}, blk.F_FLUSH | blk.F_CONFIG_WCE, True),
    ],
)
def test_cache_mode(disk, durable, image, properties, without, expected):
    features = BASE_FEATURES | (WRITER | CLEARING) & ~without
    one = disk(image=image, features=features, **properties)
    assert one.driver.config(32, 1) == bytes([not expected])
    assert one.ask(blk.T_OUT, 0, b"x" * 512)[0] == blk.S_OK
    assert durable == [expected]


def test_the_driver_chooses_the_cache_mode(disk, durable, monkeypatch):
    flushed = []
    real = BlockFile.flush
    monkeypatch.setattr(BlockFile, "flush", lambda self: (flushed.append(None), real(self)))
    one = disk()
    one.driver.write(mmio.CONFIG + 32, 0, 1)
    one.driver.transport.drain()
    one.driver.transport.start()
    # What was written until now is not flushed by the driver any more.
    assert len(flushed) == 1
    one.ask(blk.T_OUT, 0, b"x" * 512)
    one.driver.write(mmio.CONFIG + 32, 1, 1)
    one.ask(blk.T_OUT, 0, b"x" * 512)
    assert durable == [True, False]
    one.driver.write(mmio.CONFIG + 32, 0, 1)
    one.driver.start()
    assert one.driver.config(32, 1) == b"\1"


def test_a_driver_that_never_stops_choosing_does_not_pile_up_flushes(disk, monkeypatch):
    one = disk()
    begun, go = Event(), Event()
    flushed = []

    def flush(_self):
        begun.set()
        assert go.wait(DEADLINE_S)
        flushed.append(None)

    def choose(writeback):
        one.driver.write(mmio.CONFIG + 32, writeback, 1)

    monkeypatch.setattr(BlockFile, "flush", flush)
    choose(0)
    assert begun.wait(DEADLINE_S)
    for _ in range(100):
        choose(1)
        choose(0)
    assert one.driver.device._workers.unfinished <= 1 + blk.WORKERS
    go.set()
    one.driver.transport.drain()
    # At least one has begun after the last choice.
    assert len(flushed) >= 2


@pytest.mark.parametrize("offset", [0, 20, 31, 33, 59, 60, 200])
def test_the_rest_of_the_configuration_space_is_read_only(disk, offset):
    one = disk()
    before = one.driver.config(0, 64)
    one.driver.write(mmio.CONFIG + offset, 0xA5, 1)
    assert one.driver.config(0, 64) == before
