"""How long after an update a guest that works on all its memory is slower than before.

The new VM's tables from guest-physical to host memory are empty; they fill as the guest touches
its pages. That is no pause, but a guest feels it. The guest writes to each page of its memory in
turn and counts them. With memory in huge pages, once pyvmm has made them of it, and in small ones.
"""

import mmap
import os
import re
import time

from harness.process import Deadline

from bench.chain import TOUCH_TIMEOUT_S, info_of, update
from bench.machines import COUNTER, MIB, BenchError, Vmm
from bench.report import Result, progress
from bench.updates import LARGE, SMALL, left_out
from bench.watcher import Watcher, longest

SHARE = 0.95
WINDOW_NS = 20_000_000  # over which a speed is taken
BEFORE_S = 0.5
#: A large guest takes long, and as long each time.
MOST_LARGE = 3
#: A guest is left alone until it is about as fast as before for some looks, then for a while.
LOOK_S, LOOKS, ABOUT, WHILE_S = 0.05, 4, 0.8, 0.5
TIMEOUT_S = 120.0
#: When the first huge pages are there at the latest, and what never is: holes below 1 MiB, and what
#: the guest's program leaves alone.
FIRST_LOOK_S, LEFT_OUT = 5.0, 8 * MIB
HUGE_TIMEOUT_S = 600.0


def bench_speed(plan):
    """Time from the new image's prompt until the guest writes to as many pages as before."""
    for size in (SMALL, LARGE):
        title = f"{size // MIB}M"
        reason = left_out(plan, size)
        if reason:
            yield Result(f"speed {title}", [], "ms", note=reason)
            continue
        runs = plan.runs if size == SMALL else min(plan.runs, MOST_LARGE)
        made = []
        yield from _rows(title, plan.but(runs=runs), size, (), made)
        if made:  # an earlier version makes none
            yield from made
            options = ("-machine", "ram-collapse=off")
            yield from _rows(f"{title}, small pages", plan.but(runs=runs), size, options, [])


def _rows(title, plan, size, options, made):
    watched, updates, refaults = _watch(f"speed {title}", plan, size, options, made)
    times, before, after = [], [], []
    for start, end in updates:
        usual = watched.speed(start - BEFORE_S * 1e9, start)
        back = watched.back_at(end, SHARE * usual, WINDOW_NS)
        if back is None:
            raise BenchError(f"speed {title}: not as fast as before within {TIMEOUT_S:g} s")
        times.append((back - end) / 1e6)
        before.append(usual * 1e6)
        # Of the middle of that time.
        middle = (end + back) / 2
        after.append(watched.speed(middle - WINDOW_NS, middle + WINDOW_NS) * 1e6)
    note = f"from the new image's prompt until the guest is as fast as before, to {SHARE:.0%}"
    yield Result(f"speed {title} is back", times, "ms", note=note)
    yield Result(f"  before, {title}", before, "/ms", note="pages written to")
    yield Result(f"  meanwhile, {title}", after, "/ms")
    yield Result(f"  mapped again, {title}", refaults, "pages", note="by KVM, large ones and small")


def _watch(name, plan, size, options, made):
    append = "counter touch=all walk"
    with Vmm(*options, size=size, append=append, version=plan.version) as vm:
        vm.expect("counter ready", TOUCH_TIMEOUT_S)
        with _counter(vm.memfd()) as counter:
            made += _huge_pages(name, vm, size)
            with Watcher(vm.memfd(), COUNTER) as watcher:
                updates, refaults = [], []
                for number in range(plan.runs):
                    progress(f"{name}: update {number + 1} of {plan.runs}")
                    usual = _count(counter, BEFORE_S)
                    updates.append(update(vm, plan))
                    _await(counter, ABOUT * usual)
                    refaults.append(info_of(vm).get("refault", {}).get("pages"))
                return watcher.stop(), updates, [pages for pages in refaults if pages is not None]


def _huge_pages(name, vm, size):
    """Wait until there are as many as there will be; rows about that, none if none are made."""
    progress(f"{name}: huge pages")
    deadline, start, took = Deadline(HUGE_TIMEOUT_S), time.monotonic(), None
    with Watcher(vm.memfd(), COUNTER) as watcher:
        while not deadline.over:
            told = re.search(r"collapse: .* (\d+) MiB in huge .*; ([0-9.]+) ms", _memdev(vm))
            if told is None and time.monotonic() - start > FIRST_LOOK_S:
                return []
            if told and int(told[1]) * MIB >= size - LEFT_OUT:
                took = time.monotonic() - start
                break
            time.sleep(LOOK_S)
        watched = watcher.stop()
    if took is None:
        raise BenchError(f"{name}: {_memdev(vm)!r} after {HUGE_TIMEOUT_S:g} s")
    stood = longest(watched.standing(0, time.monotonic_ns()))
    title = name.partition(" ")[2]
    return [
        Result(f"  huge pages, {title}", [took], "s", note="until all memory is"),
        Result(f"  the slowest, {title}", [float(told[2])], "ms", note="of one, by pyvmm's mark"),
        Result(f"  stood, {title}", [stood], "ms", note="the guest at most meanwhile"),
    ]


def _memdev(vm):
    return vm.hmp("info memdev").partition("memory backend: pc.bios")[0]


def _counter(path):
    fd = os.open(path, os.O_RDONLY)
    try:
        page = mmap.mmap(fd, mmap.PAGESIZE, prot=mmap.PROT_READ, offset=COUNTER)
    finally:
        os.close(fd)
    return memoryview(page).cast("Q")


def _count(counter, seconds):
    """Increments a second."""
    start, value = time.monotonic(), counter[0]
    time.sleep(seconds)
    return (counter[0] - value) / (time.monotonic() - start)


def _await(counter, speed):
    deadline, fast = Deadline(TIMEOUT_S), 0
    while fast < LOOKS and not deadline.over:
        fast = fast + 1 if _count(counter, LOOK_S) >= speed else 0
    time.sleep(WHILE_S)
