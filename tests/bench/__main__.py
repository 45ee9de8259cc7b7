"""``make bench``: measures pyvmm on this host and compares with the targets.

    make bench ARGS="pause start --runs 50"

Prints a table and writes JSON. The exit code is 1 if a target was missed or a benchmark failed.
"net" needs root. "boot" starts an emulated machine where the host's KVM cannot run Linux, which
takes minutes: it has at most 5 samples, and is left out unless it is named.
"""

import argparse
import os
import sys

from block import bench_block
from boards import bench_exits, bench_start
from boot import bench_boot
from console import bench_console
from memory import bench_memory
from network import bench_network
from pause import bench_pause, bench_phases, bench_qemu
from report import Result, host, progress, table, write_json
from vmm import BenchError

BENCHMARKS = {
    "pause": bench_pause,
    "phases": bench_phases,
    "start": bench_start,
    "memory": bench_memory,
    "exits": bench_exits,
    "qemu": bench_qemu,
    "block": bench_block,
    "console": bench_console,
    "net": bench_network,
    "boot": bench_boot,
}

# Above this load per CPU something else competes with what is measured.
BUSY = 0.25


def main():
    """Run what is asked for; the exit code."""
    parser = argparse.ArgumentParser(prog="bench", description=__doc__.splitlines()[0])
    names = ", ".join(BENCHMARKS)
    help = f"{names} (default: all but boot, which takes minutes)"
    parser.add_argument("names", nargs="*", metavar="NAME", help=help)
    parser.add_argument("--runs", type=int, default=20, metavar="N", help="samples of each (20)")
    parser.add_argument("--quick", action="store_true", help="5 samples, no large guests")
    parser.add_argument("--json", default="bench.json", metavar="FILE", help="default: bench.json")
    options = parser.parse_args()
    unknown = [name for name in options.names if name not in BENCHMARKS]
    if unknown:
        parser.error(f"{unknown[0]}: no such benchmark; there are {names}")
    if options.runs < 1:
        parser.error("--runs: at least 1")
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        parser.error("/dev/kvm cannot be opened")
    runs = min(options.runs, 5) if options.quick else options.runs
    facts = host()
    if facts["load"][0] > BUSY * facts["cpus"]:
        progress(f"the host is busy (load {facts['load'][0]:.1f}): the times will be too long")
    results, failed = [], False
    for name in options.names or [name for name in BENCHMARKS if name != "boot"]:
        try:
            # Keeps what a benchmark found before it failed.
            results.extend(BENCHMARKS[name](runs, options.quick))
        except (BenchError, OSError) as error:
            failed = True
            progress(f"{name}: {error}")
            results.append(Result(name, [], "", note=f"failed: {error}"))
    print(", ".join(f"{name} {_shown(value)}" for name, value in facts.items()), end="\n\n")
    print(table(results, colour=sys.stdout.isatty() and "NO_COLOR" not in os.environ))
    write_json(options.json, facts, results)
    return int(failed or any(result.passed is False for result in results))


def _shown(value):
    if isinstance(value, (list, tuple)):
        return " ".join(f"{one:.2f}" if isinstance(one, float) else str(one) for one in value)
    return str(value)


if __name__ == "__main__":
    sys.exit(main())
