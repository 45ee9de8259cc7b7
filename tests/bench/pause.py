"""How long the guest stands still in a live update, seen from outside, and what that time is
made of; the same for QEMU where there is one that can do it."""

import os
import re
import shutil
import subprocess
import time
from pathlib import Path

from poller import Poller, longest
from report import Result, progress
from vmm import COUNTER, MIB, BenchError, Qemu, Vmm

SMALL = 256 * MIB
LARGE = 8192 * MIB
PAUSE_LIMIT_MS = 50.0
LARGE_EXTRA_MS = 10.0
QEMU_NEEDED = (10, 2)
QEMU_ABSENT = "qemu: not found or older than 10.2"
TOUCH_TIMEOUT_S = 300.0
REST_S = 0.2  # between updates, in which the jitter floor is taken


def bench_pause(runs, quick):
    """Chained updates of one VM after the other; all RAM touched by the guest."""
    for backend in ("memfd", "file"):
        small, *others = _pause(f"pause {backend} 256M", SMALL, backend, runs)
        small.limit = PAUSE_LIMIT_MS
        yield small
        yield from others
        yield _large(backend, runs, quick, small)


def bench_phases(runs, quick):
    """The steps of an update by the VMM's own marks."""
    updates = []
    with Vmm(["-serial", "stdio", "-append", "counter"], qmp=True) as vm:
        vm.console.expect("counter ready")
        for _ in range(runs):
            time.sleep(REST_S)
            vm.update()
            updates.append(vm.query("query-migrate")["phases"])
    for step in updates[0]:
        yield Result(f"phase {step}", [update[step] for update in updates], "ms")
    pause = list(updates[0])[list(updates[0]).index("stop") :]
    together = [sum(update[step] for step in pause) for update in updates]
    yield Result("phases from stop on", together, "ms", note="the pause by pyvmm's own marks")


def bench_qemu(runs, quick):
    """The pause of QEMU, and right before it that of pyvmm, for the ratio."""
    path = shutil.which(Qemu.program)
    if not path or qemu_version(path) < QEMU_NEEDED:
        return [Result("qemu", [], "ms", note=QEMU_ABSENT)]
    version = ".".join(map(str, qemu_version(path)))
    own, *_ = _pause("pause pyvmm 256M, beside qemu", SMALL, "memfd", runs)
    other, *_ = _pause(f"pause qemu {version} microvm 256M", SMALL, "memfd", runs, Qemu)
    other.note = f"qemu / pyvmm = {other.median / own.median:.2f}"
    return [own, other]


def qemu_version(path):
    """(major, minor) of a QEMU, (0, 0) if it does not tell."""
    try:
        output = subprocess.run([path, "--version"], capture_output=True, timeout=10).stdout
    except (OSError, subprocess.TimeoutExpired):
        return 0, 0
    found = re.search(rb"version (\d+)\.(\d+)", output)
    return (int(found[1]), int(found[2])) if found else (0, 0)


def _large(backend, runs, quick, small):
    name = f"pause {backend} 8192M"
    if quick:
        return Result(name, [], "ms", note="left out by --quick")
    available = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if available < LARGE * 9 // 8:
        return Result(name, [], "ms", note=f"left out: {available // MIB} MiB of memory are free")
    large, *_ = _pause(name, LARGE, backend, runs)
    large.limit = small.median + LARGE_EXTRA_MS
    return large


def _pause(name, size, backend, runs, kind=Vmm):
    """Measure; (the pauses, the longest gaps in as long a time without an update, the times
    from the command to the prompt of the new image)."""
    progress(f"{name}: the guest touches its memory")
    options = ["-serial", "stdio", "-append", "counter touch=all"]
    path = Path(f"/dev/shm/pyvmm-bench-{os.getpid()}")
    if backend == "file":
        memory = f"memory-backend-file,id=ram0,size={size // MIB}M,mem-path={path},share=on"
        options += ["-object", memory]
    try:
        with kind(options, size) as vm:
            vm.console.expect("counter ready", TOUCH_TIMEOUT_S)
            ram = str(path) if backend == "file" else vm.memfd()
            with Poller(ram, COUNTER) as poller:
                updates = []
                for number in range(runs):
                    progress(f"{name}: update {number + 1} of {runs}")
                    time.sleep(REST_S)
                    updates.append(vm.update())
                time.sleep(REST_S)
                gaps = poller.stop()
    finally:
        path.unlink(missing_ok=True)
    if gaps[-1][1] - gaps[-1][0] > REST_S * 1e9:
        raise BenchError(f"{name}: the guest stands still after the last update")
    pauses = [longest(gaps, update.start, update.end) for update in updates]
    quiet = [
        longest(gaps, update.start - min(update.end - update.start, REST_S * 1e9), update.start)
        for update in updates
    ]
    floor_note = "the longest gap in as long a time without an update"
    took = [(update.end - update.start) / 1e6 for update in updates]
    return (
        Result(name, pauses, "ms"),
        Result(f"  jitter floor {backend}", quiet, "ms", note=floor_note),
        Result(f"  command to prompt {backend}", took, "ms", note="most of it the guest runs on"),
    )
