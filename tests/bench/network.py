"""Network throughput and round trip on a tap: the built-in guest's driver, beside QEMU's microvm.

The tap is in a network namespace of its own, so root only. Frames go by as they are: what a
guest sends is counted by the interface, what the host sends comes from a packet socket and the
guest answers every so many of them, so that none is dropped. The frames of 64 KiB are what
segmentation offload makes of a stream; the guest's receive buffers are as small as Linux's.
"""

import contextlib
import ctypes
import os
import socket
import struct
import subprocess
import time

from bench.beside import beside
from bench.machines import BenchError
from bench.report import Result
from bench.spawn import TIMEOUT_S

WARM_S, DURATION_S = 0.1, 0.5
CLONE_NEWNET = 0x40000000
TAP = "tap0"
MTU = 65521  # the largest of a tap
TYPE_TEST = 0x88B5  # IEEE 802: for local experiments
ADDRESSES = bytes.fromhex("525400123456020000000001")
BUFFER = 1536
TRIPS = 200
#: A network device on the tap.
DEVICE = (
    *("-netdev", f"tap,id=n0,ifname={TAP},script=no,downscript=no"),
    *("-device", "virtio-net-device,netdev=n0,mac=52:54:00:12:34:56"),
)

#: name, bytes of a frame with its Ethernet header, frames that are under way to the guest.
SIZES = (("64 KiB", 65535, 32), ("1514 bytes", 1514, 256))
LIMIT = 1.25


def bench_network(plan):
    """Gigabits a second each way, microseconds of a round trip."""
    if os.geteuid():
        yield Result("net", [], "Gb/s", note="left out: needs root, for a network namespace")
        return
    with tap():
        for name, size, window in SIZES[:1] if plan.quick else SIZES:

            def send(kind, size=size):
                return _send(kind, size)

            def receive(kind, size=size, window=window):
                return _receive(kind, size, window)

            yield from beside(f"net {name} to host", "Gb/s", plan, send, LIMIT)
            yield from beside(f"net {name} to guest", "Gb/s", plan, receive, LIMIT)
        yield from beside("net round trip", "us", plan, _round_trip, less_is_better=True)


@contextlib.contextmanager
def tap():
    """This thread, and what it starts, is in a network namespace with a tap."""
    libc = ctypes.CDLL(None, use_errno=True)
    before = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        if libc.unshare(CLONE_NEWNET):
            raise BenchError(f"no network namespace: {os.strerror(ctypes.get_errno())}")
        try:
            for command in (
                f"tuntap add {TAP} mode tap",
                f"link set {TAP} up mtu {MTU}",
            ):
                subprocess.run(["ip", *command.split()], check=True, capture_output=True)
            yield
        finally:
            libc.setns(before, CLONE_NEWNET)
    except subprocess.CalledProcessError as error:
        raise BenchError(f"no tap: {error.stderr.decode().strip()}") from None
    finally:
        os.close(before)


@contextlib.contextmanager
def _guest(kind, words):
    """The guest's program is ready; nothing else uses the tap."""
    append = f"virtio-net buffer={BUFFER} {words}"
    with kind(*DEVICE, append=append, monitor=False) as vmm:
        vmm.expect("virtio-net ready")
        yield vmm


def _send(kind, size):
    with _guest(kind, f"mode=flood size={size}"):
        time.sleep(WARM_S)
        start, before = time.monotonic(), _received()
        time.sleep(DURATION_S)
        return (_received() - before) * 8e-9 / (time.monotonic() - start)


def _received():
    """Bytes that the host has received on the tap."""
    with open("/proc/thread-self/net/dev", encoding="ascii") as file:
        for line in file:
            name, _, numbers = line.partition(":")
            if name.strip() == TAP:
                return int(numbers.split()[0])
    raise BenchError(f"there is no {TAP}")


def _receive(kind, size, window):
    step = window // 4
    with _guest(kind, f"mode=sink step={step}"), packets() as link:
        data = frame(size)
        start, counted, sent, taken = None, 0, 0, 0
        while (now := time.monotonic()) - (start or now) < DURATION_S:
            if start is None and sent and taken >= 8 * window:
                start, counted = now, taken
            while sent < taken + window:
                link.send(data)
                sent += 1
            (taken,) = struct.unpack_from("<Q", link.recv(2048), 14)
        return (taken - counted) * size * 8e-9 / (now - start)


def _round_trip(kind):
    with _guest(kind, "step=1000000"), packets() as link:
        data = frame(60)
        for number in range(2 * TRIPS):
            if number == TRIPS:
                start = time.monotonic()
            link.send(data)
            link.recv(2048)
        return (time.monotonic() - start) * 1e6 / TRIPS


def frame(size):
    """A frame for the guest, of ``size`` bytes."""
    return ADDRESSES + struct.pack(">H", TYPE_TEST) + bytes(size - 14)


def packets():
    """A socket for frames of that type on the tap."""
    link = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(TYPE_TEST))
    link.bind((TAP, TYPE_TEST))
    link.settimeout(TIMEOUT_S)
    return link
