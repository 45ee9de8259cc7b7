"""Disk throughput: the built-in guest's driver on an image in tmpfs, beside QEMU's microvm."""

import os
import shutil
import tempfile
from pathlib import Path

from report import Result, progress
from vmm import MIB, BenchError, Qemu, Vmm

from pyvmm.boot import builtin

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


class QemuDisk(Qemu):
    """QEMU with virtio devices where the guest looks for them."""

    def base(self):
        return [
            *(self.program, "-nodefaults", "-no-user-config", "-display", "none"),
            *("-machine", "microvm,accel=kvm,acpi=on,ioapic2=off,rtc=off"),
            *("-global", "virtio-mmio.force-legacy=false", "-m", f"{self.size // MIB}M"),
            *("-kernel", builtin.path(builtin.GUEST)),
        ]


def bench_block(runs, quick):
    """Requests or megabytes a second, and how many times as fast QEMU is."""
    folder = Path(tempfile.mkdtemp(prefix="pyvmm-bench-", dir="/dev/shm"))
    try:
        path = folder / "disk.img"
        with open(path, "wb") as file:
            # Filled: a hole would be read without a page.
            for _ in range(IMAGE // MIB):
                file.write(os.urandom(MIB))
        results = []
        for variant in VARIANTS[1:4] if quick else VARIANTS:
            results += _variant(path, runs, *variant)
        return results
    finally:
        shutil.rmtree(folder)


def _variant(path, runs, name, words, size, unit, limit):
    kinds = [Vmm]
    if shutil.which(Qemu.program):
        kinds.append(QemuDisk)
    found = {kind.program: [] for kind in kinds}
    # In turns: what else the host does then meets both.
    for number in range(runs):
        progress(f"block {name} {number + 1}/{runs}")
        for kind in kinds:
            found[kind.program].append(_run(kind, path, words) * (size / 1e6 if size == MIB else 1))
    results = [Result(f"block {name} {who}", rates, unit) for who, rates in found.items()]
    if len(kinds) == 1:
        results[0].note = "no QEMU to compare with"
        return results
    ratios = [other / own for own, other in zip(*found.values(), strict=True)]
    return [*results, Result(f"block {name} QEMU/pyvmm", ratios, "x", limit)]


def _run(kind, path, words):
    """Requests a second."""
    options = [
        *("-drive", f"file={path},format=raw,if=none,id=disk"),
        *("-device", "virtio-blk-device,drive=disk", "-serial", "stdio"),
        *("-append", f"virtio-blk bench={words} ms={DURATION_MS}"),
    ]
    with kind(options, monitor="none") as vmm:
        match = vmm.console.expect(r"blk bench (\d+) requests of \d+ in (\d+) ms")
    count, took_ms = map(int, match.groups())
    if not DURATION_MS <= took_ms < 10 * DURATION_MS:
        raise BenchError(f"{vmm.program}: the guest's clock runs wrong: {took_ms} ms")
    return count * 1000 / took_ms
