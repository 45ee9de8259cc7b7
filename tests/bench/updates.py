"""A thousand updates of a computing guest, small and large, and some of QEMU beside them.

What is asked for is not only the usual pause but the longest: a guest's timer, a client's patience
and a watchdog have to do with that one.
"""

import os
from pathlib import Path

from bench.chain import chain
from bench.machines import MIB, BenchError, Qemu, qemu_version
from bench.report import Result, of_medians
from pyvmm.verbs.trace import render

SMALL = 256 * MIB
LARGE = 8192 * MIB
PAUSE_LIMIT_MS, PAUSE_TAIL_MS = 0.5, 2.0
QEMU_NEEDED = (10, 2)
QEMU_ABSENT = "qemu: not found or older than 10.2"


def bench_updates(plan):
    """Chained updates of one VM for each size, and what pyvmm tells of them itself."""
    for size in (SMALL, LARGE):
        title = f"{size // MIB}M"
        reason = left_out(plan, size)
        if reason:
            yield Result(f"updates {title}", [], "ms", note=reason)
            continue
        found = chain(f"updates {title}", plan, plan.updates, size)
        limits = (None, None) if plan.plain else (PAUSE_LIMIT_MS, PAUSE_TAIL_MS)
        yield from found.rows(f"updates {title}", *limits)
        yield from marks(title, found.infos)
        if plan.pictures:
            write_pictures(Path(plan.pictures), title, found)
        if found.problem:
            raise BenchError(found.problem)
        if size == SMALL:
            yield from _qemu(plan, found)


def left_out(plan, size):
    """Why a size is not measured, or None."""
    if size == SMALL:
        return None
    if plan.quick:
        return "left out by --quick and --against"
    available = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if available < size * 9 // 8:
        return f"left out: {available // MIB} MiB of memory are free"
    return None


def marks(title, infos):
    """What query-migrate says of those updates that the guest ran through."""
    told = [info for info in infos if info.get("cpu-pauses")]
    if not told:
        return
    for what, key in (("move", "move-us"), ("takeover", "takeover-us")):
        slowest = [max(cpu[key] for cpu in info["cpu-pauses"]) / 1e3 for info in told]
        note = "by pyvmm's own marks, the slowest vCPU"
        yield Result(f"  {what}, {title}", slowest, "ms", note=note)
    stalls = [info["device-stall"] for info in told]
    yield Result(f"  without devices, {title}", stalls, "ms", note="by pyvmm's own marks")


def write_pictures(folder, title, found):
    """The update with the median pause, as a picture and as Chrome trace events."""
    timed = [
        (pause, number)
        for number, (pause, info) in enumerate(zip(found.longest, found.infos, strict=True))
        if info.get("timeline")
    ]
    if not timed:
        return
    pause, number = sorted(timed)[len(timed) // 2]
    words = f"{title}, update {number + 1} of {len(found.infos)}: {pause:.2f} ms seen from outside"
    folder.mkdir(parents=True, exist_ok=True)
    for suffix in ("svg", "json"):
        path = folder / f"update-{title}.{suffix}"
        path.write_text(render(str(path), words, 1, found.infos[number]["timeline"]))


def _qemu(plan, own):
    version = qemu_version()
    if version < QEMU_NEEDED:
        yield Result("updates qemu", [], "ms", note=QEMU_ABSENT)
        return
    name = "updates qemu {}.{} microvm 256M".format(*version)
    found = chain(name, plan.but(plain=False), plan.runs, SMALL, kind=Qemu)
    yield from found.rows(name)
    yield of_medians(f"{name}, qemu/pyvmm", found.longest, own.longest)
    if found.problem:
        raise BenchError(found.problem)
