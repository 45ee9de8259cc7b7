"""What an exit costs.

In user space alone: KVM_RUN is a stub that comes back at once (``exits.c``), so this needs no KVM,
and tells the accesses that native code answers from those that come to Python; in time and, where
there is valgrind, in instructions, which are the same in every run.

And all of it: port accesses of a guest that is 16 bytes in a ROM, at the reset vector.
"""

import contextlib
import json
import os
import re
import shutil
import struct
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path

from bench.exit_loop import MOST, NATIVE, PYTHON
from bench.machines import BenchError, Vmm
from bench.report import Result, progress
from bench.startup import THR, rom

NATIVE_LIMIT_US, PYTHON_LIMIT_US = 0.5, 5.0
#: Port accesses between two bytes on the serial port, which may be written a moment late.
EXITS = 10_000
SCRATCH = 0x3FF  # a register of the serial port that does nothing
SOURCE = Path(__file__).with_suffix(".c")
TIMEOUT_S = 300
#: Accesses whose instructions are counted, which takes half a minute each.
COUNTED = ("THR write", "LSR read", "interrupt status", "port write", "memory read")


def bench_exits(plan):
    """The stub's, and a guest's where there is a KVM."""
    if plan.version.tree == SOURCE.parents[2]:
        with _built() as library:
            yield from _times(library, plan)
            if shutil.which("valgrind") and not plan.quick:
                yield from _instructions(library)
    if os.access("/dev/kvm", os.R_OK | os.W_OK):
        yield from _guest(plan)


def _times(library, plan):
    for accesses, way, limit in (
        (NATIVE, "native", NATIVE_LIMIT_US),
        (PYTHON, "Python", PYTHON_LIMIT_US),
    ):
        for access in accesses:
            progress(f"exits, {access}")
            times = json.loads(_run([], library, access, MOST, 5 * plan.runs).stdout)
            note = "in user space: KVM_RUN is a stub"
            yield Result(f"exit {way}, {access}", [each / 1e3 for each in times], "us", limit, note)


def _instructions(library):
    for access in COUNTED:
        progress(f"exits, instructions of {access}")
        one, two = (_count(library, access, count) for count in (500, 1500))
        way = "native" if access in NATIVE else "Python"
        yield Result(f"  instructions {way}, {access}", [(two - one) / 1000], "", note="callgrind")


def _count(library, access, count):
    with tempfile.TemporaryDirectory(prefix="pyvmm-bench-") as folder:
        valgrind = ["valgrind", "--tool=callgrind", "--collect-atstart=no"]
        valgrind.append(f"--callgrind-out-file={folder}/out")
        found = re.search(r"Collected : (\d+)", _run(valgrind, library, access, count, 1).stderr)
    if not found:
        raise BenchError("callgrind counts nothing")
    return int(found[1])


def _run(tool, library, access, count, runs):
    tests = SOURCE.parents[1]
    done = subprocess.run(
        [*tool, sys.executable, "-m", "bench.exit_loop", library, access, str(count), str(runs)],
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        # The order of what has a hash is the same each time.
        env=os.environ | {"LD_PRELOAD": library, "PYTHONPATH": str(tests), "PYTHONHASHSEED": "0"},
    )
    if done.returncode:
        raise BenchError(f"exit_loop: {done.stderr}")
    return done


@contextlib.contextmanager
def _built():
    with tempfile.TemporaryDirectory(prefix="pyvmm-bench-") as folder:
        library = f"{folder}/exits.so"
        command = ["gcc", "-O2", "-shared", "-fPIC", "-o", library, str(SOURCE)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise BenchError(done.stderr)
        yield library


def _guest(plan):
    for name, opcode in (("write", 0xEE), ("read", 0xEC)):
        progress(f"exits, port {name}")
        with tempfile.NamedTemporaryFile(prefix="pyvmm-bench-") as image:
            image.write(rom(exit_loop(opcode)))
            image.flush()
            with Vmm("-bios", image.name, monitor=False, version=plan.version) as vm:
                vm.expect("(?s).")
                times = [_next_byte(vm) for _ in range(plan.runs + 1)]
        costs = [(later - now) / 1e3 / EXITS for now, later in pairwise(times)]
        note = f"one exit to Python and back, mean of {EXITS}; with what KVM takes"
        yield Result(f"exit port {name}", costs, "us", note=note)


def exit_loop(opcode):
    """mov dx, SCRATCH; mov cx, EXITS; opcode; loop; mov dx, THR; out dx, al; jmp to start"""
    code = struct.pack("<BHBHB", 0xBA, SCRATCH, 0xB9, EXITS, opcode) + b"\xe2\xfd"
    code += struct.pack("<BHB", 0xBA, THR, 0xEE)
    return code + struct.pack("<Bb", 0xEB, -len(code) - 2)


def _next_byte(vm):
    vm.expect("(?s).")
    return time.monotonic_ns()
