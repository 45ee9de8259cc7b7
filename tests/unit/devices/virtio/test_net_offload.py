"""The network device's offloads: the peer is the host's own TCP, behind a real tap."""

import socket
import struct
import subprocess
import time

import pytest
from harness import network

from pyvmm.backends.net.base import HEADER
from pyvmm.backends.net.tap import TapBackend
from pyvmm.core.eventloop import EventLoop
from pyvmm.cpr.handover import Handover
from pyvmm.devices.virtio.net import VirtioNet
from pyvmm.testing.virtio_driver import VirtioDriver

MAC = bytes.fromhex("525400123456")
DEADLINE_S = 20
NEEDS_CSUM = GSO_TCPV4 = 1  # virtio 1.3, 5.1.6
DEFAULT_MSS = 536  # RFC 9293: of a peer that announces none


@pytest.fixture
def namespace():
    """The test's thread is in a network namespace of its own."""
    with network.namespace():
        yield


def test_large_segments_over_a_real_tap(namespace):
    """The kernel's TCP leaves segmentation and checksums to the guest, and takes them from it."""
    loop = EventLoop()
    backend = TapBackend("n0", loop, Handover(), ifname="t0")
    for command in (
        "link set t0 up",
        "addr add 10.9.0.1/24 dev t0",
        "neigh add 10.9.0.2 lladdr 52:54:00:12:34:56 dev t0",
    ):
        subprocess.run(["ip", *command.split()], check=True, capture_output=True)
    driver = VirtioDriver(VirtioNet(loop, backend, MAC), ram_size=64 << 20)
    try:
        driver.start()
        rx, tx = driver.queues
        for _ in range(200):
            rx.add([], [1536])
        rx.kick()
        with socket.socket() as host:
            host.setblocking(False)
            host.connect_ex(("10.9.0.2", 80))
            arrived = segments(driver, rx)
            syn = next(arrived)
            # An answer whose checksum is left to the host: partial, of the pseudo header only.
            tx.add([*answer(syn, flags=0x12)])
            tx.kick()
            driver.run()
            assert not host.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            data = bytes(range(256)) * 80
            assert host.send(data) == len(data)
            found, largest = b"", 0
            while len(found) < len(data):
                header, frame = next(arrived)
                if len(frame) > 54:
                    how, gso_type, _length, gso_size = struct.unpack_from("<BBHH", header)
                    assert how & NEEDS_CSUM
                    if len(frame) > 1514:
                        assert (gso_type, gso_size) == (GSO_TCPV4, DEFAULT_MSS)
                    found += frame[54:]
                    largest = max(largest, len(frame))
                    tx.add([*answer((header, frame), flags=0x10)])
                    tx.kick()
            assert found == data
            assert largest > 1514
    finally:
        driver.close()
        backend.close()
        loop.close()


def segments(driver, rx):
    """Header and frame of each TCP segment that the guest receives."""
    parts = []
    deadline = time.monotonic() + DEADLINE_S
    while time.monotonic() < deadline:
        driver.run(0.05)
        for request, written in rx.reap():
            parts.append(request.data(written))
            if len(parts) == int.from_bytes(parts[0][10:12], "little"):
                whole = b"".join(parts)
                parts.clear()
                frame = whole[HEADER:]
                if frame[12:14] == b"\x08\0" and frame[23] == 6:
                    yield whole[:HEADER], frame


def answer(segment, flags):
    """A header and a segment that acknowledges another, with no checksum of its own."""
    _header, frame = segment
    source, target = frame[26:30], frame[30:34]
    port, own_port, sequence, acknowledged = struct.unpack_from(">HHII", frame, 34)
    size = len(frame) - 54 if len(frame) > 54 and not frame[47] & 2 else 1
    ip = struct.pack(">BBHHHBBH", 0x45, 0, 40, 0, 0, 64, 6, 0) + target + source
    ip = ip[:10] + struct.pack(">H", ~ones_sum(ip) & 0xFFFF) + ip[12:]
    pseudo = ones_sum(target + source + struct.pack(">BBH", 0, 6, 20))
    own = 1000 if flags & 2 else acknowledged
    tcp = struct.pack(
        ">HHIIBBHHH",
        own_port,
        port,
        own,
        sequence + size & 0xFFFFFFFF,
        0x50,
        flags,
        65535,
        pseudo,
        0,
    )
    header = struct.pack("<BBHHHHH", 1, 0, 0, 0, 34, 16, 0)
    return header, frame[6:12] + frame[:6] + b"\x08\0" + ip + tcp


def ones_sum(data):
    total = sum(struct.unpack(f">{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return total
