"""The block device, driven as a guest drives it: every request, and what evil guests do."""

import errno
import os
import struct
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyvmm.backends.block import BlockFile
from pyvmm.backends.block_config import BlkConfig, BlockConfig
from pyvmm.core.eventloop import EventLoop
from pyvmm.core.threads import Event, spawn
from pyvmm.core.workers import Workers
from pyvmm.cpr.fdstore import FdStore
from pyvmm.devices.virtio import blk, mmio
from pyvmm.devices.virtio.blk import VirtioBlk
from pyvmm.devices.virtio.device import F_EVENT_IDX, F_INDIRECT_DESC, F_VERSION_1
from pyvmm.errors import ConfigError, HostError, VmStateError
from pyvmm.testing.virtio_driver import VirtioDriver

SIZE = 1 << 20
SECTORS = SIZE // 512
DEADLINE_S = 20


class Disk:
    """A device over an image, and a driver for it.

    :param image: attributes of the :class:`BlockConfig`
    :param properties: of the ``-device``
    """

    def __init__(self, path, image=None, features=None, **properties):
        self.loop = EventLoop()
        self.config = BlockConfig("disk", str(path))
        for key, value in (image or {}).items():
            setattr(self.config, key, value)
        self.file = BlockFile(self.config, FdStore())
        self.properties = {"drive": "disk", **properties}
        self.errors = []
        self.driver = VirtioDriver(self.device())
        self.driver.start(features)

    def device(self):
        def on_error(operation, error):
            self.errors.append((operation, error.errno))

        return VirtioBlk(self.loop, self.file, BlkConfig(self.properties), on_error)

    def ask(self, kind, sector=0, data=b"", room=0, *, split=(), indirect=False):
        """One request: its status and what was read. ``split``: lengths of the buffers."""
        header = struct.pack("<IIQ", kind, 0, sector)
        return self.raw([header, data] if data else [header], [room, 1] if room else [1], indirect)

    def raw(self, readable, writable, indirect=False):
        request = self.driver.queues[0].add(readable, writable, indirect=indirect)
        self.driver.queues[0].kick()
        ((done, written),) = self.wait(1)
        assert done is request
        assert written == sum(length for _, length in request.writable)
        data = request.data()
        return data[-1], data[:-1]

    def wait(self, count):
        """What the device returns, ``count`` requests of it."""
        found = []
        end = time.monotonic() + DEADLINE_S
        while len(found) < count:
            assert time.monotonic() < end, f"{len(found)} of {count} requests came back"
            self.driver.run(0.001)
            found += self.driver.queues[0].reap()
        return found

    def contents(self):
        with open(self.config.filename, "rb") as file:
            return file.read()

    def close(self):
        self.driver.close()
        self.file.close()
        self.loop.close()


@pytest.fixture(params=["disk", "tmpfs", "direct"])
def kind(request):
    """Where the image is: what is done on the loop and what by workers differs."""
    return request.param


@pytest.fixture
def disk(tmp_path, request):
    """Makes a disk of 1 MiB: ``disk(contents, image={...}, **properties)``."""
    made = []
    kind = request.getfixturevalue("kind") if "kind" in request.fixturenames else "disk"

    def make(contents=None, **arguments):
        path = tmp_path / "disk.img"
        if kind == "tmpfs":
            path = f"/dev/shm/pyvmm-{os.getpid()}-{tmp_path.name}.img"
        if kind == "direct":
            arguments["image"] = {"direct": True, **arguments.get("image", {})}
        with open(path, "wb") as file:
            file.write(bytes(SIZE) if contents is None else contents)
        made.append(Disk(path, **arguments))
        return made[-1]

    yield make
    for one in made:
        one.close()
        os.unlink(one.config.filename)


def pattern(size, seed=1):
    return bytes((at * 7 + at // 512 * 13 + seed) & 0xFF for at in range(size))


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


def segment(sector, count, flags=0):
    return struct.pack("<QII", sector, count, flags)


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
    file = BlockFile(BlockConfig("disk", str(tmp_path / "x")), FdStore())
    file.alignment = 4096
    with pytest.raises(ConfigError, match="has blocks of 4096; give a multiple"):
        VirtioBlk(EventLoop(), file, BlkConfig({"drive": "disk", "logical_block_size": "512"}))
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
def durable(monkeypatch):
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


# ---- what the host cannot do ----------------------------------------------------------------


def test_errors_of_the_host(disk, kind, monkeypatch):
    one = disk()

    def broken(*_arguments):
        raise OSError(errno.EIO, "broken")

    for name in ("preadv", "pwritev", "fdatasync"):
        monkeypatch.setattr(os, name, broken)
    assert one.ask(blk.T_IN, 0, room=512)[0] == blk.S_IOERR
    assert one.errors == [("read", errno.EIO)]
    assert one.ask(blk.T_OUT, 0, b"x" * 512)[0] == blk.S_IOERR
    assert one.errors == [("read", errno.EIO)]  # about once a second
    monkeypatch.setattr(blk, "ERROR_INTERVAL_S", 0)
    assert one.ask(blk.T_OUT, 0, b"x" * 512)[0] == blk.S_IOERR
    assert one.errors[1:] == [("write", errno.EIO)]
    # Memory has nothing to flush.
    assert one.ask(blk.T_FLUSH)[0] == (blk.S_OK if kind == "tmpfs" else blk.S_IOERR)
    monkeypatch.undo()
    assert one.ask(blk.T_IN, 0, room=512)[0] == blk.S_OK


def test_a_bug_does_not_leave_the_guest_waiting(disk, monkeypatch, capsys):
    one = disk(image={"direct": True})
    monkeypatch.setattr(BlockFile, "read", lambda *_: 1 // 0)
    assert one.ask(blk.T_IN, 0, room=512)[0] == blk.S_IOERR
    assert "ZeroDivisionError" in capsys.readouterr().err


# ---- what no driver should do ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        ((blk.T_IN, SECTORS, b"", 512), blk.S_IOERR),
        ((blk.T_IN, SECTORS - 1, b"", 1024), blk.S_IOERR),
        ((blk.T_IN, (1 << 64) - 1, b"", 512), blk.S_IOERR),
        ((blk.T_IN, 1 << 55, b"", 512), blk.S_IOERR),
        ((blk.T_IN, 0, b"", 511), blk.S_IOERR),
        ((blk.T_IN, 0, b"", 0), blk.S_OK),
        ((blk.T_OUT, SECTORS, b"y" * 512, 0), blk.S_IOERR),
        ((blk.T_OUT, (1 << 64) - 1, b"y" * 512, 0), blk.S_IOERR),
        ((blk.T_OUT, 0, b"y" * 100, 0), blk.S_IOERR),
        ((blk.T_OUT, 0, b"", 0), blk.S_OK),
        ((2, 0, b"", 0), blk.S_UNSUPP),  # VIRTIO_BLK_T_SCSI_CMD
        ((14, 0, segment(0, 8), 0), blk.S_UNSUPP),  # VIRTIO_BLK_T_SECURE_ERASE
        ((0xFFFFFFFF, 0, b"", 512), blk.S_UNSUPP),
        ((blk.T_DISCARD, 0, b"", 0), blk.S_IOERR),
        ((blk.T_DISCARD, 0, segment(0, 8)[:-1], 0), blk.S_IOERR),
        ((blk.T_DISCARD, 0, segment(0, 8) * 33, 0), blk.S_IOERR),
        ((blk.T_DISCARD, 0, segment(0, 8, 1), 0), blk.S_UNSUPP),
        ((blk.T_DISCARD, 0, segment(0, 8, 2), 0), blk.S_UNSUPP),
        ((blk.T_DISCARD, 0, segment(SECTORS, 1), 0), blk.S_IOERR),
        ((blk.T_DISCARD, 0, segment((1 << 64) - 1, 0xFFFFFFFF), 0), blk.S_IOERR),
        ((blk.T_WRITE_ZEROES, 0, segment(0, 8, 2), 0), blk.S_UNSUPP),
        ((blk.T_WRITE_ZEROES, 0, segment(0, 0xFFFFFFFF), 0), blk.S_IOERR),
        ((blk.T_WRITE_ZEROES, 0, segment(0, 8) * 2, 0), blk.S_IOERR),
        # Nothing is done of a list with one that cannot be.
        ((blk.T_DISCARD, 0, segment(0, 8) + segment(SECTORS, 8), 0), blk.S_IOERR),
    ],
)
def test_requests_that_cannot_be(disk, kind, request_, status):
    one = disk(b"x" * SIZE, image={"unmap": True})
    code, sector, data, room = request_
    assert one.ask(code, sector, data, room)[0] == status
    assert one.contents() == b"x" * SIZE
    assert one.ask(blk.T_IN, 0, room=512) == (0, b"x" * 512)


@pytest.mark.parametrize(
    ("readable", "writable"),
    [([b"x" * 15], [1]), ([], [1]), ([struct.pack("<IIQ", 0, 0, 0)], [])],
)
def test_no_header_or_no_status(disk, readable, writable):
    one = disk()
    one.driver.queues[0].add(readable, writable)
    one.driver.queues[0].kick()
    one.driver.run()
    assert one.driver.status & mmio.S_NEEDS_RESET
    assert one.driver.queues[0].reap() == []
    one.driver.start()
    assert one.ask(blk.T_IN, 0, room=512)[0] == blk.S_OK


def test_a_request_that_is_the_whole_of_memory(disk, kind):
    one = disk()
    gpa, size = 0x100000, 0x400000
    header = struct.pack("<IIQ", blk.T_IN, 0, 0)
    assert one.raw([header], [(gpa, size), 1])[0] == blk.S_IOERR


def test_reset_waits_for_requests_under_way(disk, monkeypatch):
    one = disk(image={"direct": True})
    data = pattern(4096)
    one.ask(blk.T_OUT, 0, data)
    entered, go = Event(), Event()
    real = BlockFile.read

    def read(self, buffers, offset):
        entered.set()
        assert go.wait(DEADLINE_S)
        real(self, buffers, offset)

    monkeypatch.setattr(BlockFile, "read", read)
    queue = one.driver.queues[0]
    request = queue.add([struct.pack("<IIQ", blk.T_IN, 0, 0)], [4096, 1])
    queue.kick()
    one.driver.run()
    assert entered.wait(DEADLINE_S)
    real_wait = Workers.wait

    def wait(self, timeout_s):
        assert self.unfinished == 1
        go.set()
        monkeypatch.undo()
        return real_wait(self, timeout_s)

    monkeypatch.setattr(Workers, "wait", wait)
    one.driver.write(mmio.STATUS, 0)
    assert go.is_set()
    # It has ended, but the driver that asked is gone.
    assert request.data(4096) == data
    assert queue.reap() == []
    one.driver.start()
    assert one.ask(blk.T_IN, 0, room=4096) == (0, data)


def test_reset_of_a_disk_that_hangs_holds_up_its_driver_and_no_more(disk, monkeypatch):
    """The guest's reset ends when the host's request does: it is no error of the VMM's."""
    one = disk(image={"direct": True})
    go, waits = Event(), []
    real = Workers.wait
    monkeypatch.setattr(BlockFile, "flush", lambda _self: go.wait(DEADLINE_S))
    monkeypatch.setattr(blk, "DRAIN_TIMEOUT_S", 0.01)

    def wait(self, timeout_s):
        waits.append(timeout_s)
        if len(waits) == 3:
            go.set()
            timeout_s = DEADLINE_S
        return real(self, timeout_s)

    monkeypatch.setattr(Workers, "wait", wait)
    queue = one.driver.queues[0]
    queue.add([struct.pack("<IIQ", blk.T_FLUSH, 0, 0)], [1])
    queue.kick()
    one.driver.run()
    one.driver.write(mmio.STATUS, 0)
    assert len(waits) == 3
    monkeypatch.undo()
    one.driver.start()
    assert one.ask(blk.T_IN, 0, room=512)[0] == 0


def test_drain_does_not_wait_for_a_write_that_hangs_on_the_loop(disk, monkeypatch):
    one = disk()
    entered, go, ended = Event(), Event(), Event()

    def write(_self, _buffers, _offset, **_durable):
        entered.set()
        assert go.wait(DEADLINE_S)

    monkeypatch.setattr(BlockFile, "write", write)
    monkeypatch.setattr(mmio, "DRAIN_TIMEOUT_S", 0.01)
    queue = one.driver.queues[0]
    queue.add([struct.pack("<IIQ", blk.T_OUT, 0, 0), bytes(512)], [1])
    queue.kick()
    failures = []
    spawn(lambda: (one.driver.run(), ended.set()), failures.append)
    assert entered.wait(DEADLINE_S)
    with pytest.raises(HostError, match="does not come to its end"):
        one.driver.transport.drain()
    go.set()
    assert ended.wait(DEADLINE_S)
    assert failures == []
    one.driver.transport.drain()
    one.driver.transport.start()
    assert len(one.wait(1)) == 1


def test_drain_does_not_wait_for_ever(disk, monkeypatch):
    one = disk(image={"direct": True})
    go = Event()
    monkeypatch.setattr(BlockFile, "flush", lambda _self: go.wait(DEADLINE_S))
    monkeypatch.setattr(blk, "DRAIN_TIMEOUT_S", 0.01)
    one.driver.queues[0].add([struct.pack("<IIQ", blk.T_FLUSH, 0, 0)], [1])
    one.driver.queues[0].kick()
    one.driver.run()
    with pytest.raises(HostError, match=r"1 requests to '.*' do not end"):
        one.driver.transport.drain()
    go.set()
    monkeypatch.undo()
    one.driver.transport.start()
    assert one.wait(1)[0][0].data() == b"\0"


# ---- live update ----------------------------------------------------------------------------


def test_an_update_loses_nothing_and_repeats_nothing(disk, kind):
    one = disk()
    queue = one.driver.queues[0]
    one.driver.write(mmio.CONFIG + 32, 0, 1)
    for sector in range(0, 80, 8):
        header = struct.pack("<IIQ", blk.T_OUT, 0, sector)
        queue.add([header + pattern(4096, sector)], [1])
        if sector == 40:
            queue.kick()
            one.driver.run()
    one.driver.update(one.device())  # drains, saves, loads, starts: the kick was lost
    assert len(one.wait(10)) == 10
    assert one.contents()[: 80 * 512] == b"".join(pattern(4096, at) for at in range(0, 80, 8))
    assert one.driver.config(32, 1) == b"\0"
    assert one.ask(blk.T_IN, 8, room=4096) == (0, pattern(4096, 8))


def test_an_update_does_not_forget_that_a_flush_failed(disk, monkeypatch):
    def broken(_fd):
        raise OSError(errno.EIO, "broken")

    one = disk()
    with monkeypatch.context() as patch:
        patch.setattr(os, "fdatasync", broken)
        assert one.ask(blk.T_FLUSH)[0] == blk.S_IOERR
    saved = one.driver.encode()
    one.file.lost = 0
    one.driver.decode(saved)
    one.driver.transport.start()
    assert one.ask(blk.T_FLUSH)[0] == blk.S_IOERR


@pytest.mark.parametrize(
    ("field", "value", "problem"),
    [
        ("capacity", SECTORS + 1, "capacity 2049: the image has 2048 sectors"),
        ("capacity", (1 << 64) - 1, "the image has 2048 sectors"),
        ("block_size", 0, "block_size 0: the image has blocks of 512 bytes"),
        ("block_size", 1000, "block_size 1000"),
        ("block_size", 1 << 31, "block_size 2147483648"),
        ("lost", (1 << 32) - 1, "flush_error 4294967295 is no error number"),
    ],
)
def test_states_that_cannot_be(disk, field, value, problem):
    one = disk()
    owner = one.file if field == "lost" else one.driver.device
    before = getattr(owner, field)
    setattr(owner, field, value)
    data = one.driver.encode()
    setattr(owner, field, before)
    with pytest.raises(VmStateError, match=problem):
        one.driver.decode(data)
    one.driver.transport.start()


def test_a_larger_image_is_no_larger_disk_before_the_next_start(disk):
    one = disk()
    os.truncate(one.config.filename, 2 * SIZE)
    file, one.file = one.file, BlockFile(one.config, FdStore(one.file._fds.kept()))
    assert one.file.size == 2 * SIZE
    one.driver.update(one.device())
    assert one.driver.config(0, 8) == struct.pack("<Q", SECTORS)
    assert one.ask(blk.T_IN, SECTORS, room=512)[0] == blk.S_IOERR
    assert file.fd == one.file.fd


# ---- anything at all ------------------------------------------------------------------------

sectors = st.integers(0, SECTORS + 2) | st.integers(0, (1 << 64) - 1)
bodies = st.binary(max_size=1100) | st.lists(
    st.tuples(sectors, st.integers(0, 20) | st.integers(0, 0xFFFFFFFF), st.integers(0, 3)),
    max_size=4,
).map(lambda items: b"".join(segment(*item) for item in items))
requests = st.tuples(st.integers(0, 16), sectors, bodies, st.integers(0, 1100), st.booleans())


@given(st.lists(requests, max_size=6), st.booleans())
def test_any_requests_come_back_and_change_only_what_they_may(contents, direct):
    path = f"/dev/shm/pyvmm-{os.getpid()}-any.img"
    model = bytearray(b"x" * SIZE)
    with open(path, "wb") as file:
        file.write(model)
    one = Disk(path, {"direct": direct, "unmap": True})
    try:
        for code, sector, data, room, indirect in contents:
            status, read = one.ask(code, sector, data, room, indirect=indirect)
            inside = sector * 512 + max(len(data), room) <= SIZE
            if code == blk.T_OUT:
                assert (status == blk.S_OK) == (
                    len(data) % 512 == 0 and sector * 512 + len(data) <= SIZE
                )
                if status == blk.S_OK:
                    model[sector * 512 : sector * 512 + len(data)] = data
            elif code == blk.T_IN and status == blk.S_OK:
                assert inside or room + sector * 512 <= SIZE
                assert read == model[sector * 512 : sector * 512 + room]
            elif code in (blk.T_DISCARD, blk.T_WRITE_ZEROES) and status == blk.S_OK:
                for start, count, _ in struct.iter_unpack("<QII", data):
                    model[start * 512 : (start + count) * 512] = bytes(count * 512)
            elif code not in (0, 1, 4, 8, 11, 13):
                assert status == blk.S_UNSUPP
        assert one.contents() == model
    finally:
        one.close()
        os.unlink(path)
