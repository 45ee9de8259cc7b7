"""What follows an error of the host: the guest is told, or stops and finds it done later."""

import errno
import struct

import pytest
from harness import needs

from pyvmm.devices.virtio import blk, transport
from pyvmm.errors import VmStateError

SECTOR = 512

pytestmark = pytest.mark.usefixtures("python_only")


class Host:
    """Makes the image's calls fail for as long as ``problem`` says so."""

    def __init__(self, disk, monkeypatch, problem=errno.ENOSPC):
        self.problem = problem
        for name in ("read", "read_cached", "write", "flush"):
            call = getattr(disk.file, name)
            monkeypatch.setattr(disk.file, name, self.failing(call))

    def failing(self, call):
        def instead(*arguments, **options):
            if self.problem:
                raise OSError(self.problem, "injected")
            return call(*arguments, **options)

        return instead


def add(disk, kind, sector=0, data=b"", room=0):
    header = struct.pack("<IIQ", kind, 0, sector)
    readable = [header, data] if data else [header]
    request = disk.driver.queues[0].add(readable, [room, 1] if room else [1])
    disk.driver.queues[0].kick()
    return request


def stop(disk, count):
    """Serve until ``count`` requests wait, and stop as the machine does."""
    for _ in range(1000):
        disk.driver.run(0.01)
        if len(disk.driver.device.retries) == count:
            break
    assert len(disk.driver.device.retries) == count
    disk.driver.transport.drain()
    assert disk.driver.queues[0].reap() == []


@pytest.mark.parametrize(
    ("policy", "kind", "problem", "status", "action"),
    [
        ({}, blk.T_OUT, errno.EIO, blk.S_IOERR, "report"),
        ({"werror": "report"}, blk.T_OUT, errno.ENOSPC, blk.S_IOERR, "report"),
        ({"werror": "ignore"}, blk.T_OUT, errno.ENOSPC, blk.S_OK, "ignore"),
        ({"werror": "stop"}, blk.T_IN, errno.EIO, blk.S_IOERR, "report"),
        ({"rerror": "ignore"}, blk.T_IN, errno.EIO, blk.S_OK, "ignore"),
    ],
)
def test_guest_is_told(disk, kind, monkeypatch, policy, problem, status, action):
    one = disk(**policy)
    Host(one, monkeypatch, problem)
    asked = {"room": 512} if kind == blk.T_IN else {"data": b"x" * 512}
    assert one.ask(kind, 0, **asked)[0] == status
    assert one.errors == [("read" if kind == blk.T_IN else "write", problem, action)]
    assert one.driver.device.io_status == "ok"


@pytest.mark.parametrize("where", ["disk", "tmpfs", "direct"])
def test_guest_stops_and_finds_it_done(disk, request, monkeypatch, where):
    one = disk(image={"direct": True} if where == "direct" else {})
    host = Host(one, monkeypatch)
    requests = [add(one, blk.T_OUT, 8 * at, bytes([at + 1]) * 4096) for at in range(3)]
    stop(one, 3)
    assert one.errors == [("write", errno.ENOSPC, "stop")]
    assert one.driver.device.properties()["io-status"] == "nospace"
    # Still no space: the guest stops once more.
    one.driver.transport.start()
    stop(one, 3)
    host.problem = 0
    one.driver.transport.start()
    done = one.wait(3)
    assert {request for request, _ in done} == set(requests)
    assert all(request.data()[-1] == blk.S_OK for request in requests)
    assert one.contents()[: 3 * 4096] == b"".join(bytes([at + 1]) * 4096 for at in range(3))
    assert one.driver.device.io_status == "ok"


def test_requests_that_came_later_are_not_held_up(disk, monkeypatch):
    one = disk(rerror="stop")
    host = Host(one, monkeypatch, errno.EIO)
    late = add(one, blk.T_IN, room=512)
    stop(one, 1)
    host.problem = 0
    other = add(one, blk.T_OUT, 0, b"n" * 512)
    one.driver.transport.start()
    assert {request for request, _ in one.wait(2)} == {late, other}
    assert late.data()[-1] == other.data()[-1] == blk.S_OK


def test_update_of_a_guest_that_stopped(disk, monkeypatch):
    one = disk(werror="stop")
    host = Host(one, monkeypatch, errno.EIO)
    requests = [add(one, blk.T_OUT, at, b"u" * 512) for at in range(2)]
    stop(one, 2)

    def meanwhile():
        host.problem = 0

    one.driver.update(one.device(), meanwhile)
    assert {request for request, _ in one.wait(2)} == set(requests)
    assert one.contents()[:1024] == b"u" * 1024


def test_state_without_such_requests_is_as_before(disk):
    one = disk()
    assert b"retries" not in one.driver.encode()


def test_request_that_waits_twice_is_no_state(disk, monkeypatch):
    one = disk(werror="stop")
    Host(one, monkeypatch)
    add(one, blk.T_OUT, 0, b"u" * 512)
    stop(one, 1)
    one.driver.device.retries *= 2
    with pytest.raises(VmStateError, match="wait twice"):
        one.driver.decode(one.driver.encode())


def test_reset_forgets_them(disk, monkeypatch):
    one = disk(werror="stop")
    host = Host(one, monkeypatch)
    add(one, blk.T_OUT, 0, b"u" * 512)
    stop(one, 1)
    one.driver.transport.start()
    one.driver.start()
    host.problem = 0
    assert one.ask(blk.T_OUT, 1, b"v" * 512)[0] == blk.S_OK
    assert one.contents()[:1024] == bytes(512) + b"v" * 512


def test_chain_that_the_guest_broke_meanwhile(disk, monkeypatch):
    one = disk(werror="stop")
    Host(one, monkeypatch)
    add(one, blk.T_OUT, 0, b"u" * 512)
    stop(one, 1)
    queue = one.driver.queues[0]
    one.driver.memory.write(queue.desc, b"\xff" * 16 * queue.size)
    one.driver.transport.start()
    one.driver.run(0.1)
    assert one.driver.status & transport.S_NEEDS_RESET


def test_flush_that_failed_for_good_does_not_stop_the_guest_for_ever(disk, monkeypatch, tmp_path):
    needs.disk(tmp_path)
    one = disk(werror="stop")

    def lose(_fd):
        raise OSError(errno.ENOSPC, "injected")

    monkeypatch.setattr("os.fdatasync", lose)
    assert one.ask(blk.T_FLUSH)[0] == blk.S_IOERR
    assert one.errors == [("write", errno.ENOSPC, "report")]
