"""How long the guest stands still in a live update, seen from outside, and what that time is
made of."""

import time

from harness.qmp import Qmp

from bench.chain import REST_S, chain, counter, update
from bench.machines import BenchError, Vmm
from bench.report import Result
from bench.updates import LARGE, PAUSE_LIMIT_MS, SMALL, left_out

#: Of an update that stops the guest first, and what it may take longer with a large one.
PLAIN_LIMIT_MS, LARGE_EXTRA_MS = 50.0, 10.0
#: By the number of vCPUs, at the most.
SMP_LIMITS_MS = {1: PAUSE_LIMIT_MS, 16: 5.0, 62: 20.0}


def bench_pause(plan):
    """Chained updates of one VM after the other; all RAM touched by the guest."""
    if plan.smp:
        yield from _by_vcpus(plan)
        return
    for backend in ("memfd", "file"):
        small, *others = _pause(f"pause {backend} 256M", plan, SMALL, backend)
        small.limit = PLAIN_LIMIT_MS if plan.plain else PAUSE_LIMIT_MS
        yield small
        yield from others
        name = f"pause {backend} 8192M"
        reason = left_out(plan, LARGE)
        if reason:
            yield Result(name, [], "ms", note=reason)
            continue
        large, *others = _pause(name, plan, LARGE, backend)
        large.limit = small.median + LARGE_EXTRA_MS if plan.plain else PAUSE_LIMIT_MS
        yield large
        yield from others


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


def _by_vcpus(plan):
    """The pause for each number of vCPUs, and what each further one costs."""
    measured = []
    for smp in plan.smp:
        result, *others = _pause(f"pause memfd 256M, {smp} vCPUs", plan, SMALL, smp=smp)
        result.limit = None if plan.plain else SMP_LIMITS_MS.get(smp)
        yield result
        yield from others
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
    with Vmm(*qmp, append=counter(smp), smp=smp, version=plan.version) as vm:
        vm.expect("counter ready")
        for _ in range(plan.runs):
            time.sleep(REST_S)
            update(vm, plan)
            with Qmp(vm.folder / "qmp.sock") as client:
                updates.append(client.execute("query-migrate")["phases"])
    for step in updates[0]:
        yield Result(f"phase {step}{suffix}", [update[step] for update in updates], "ms")
    pause = list(updates[0])[list(updates[0]).index("stop") :]
    together = [sum(update[step] for step in pause) for update in updates]
    note = "by pyvmm's own marks: how long devices stand, and a guest that does not run meanwhile"
    yield Result(f"phases from stop on{suffix}", together, "ms", note=note)


def _pause(name, plan, size, backend="memfd", smp=1):
    """The rows of a :class:`bench.chain.Chain`."""
    found = chain(name, plan, plan.runs, size, backend, smp)
    if found.problem:
        raise BenchError(f"{name}: {found.problem}")
    return found.rows(name)
