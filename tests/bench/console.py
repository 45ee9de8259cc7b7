"""Console output: what a guest that writes as fast as it can brings to a Unix socket, beside
QEMU's microvm.

By the serial port, byte by byte as its driver must, and by a virtio console: large buffers, as a
program's writes to a port are, small ones, several at a time, and 16 bytes one at a time, as Linux
writes to a virtio console.

With the serial port each byte is an exit, two with a driver that looks at LSR each time, which
native code answers: what is left is the kernel's. Fewer exits are what a virtio console is for.
"""

import tempfile
import time
from pathlib import Path

from harness.stream import Peer

from bench.beside import beside
from bench.machines import BenchError
from bench.spawn import TIMEOUT_S

WARM_S, DURATION_S = 0.1, 0.5

LIMIT = 1.0

#: name, the guest program's words, unit.
VARIANTS = (
    ("serial", "serial", "KB/s"),
    ("virtio 4 KiB", "virtio-console mode=flood size=4096", "MB/s"),
    ("virtio 64 bytes", "virtio-console mode=flood size=64", "MB/s"),
    ("virtio 16 bytes, one by one", "virtio-console mode=flood size=16 spin", "KB/s"),
)


def bench_console(plan):
    """Bytes a second, and how many times as many QEMU moves."""
    for name, words, unit in VARIANTS[:3] if plan.quick else VARIANTS:
        scale = 1e3 if unit == "KB/s" else 1e6

        def measure(kind, words=words, scale=scale):
            return _run(kind, words) / scale

        yield from beside(f"console {name}", unit, plan, measure, LIMIT)


def _run(kind, words):
    with (
        tempfile.TemporaryDirectory(prefix="pyvmm-bench-") as folder,
        Peer(Path(folder), "con") as peer,
    ):
        options = ["-chardev", peer.option]
        if words == "serial":
            options += ["-serial", "chardev:con"]
        else:
            options += ["-device", "virtio-serial-device", "-device", "virtconsole,chardev=con"]
        # The guest tells how far it is with every step, which shall not happen here.
        append = f"{words} step=1000000"
        own = {"append": append, "monitor": False, "serial": words != "serial"}
        with kind(*options, folder=folder, **own):
            return _rate(peer.stream)


def _rate(stream):
    """Bytes a second that arrive."""
    stream.settimeout(TIMEOUT_S)
    buffer = bytearray(1 << 20)
    if not stream.recv_into(buffer):
        raise BenchError("the console was closed")
    start = time.monotonic() + WARM_S
    count = 0
    while (now := time.monotonic()) < start + DURATION_S:
        size = stream.recv_into(buffer)
        if not size:
            raise BenchError("the console was closed")
        if now >= start:
            count += size
    return count / (now - start)
