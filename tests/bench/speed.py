"""How long after an update a guest that works on all its memory is slower than before.

The new VM's tables from guest-physical to host memory are empty; they fill as the guest touches
its pages. That is no pause, but a guest feels it.
"""

import time

from bench.chain import REST_S, TOUCH_TIMEOUT_S, update
from bench.machines import COUNTER, MIB, BenchError, Vmm
from bench.report import Result, progress
from bench.updates import LARGE, SMALL, left_out
from bench.watcher import Watcher

SHARE = 0.95
WINDOW_NS = 20_000_000  # over which a speed is taken
BEFORE_NS = 500_000_000
#: How long the guest has for it.
SETTLE_S = {SMALL: 2.0, LARGE: 30.0}


def bench_speed(plan):
    """Time from the pause until the guest writes to as many pages a millisecond as before."""
    for size in (SMALL, LARGE):
        title = f"{size // MIB}M"
        reason = left_out(plan, size)
        if reason:
            yield Result(f"speed {title}", [], "ms", note=reason)
            continue
        watched, updates = _watch(plan, size)
        times, before, after = [], [], []
        for start, end in updates:
            usual = watched.speed(start - BEFORE_NS, start)
            pause = watched.pause(start, end)
            back = watched.back_at(pause, SHARE * usual, WINDOW_NS)
            if back is None:
                note = f"not within {SETTLE_S[size]:g} s"
                raise BenchError(f"speed {title}: back at {SHARE:.0%} of {usual * 1e6:.0f}: {note}")
            times.append((back - pause) / 1e6)
            before.append(usual * 1e6)
            after.append(watched.speed(pause, pause + WINDOW_NS) * 1e6)
        yield Result(f"speed back at {SHARE:.0%}, {title}", times, "ms")
        yield Result(f"  before, {title}", before, "/ms", note="pages written to")
        note = f"the first {WINDOW_NS / 1e6:.0f} ms, pause included"
        yield Result(f"  after, {title}", after, "/ms", note=note)


def _watch(plan, size):
    name = f"speed {size // MIB}M"
    with Vmm(size=size, append="counter touch=all walk", version=plan.version) as vm:
        vm.expect("counter ready", TOUCH_TIMEOUT_S)
        with Watcher(vm.memfd(), COUNTER) as watcher:
            updates = []
            time.sleep(BEFORE_NS / 1e9)
            for number in range(plan.runs):
                progress(f"{name}: update {number + 1} of {plan.runs}")
                time.sleep(REST_S)
                updates.append(update(vm, plan))
                time.sleep(SETTLE_S[size])
            return watcher.stop(), updates
