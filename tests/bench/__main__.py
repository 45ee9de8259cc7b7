"""``make bench``: measures pyvmm on this host and compares with the targets.

    make bench ARGS="pause start --runs 50"
    make bench ARGS="pause --smp 1,16,62"
    make bench ARGS="updates --updates 200 --pictures pictures"
    make bench ARGS="pause phases start --against COMMIT_OR_FOLDER"

Prints a table and writes JSON. The exit code is 1 if a target was missed or a benchmark failed.
"net" needs root. "boot" starts an emulated machine where the host's KVM cannot run Linux, and
"nested-move" some with other kernels; that takes minutes, and they are left out unless they are
named. "boot" has at most 5 samples. With --against another
version is measured in turns with this one: a commit of this repository, which is built for it, or a
folder in which `make build` was run.
"""

import argparse
import os
import sys
import traceback

from harness import versions

from bench import compare
from bench.block import bench_block
from bench.boot import bench_boot
from bench.console import bench_console
from bench.exits import bench_exits
from bench.host import facts
from bench.machines import BenchError
from bench.memory import bench_memory
from bench.move import bench_move, bench_nested_move
from bench.network import bench_network
from bench.pause import bench_pause, bench_phases
from bench.plan import Plan, cpu_counts
from bench.report import (
    Result,
    header,
    progress,
    repeat_progress,
    table,
    write_json,
)
from bench.speed import bench_speed
from bench.stall import bench_stall
from bench.startup import bench_imports, bench_start
from bench.updates import bench_updates


class Benchmark:
    """One of them.

    :param measure: gives the rows for a plan
    :param turn: samples in a row if two versions are compared; 0 if it cannot compare them
    :param most: samples that it takes at most
    :param asked: leave it out unless it is named
    :param needs_kvm: it measures nothing without
    """

    def __init__(self, measure, turn=0, most=None, *, asked=False, needs_kvm=True):
        self.measure = measure
        self.turn = turn
        self.most = most
        self.asked = asked
        self.needs_kvm = needs_kvm


BENCHMARKS = {
    "pause": Benchmark(bench_pause, 5),
    "updates": Benchmark(bench_updates),
    "stall": Benchmark(bench_stall),
    "speed": Benchmark(bench_speed, 0, 10),
    "phases": Benchmark(bench_phases, 5),
    "start": Benchmark(bench_start, 5),
    "imports": Benchmark(bench_imports, 1, 5),
    "memory": Benchmark(bench_memory, 1, 3),
    "exits": Benchmark(bench_exits, 5, needs_kvm=False),
    "block": Benchmark(bench_block),
    "console": Benchmark(bench_console),
    "net": Benchmark(bench_network),
    "move": Benchmark(bench_move),
    "boot": Benchmark(bench_boot, 0, 5, asked=True),
    "nested-move": Benchmark(bench_nested_move, asked=True),
}

# Above this load per CPU something else competes with what is measured.
BUSY = 0.25


def main():
    """Run what is asked for; the exit code."""
    options = _options()
    # It led to this program, and is not to lengthen the path of what is measured.
    os.environ.pop("PYTHONPATH", None)
    host = facts()
    if host["load"][0] > BUSY * host["processors"]:
        progress(f"the host is busy (load {host['load'][0]:.1f}): the times will be too long")
    repeat_progress()
    results = []
    for name in options.names:
        benchmark = BENCHMARKS[name]
        runs = min(options.plan.runs, benchmark.most or options.plan.runs)
        plan = options.plan.but(runs=runs)
        if options.other:
            rows = compare.bench(benchmark.measure, plan, options.other, benchmark.turn)
        else:
            rows = benchmark.measure(plan)
        results.extend(measure(name, rows))
    print(header(host), end="\n\n")
    print(table(results, colour=sys.stdout.isatty() and "NO_COLOR" not in os.environ))
    write_json(options.json, host, results)
    return int(any(result.failed or result.passed is False for result in results))


def measure(name, rows):
    """The rows of a benchmark; if it fails, whatever with, those until then and why."""
    try:
        yield from rows
    except Exception as error:
        if not isinstance(error, BenchError):
            traceback.print_exc()
        why = str(error) or type(error).__name__
        progress(f"{name}: {why}")
        yield Result(name, [], "", note=f"failed: {why}", failed=True)


def _options():
    parser = argparse.ArgumentParser(prog="bench", description=__doc__.splitlines()[0])
    names = ", ".join(BENCHMARKS)
    help = f"{names} (default: all but boot and nested-move; of those that can compare two)"
    parser.add_argument("names", nargs="*", metavar="NAME", help=help)
    parser.add_argument("--runs", type=int, default=20, metavar="N", help="samples of each (20)")
    parser.add_argument("--quick", action="store_true", help="5 samples, no large guests")
    help = "of 'updates', beside as many of QEMU as there are samples (1000, 50 if --quick)"
    parser.add_argument("--updates", type=int, metavar="N", help=help)
    help = "draw one of the updates there, and write it as Chrome trace events"
    parser.add_argument("--pictures", metavar="FOLDER", help=help)
    help = "updates stop the guest first, as they do where it cannot run through the exec"
    parser.add_argument("--plain", action="store_true", help=help)
    help = "pause and phases with so many vCPUs, such as 1,8,16,62"
    parser.add_argument("--smp", default="", metavar="LIST", help=help)
    help = "compare with another version, in turns: a commit, or a folder with a built checkout"
    parser.add_argument("--against", metavar="VERSION", help=help)
    parser.add_argument("--json", default="bench.json", metavar="FILE", help="default: bench.json")
    options = parser.parse_args()
    for name in options.names:
        if name not in BENCHMARKS:
            parser.error(f"{name}: no such benchmark; there are {names}")
        if options.against and not BENCHMARKS[name].turn:
            parser.error(f"{name} cannot be measured --against another version")
    if options.updates is None:
        options.updates = 50 if options.quick else 1000
    for name in ("runs", "updates"):
        if getattr(options, name) < 1:
            parser.error(f"--{name}: at least 1")
    needs_kvm = not options.names or any(BENCHMARKS[name].needs_kvm for name in options.names)
    if needs_kvm and not os.access("/dev/kvm", os.R_OK | os.W_OK):
        parser.error("/dev/kvm cannot be opened")
    try:
        smp = cpu_counts(options.smp) if options.smp else ()
        options.other = versions.find(options.against) if options.against else None
    except (ValueError, versions.VersionError) as error:
        parser.error(str(error))
    if not options.names:
        options.names = [name for name, one in BENCHMARKS.items() if not one.asked]
        if options.other:
            options.names = [name for name in options.names if BENCHMARKS[name].turn]
    runs = min(options.runs, 5) if options.quick else options.runs
    quick = options.quick or options.other is not None
    options.plan = Plan(
        runs,
        quick=quick,
        smp=smp,
        updates=options.updates,
        pictures=options.pictures,
        plain=options.plain,
        beside=options.other is None,
        version=versions.present(),
    )
    return options


if __name__ == "__main__":
    sys.exit(main())
