"""One update after the other of a guest that counts, watched from outside."""

import os
import time
from collections import Counter
from pathlib import Path

from bench.machines import COUNTER, MIB, BenchError, Vmm
from bench.report import Result, progress
from bench.watcher import Watcher, longest
from pyvmm import rundir
from pyvmm.errors import PyvmmError
from pyvmm.verbs.client import QmpClient

REST_S = 0.2  # between updates, in which the jitter floor is taken
TOUCH_TIMEOUT_S = 300.0
GUEST_CPUS = 32  # the most that the built-in guest uses
PLAIN = "migrate_set_parameter cpr-exec-running off"


class Chain:
    """What there is to tell of them: lists with one value for each update, in ms.

    :ivar longest: the longest gap in the counter
    :ivar together: the sum of the gaps
    :ivar floor: the longest gap in as long a time before, without an update
    :ivar took: from the command to the new image's prompt
    :ivar infos: query-migrate's answers, empty ones of who does not tell
    :ivar problem: why there are fewer updates than were to be, or None
    """

    def __init__(self, watched, updates, infos, problem=None):
        self.infos = infos
        self.problem = problem
        self.longest, self.together, self.floor, self.took = [], [], [], []
        for start, end in updates:
            before = start - min(end - start, REST_S * 1e9)
            speed = watched.speed(before, start)
            gaps = watched.standing(start, end, speed)
            self.longest.append(longest(gaps))
            self.together.append(sum(gaps))
            self.floor.append(longest(watched.standing(before, start, speed)))
            self.took.append((end - start) / 1e6)

    def rows(self, name, limit=None, tail=None):
        """The :class:`Result` of the longest gaps, and of what is told beside it."""
        of = name.partition(" ")[2]
        floor = "the longest gap in as long a time without an update"
        on = "most of it the guest runs on"
        return [
            Result(name, self.longest, "ms", limit, self.ways(), tail=tail),
            Result(f"  sum of gaps, {of}", self.together, "ms"),
            Result(f"  jitter floor, {of}", self.floor, "ms", note=floor),
            Result(f"  command to prompt, {of}", self.took, "ms", note=on),
        ]

    def ways(self):
        """How many guests ran through the exec, and why others did not."""
        told = [info for info in self.infos if "running" in info]
        if not told:
            return ""
        ran = sum(info["running"] for info in told)
        reasons = Counter(info["fallback"] for info in told if info.get("fallback"))
        counted = [f"{count} times {reason}" for reason, count in reasons.items()]
        return "; ".join([f"the guest ran through {ran} of {len(told)} execs", *counted])


def chain(name, plan, runs, size, backend="memfd", smp=1, kind=Vmm):
    """Update ``runs`` times; the :class:`Chain`. All RAM is touched by the guest before."""
    progress(f"{name}: the guest touches its memory")
    path = Path(f"/dev/shm/pyvmm-bench-{os.getpid()}")
    options = []
    if backend == "file":
        memory = f"memory-backend-file,id=ram0,size={size // MIB}M,mem-path={path},share=on"
        options += ["-object", memory]
    guest = {"append": f"{counter(smp)} touch=all", "smp": smp}
    updates, infos, problem = [], [], None
    try:
        with kind(*options, size=size, version=plan.version, **guest) as vm:
            vm.expect("counter ready", TOUCH_TIMEOUT_S)
            ram = str(path) if backend == "file" else vm.memfd()
            with Watcher(ram, COUNTER) as watcher:
                try:
                    for number in range(runs):
                        if number < 20 or not number % 20:
                            progress(f"{name}: update {number + 1} of {runs}")
                        time.sleep(REST_S)
                        updates.append(update(vm, plan))
                        infos.append(info_of(vm))
                    time.sleep(REST_S)
                except AssertionError as error:
                    problem = f"update {len(updates) + 1} of {runs}: {error}"
                watched = watcher.stop()
    finally:
        path.unlink(missing_ok=True)
    if not watched.moves and not problem:
        problem = "the guest stands still after the last update"
    if problem and not updates:
        raise BenchError(f"{name}: {problem}")
    return Chain(watched, updates, infos, problem)


def update(vm, plan):
    """One update, in the way that was asked for; when it began and ended."""
    if plan.plain:
        vm.hmp(PLAIN)
    return vm.update()


def info_of(vm):
    """query-migrate's answer; empty of who has no entry in the run directory."""
    try:
        with QmpClient(rundir.directory(f"vm-{vm.pid}")) as client:
            return client.execute("query-migrate")
    except PyvmmError:
        return {}


def counter(smp):
    """The guest's program; of more vCPUs than it has use for the rest are halted."""
    return f"counter pyvmm.cpus={min(smp, GUEST_CPUS)}" if smp > 1 else "counter"
