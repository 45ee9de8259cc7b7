"""Which frames native code gives to a driver that has taken some offloads, or none, beside the
same by Python alone."""

import socket

import pytest

from pyvmm.backends.net.base import HEADER, MAX_FRAME, NetBackend
from pyvmm.cpr.handover import Handover
from pyvmm.devices.virtio import fastpath
from pyvmm.devices.virtio.net import (
    F_GUEST_CSUM,
    F_GUEST_TSO4,
    GSO_TCPV4,
    GUEST_OFFLOADS,
    HDR_NEEDS_CSUM,
    VirtioNet,
)

MAC = bytes.fromhex("525400123456")
DATA_VALID = 2  # a hint (virtio 1.3, 5.1.6.4.1)


class PacketBackend(NetBackend):
    """A socket that keeps frames apart, with headers before them, as a tap does."""

    kind = "packets"
    has_offloads = True

    def __init__(self, loop, native):
        super().__init__("n0", loop, Handover())
        self.ours, self.peer = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.ours.setblocking(False)
        self.native = native
        self._buffer = memoryview(bytearray(HEADER + MAX_FRAME))
        self._held = None

    def peek(self):
        if self._held is None:
            try:
                self._held = self._buffer[: self.ours.recv_into(self._buffer)]
            except BlockingIOError:
                return None
        return self._held

    def consume(self):
        self._held = None

    def pull(self, receive):
        if not self.native or self._held is not None:
            return 0
        spent, size = receive(self.ours.fileno(), self._buffer)
        if size:
            self._held = self._buffer[:size]
        return spent

    def watch(self, wanted):
        pass

    def start(self):
        pass

    def close(self):
        self.ours.close()
        self.peer.close()


def frame(number, flags=0, gso=0):
    return bytes([flags, gso]) + bytes(10) + MAC + bytes([number]) * 60


FRAMES = [
    frame(0),
    frame(1, HDR_NEEDS_CSUM),
    frame(2),
    frame(3, DATA_VALID),
    frame(4, HDR_NEEDS_CSUM, GSO_TCPV4),
    frame(5),
    frame(6, 0, 0x7F),
    frame(7),
]


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize(
    ("accepted", "numbers"),
    [
        (0, [0, 2, 3, 5, 7]),
        (F_GUEST_CSUM, [0, 1, 2, 3, 5, 7]),
        (F_GUEST_CSUM | F_GUEST_TSO4, [0, 1, 2, 3, 4, 5, 7]),
    ],
)
def test_driver_gets_what_it_can_do(loop, plug, monkeypatch, accepted, numbers, native):
    calls = []
    real = fastpath.receive

    def receive(*arguments, **options):
        calls.append(options["plain"])
        return real(*arguments, **options)

    monkeypatch.setattr(fastpath, "receive", receive)
    backend = PacketBackend(loop, native)
    try:
        driver = plug(VirtioNet(loop, backend, MAC))
        driver.start(driver.offered() & ~(GUEST_OFFLOADS & ~accepted))
        for _ in range(16):
            driver.queues[0].add([], [1500])
        for data in FRAMES:
            backend.peer.send(data)
        driver.queues[0].kick()
        driver.run()
        found = [request.data(size) for request, size in driver.queues[0].reap()]
        assert [data[-1] for data in found] == numbers
        assert [data[12:] for data in found] == [FRAMES[number][12:] for number in numbers]
        assert bool(calls) == native
        assert all(calls)
        assert not accepted & F_GUEST_CSUM or [data[:2] for data in found] == [
            FRAMES[number][:2] for number in numbers
        ]
        assert accepted or not any(data[0] or data[1] for data in found)
    finally:
        backend.close()
