"""Disk throughput: the built-in guest's driver on an image in tmpfs, beside QEMU's microvm."""

import os
import shutil
import tempfile
from pathlib import Path

from bench.beside import beside
from bench.machines import MIB, BenchError

IMAGE = 256 * MIB
DURATION_MS = 500

#: name, the guest program's words, bytes of a request, unit, most that QEMU may be ahead.
VARIANTS = (
    ("read 4 KiB depth 1", "read depth=1", 4096, "IOPS", 2.0),
    ("read 4 KiB depth 32", "read depth=32", 4096, "IOPS", 2.0),
    ("write 4 KiB depth 32", "write depth=32", 4096, "IOPS", 2.0),
    ("read 1 MiB in order", "read depth=4 kb=1024 seq", MIB, "MB/s", 1.25),
    ("write 1 MiB in order", "write depth=4 kb=1024 seq", MIB, "MB/s", 1.25),
)


def bench_block(plan):
    """Requests or megabytes a second, and how many times as fast QEMU is."""
    folder = Path(tempfile.mkdtemp(prefix="pyvmm-bench-", dir="/dev/shm"))
    try:
        path = folder / "disk.img"
        with open(path, "wb") as file:
            # Filled: a hole would be read without a page.
            for _ in range(IMAGE // MIB):
                file.write(os.urandom(MIB))
        for name, words, size, unit, limit in VARIANTS[1:4] if plan.quick else VARIANTS:
            scale = size / 1e6 if size == MIB else 1

            def measure(kind, words=words, scale=scale):
                return _run(kind, path, words) * scale

            yield from beside(f"block {name}", unit, plan, measure, limit)
    finally:
        shutil.rmtree(folder)


def _run(kind, path, words):
    """Requests a second."""
    options = [
        *("-drive", f"file={path},format=raw,if=none,id=disk"),
        *("-device", "virtio-blk-device,drive=disk"),
    ]
    append = f"virtio-blk bench={words} ms={DURATION_MS}"
    with kind(*options, append=append, monitor=False) as vmm:
        match = vmm.expect(r"blk bench (\d+) requests of \d+ in (\d+) ms")
    count, took_ms = map(int, match.groups())
    if not DURATION_MS <= took_ms < 10 * DURATION_MS:
        raise BenchError(f"{vmm.program}: the guest's clock runs wrong: {took_ms} ms")
    return count * 1000 / took_ms
