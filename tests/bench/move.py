"""How long a vCPU stands still when another task takes over KVM_RUN, as a live update may have it,
and what an exit costs that another task serves; ``move.c`` measures both.

Kernels before 6.13 wait for an RCU grace period when a vCPU's task changes. So there is the same in
nested machines with such kernels, beside the pause of a plain update in there. Python is some 30
times slower in them; the grace period counts ticks of the clock, and is as long as elsewhere.
"""

import contextlib
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from bench.machines import BenchError
from bench.report import Result, progress

SOURCE = Path(__file__).with_suffix(".c")
TIMEOUT_S = 600
#: What is measured: kind, number of vCPUs, what the row is called.
LEAVING = [
    (kind, count, f"{title}, {count} vCPU{'s' * (count > 1)}")
    for count in (1, 4)
    for kind, title in [
        ("exit", "exit to exit"),
        ("served", "exit to exit, another task between"),
        ("thread", "move to a thread"),
        ("group", "move to a thread group"),
    ]
]
FRESH = [("fresh", 1, "first KVM_RUN")]
#: Of one vCPU: more of them would wait for each other's processors.
COMPUTING = [
    ("kicked", 1, "computing guest, kick"),
    ("kicked-thread", 1, "computing guest, move to a thread"),
    ("kicked-group", 1, "computing guest, move to a thread group"),
]
EVERYTHING = [*LEAVING, *FRESH, *COMPUTING]


def bench_move(plan):
    """On this host's kernel."""
    with built() as program:
        for kind, count, title in EVERYTHING:
            progress(f"move: {title}")
            command = [program, kind, str(count), str(plan.runs)]
            done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S)
            yield _result(title, done.returncode, done.stdout, done.stderr)


def bench_nested_move(plan):
    """On those of Debian that can be had, in emulated machines of one processor."""
    # Imported here: nothing else that is measured needs them.
    from nested import packages
    from nested.machine import NestedMachine
    from nested.port import NestedError

    with built() as program:
        for version, package in packages.KERNELS.items():
            progress(f"move: starting a nested machine with Linux {version}")
            try:
                with NestedMachine(kernel=package) as machine:
                    yield from _inside(machine, program, version, plan)
            except (packages.MissingError, NestedError) as error:
                raise BenchError(str(error)) from None


def _inside(machine, program, version, plan):
    # The nested machine expedites grace periods to boot faster, which a host does not.
    for expedited, kinds in ((0, EVERYTHING), (1, LEAVING)):
        place = f" on {version}" + ", expedited RCU" * expedited
        for kind, count, title in kinds:
            progress(f"move: {title}{place}")
            script = f"echo {expedited} >/sys/kernel/rcu_expedited && exec "
            done = machine.run(f"{script}{program} {kind} {count} {plan.runs}", TIMEOUT_S)
            yield _result(title + place, done.code, done.output)
    progress(f"move: plain updates on {version}")
    options = f"--runs {min(plan.runs, 5)} --json /run/phases.json"
    tests = SOURCE.parents[1]
    script = (
        "echo 0 >/sys/kernel/rcu_expedited && "
        f"PYTHONPATH={tests} {sys.executable} -m bench phases {options} >/run/log 2>&1 || "
        "{ cat /run/log; exit 1; }; cat /run/phases.json"
    )
    done = machine.run(script, TIMEOUT_S)
    if done.code:
        raise BenchError(f"phases: {done.output}")
    for row in json.loads(done.output)["results"]:
        if row["name"] == "phases from stop on":
            yield Result(f"plain update on {version}", row["samples"], "ms", note=row["note"])


@contextlib.contextmanager
def built():
    """The path of the program that measures."""
    with tempfile.TemporaryDirectory(prefix="pyvmm-bench-") as folder:
        command = ["gcc", "-O2", "-pthread", "-o", f"{folder}/move", str(SOURCE)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise BenchError(f"gcc: {done.stderr}")
        yield command[4]


def _result(title, code, output, errors=""):
    """A row, of the vCPU that stood still longest in each sample."""
    if code:
        raise BenchError(f"{title}: the program that measures ended with {code}: {output}{errors}")
    samples = [max(map(float, line.split())) for line in output.splitlines()]
    return Result(title, samples, "us")
