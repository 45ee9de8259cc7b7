"""How long the guest stands still in a live update, seen from outside, and what that time is
made of; the same for QEMU where there is one that can do it."""

import os
import re
import shutil
import subprocess
import time
from pathlib import Path

from harness.qmp import Qmp

from bench.machines import COUNTER, MIB, BenchError, Qemu, Vmm
from bench.poller import Poller, longest
from bench.report import Result, progress

SMALL = 256 * MIB
LARGE = 8192 * MIB
PAUSE_LIMIT_MS = 50.0
LARGE_EXTRA_MS = 10.0
QEMU_NEEDED = (10, 2)
QEMU_ABSENT = "qemu: not found or older than 10.2"
TOUCH_TIMEOUT_S = 300.0
GUEST_CPUS = 32  # the most that the built-in guest uses
REST_S = 0.2  # between updates, in which the jitter floor is taken


def bench_pause(plan):
    """Chained updates of one VM after the other; all RAM touched by the guest."""
    if plan.smp:
        yield from _by_vcpus(plan)
        return
    for backend in ("memfd", "file"):
        small, *others = _pause(f"pause {backend} 256M", plan, SMALL, backend)
        small.limit = PAUSE_LIMIT_MS
        yield small
        yield from others
        yield _large(backend, plan, small)


def bench_phases(plan):
    """The steps of an update by the VMM's own marks."""
    if not plan.smp:
        yield from _phases(plan)
        return
    measured = []
    for smp in plan.smp:
        *steps, together = _phases(plan, smp, f", {smp} vCPUs")
        yield from (*steps, together)
        measured.append((smp, together.median))
    yield from _costs("phases", measured)


def bench_qemu(plan):
    """The pause of QEMU, and right before it that of pyvmm, for the ratio."""
    path = shutil.which(Qemu.program)
    if not path or qemu_version(path) < QEMU_NEEDED:
        return [Result("qemu", [], "ms", note=QEMU_ABSENT)]
    version = ".".join(map(str, qemu_version(path)))
    own, *_ = _pause("pause pyvmm 256M, beside qemu", plan, SMALL)
    other, *_ = _pause(f"pause qemu {version} microvm 256M", plan, SMALL, kind=Qemu)
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


def _by_vcpus(plan):
    """The pause for each number of vCPUs, and what each further one costs."""
    measured = []
    for smp in plan.smp:
        result, *_ = _pause(f"pause memfd 256M, {smp} vCPUs", plan, SMALL, smp=smp)
        yield result
        measured.append((smp, result.median))
    yield from _costs("pause", measured)


def _costs(name, measured):
    """What each further vCPU costs, of (number, median) pairs."""
    (fewest, base), *more = sorted(measured)
    for smp, median in more:
        cost = (median - base) / (smp - fewest)
        note = f"the difference of the medians of {smp} and {fewest} vCPUs, by their number"
        yield Result(f"{name}, each vCPU up to {smp}", [cost], "ms", note=note)


def _phases(plan, smp=1, suffix=""):
    updates = []
    qmp = ("-qmp", "unix:qmp.sock,server=on,wait=off")
    with Vmm(*qmp, append=_counter(smp), smp=smp, version=plan.version) as vm:
        vm.expect("counter ready")
        for _ in range(plan.runs):
            time.sleep(REST_S)
            vm.update()
            with Qmp(vm.folder / "qmp.sock") as client:
                updates.append(client.execute("query-migrate")["phases"])
    for step in updates[0]:
        yield Result(f"phase {step}{suffix}", [update[step] for update in updates], "ms")
    pause = list(updates[0])[list(updates[0]).index("stop") :]
    together = [sum(update[step] for step in pause) for update in updates]
    note = "the pause by pyvmm's own marks"
    yield Result(f"phases from stop on{suffix}", together, "ms", note=note)


def _counter(smp):
    """The guest's program; of more vCPUs than it has use for the rest are halted."""
    return f"counter pyvmm.cpus={min(smp, GUEST_CPUS)}" if smp > 1 else "counter"


def _large(backend, plan, small):
    name = f"pause {backend} 8192M"
    if plan.quick:
        return Result(name, [], "ms", note="left out by --quick and --against")
    available = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if available < LARGE * 9 // 8:
        return Result(name, [], "ms", note=f"left out: {available // MIB} MiB of memory are free")
    large, *_ = _pause(name, plan, LARGE, backend)
    large.limit = small.median + LARGE_EXTRA_MS
    return large


def _pause(name, plan, size, backend="memfd", smp=1, kind=Vmm):
    """Measure; (the pauses, the longest gaps in as long a time without an update, the times
    from the command to the prompt of the new image)."""
    progress(f"{name}: the guest touches its memory")
    path = Path(f"/dev/shm/pyvmm-bench-{os.getpid()}")
    options = []
    if backend == "file":
        memory = f"memory-backend-file,id=ram0,size={size // MIB}M,mem-path={path},share=on"
        options += ["-object", memory]
    guest = {"append": f"{_counter(smp)} touch=all", "smp": smp}
    try:
        with kind(*options, size=size, version=plan.version, **guest) as vm:
            vm.expect("counter ready", TOUCH_TIMEOUT_S)
            ram = str(path) if backend == "file" else vm.memfd()
            with Poller(ram, COUNTER) as poller:
                updates = []
                for number in range(plan.runs):
                    progress(f"{name}: update {number + 1} of {plan.runs}")
                    time.sleep(REST_S)
                    updates.append(vm.update())
                time.sleep(REST_S)
                gaps = poller.stop()
    finally:
        path.unlink(missing_ok=True)
    if gaps[-1][1] - gaps[-1][0] > REST_S * 1e9:
        raise BenchError(f"{name}: the guest stands still after the last update")
    pauses = [longest(gaps, start, end) for start, end in updates]
    quiet = [longest(gaps, start - min(end - start, REST_S * 1e9), start) for start, end in updates]
    floor_note = "the longest gap in as long a time without an update"
    took = [(end - start) / 1e6 for start, end in updates]
    return (
        Result(name, pauses, "ms"),
        Result(f"  jitter floor {backend}", quiet, "ms", note=floor_note),
        Result(f"  command to prompt {backend}", took, "ms", note="most of it the guest runs on"),
    )
