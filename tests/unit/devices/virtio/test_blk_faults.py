"""Disks whose host or driver fails them, and disks over an update."""

import errno
import os
import struct

import pytest
from harness import needs
from harness.virtio_disk import DEADLINE_S, SECTORS, SIZE, Disk, pattern, segment
from hypothesis import given
from hypothesis import strategies as st

from pyvmm.backends.block import BlockFile
from pyvmm.core.threads import Event, spawn
from pyvmm.core.workers import Workers
from pyvmm.cpr.handover import Handover
from pyvmm.devices.virtio import blk, mmio, transport
from pyvmm.errors import HostError, VmStateError

# ---- what the host cannot do ----------------------------------------------------------------


def test_errors_of_the_host(disk, kind, monkeypatch, python_only, tmp_path):
    if kind == "disk":
        needs.disk(tmp_path)
    one = disk()

    def broken(*_arguments):
        raise OSError(errno.EIO, "broken")

    for name in ("preadv", "pwritev", "fdatasync"):
        monkeypatch.setattr(os, name, broken)
    assert one.ask(blk.T_IN, 0, room=512)[0] == blk.S_IOERR
    assert one.errors == [("read", errno.EIO, "report")]
    assert one.ask(blk.T_OUT, 0, b"x" * 512)[0] == blk.S_IOERR
    assert one.errors == [("read", errno.EIO, "report")]  # about once a second
    monkeypatch.setattr(blk, "ERROR_INTERVAL_S", 0)
    assert one.ask(blk.T_OUT, 0, b"x" * 512)[0] == blk.S_IOERR
    assert one.errors[1:] == [("write", errno.EIO, "report")]
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
    assert one.driver.status & transport.S_NEEDS_RESET
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


def test_drain_does_not_wait_for_a_write_that_hangs_on_the_loop(disk, monkeypatch, python_only):
    one = disk()
    entered, go, ended = Event(), Event(), Event()

    def write(_self, _buffers, _offset, **_durable):
        entered.set()
        assert go.wait(DEADLINE_S)

    monkeypatch.setattr(BlockFile, "write", write)
    monkeypatch.setattr(transport, "DRAIN_TIMEOUT_S", 0.01)
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
    with pytest.raises(HostError, match=r"disk disk .'.*'.: unfinished requests: 1"):
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


def test_an_update_does_not_forget_that_a_flush_failed(disk, monkeypatch, tmp_path):
    needs.disk(tmp_path)

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
    file, one.file = one.file, BlockFile(one.config, Handover({("block/disk", 0): one.file.fd}))
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
