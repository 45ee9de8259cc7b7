"""Guests that are one 16-byte program in a ROM, at the reset vector: nothing runs before it.

Start-up: from the spawn of ``pyvmm run`` to the guest's first byte on the serial port, and the
modules that are imported on the way. Life: from the spawn to the end of a VM whose guest ends it at
once, beside QEMU's microvm with the same ROM, in whose place its own firmware would run first.
"""

import contextlib
import struct
import sys
import tempfile
import time
from pathlib import Path

from harness.kvm_machine import Machine
from harness.process import environment

from bench.beside import rows, turns
from bench.life import Life
from bench.machines import MIB, BenchError, Vmm
from bench.report import Result, progress
from bench.spawn import first_output

START_LIMIT_MS = 100.0
LIFE_LIMIT_MS = 50.0
#: How long the VM has been there whose end is measured, as that of a short life.
AGE_S = 0.02
#: A row for each: what it is called, its unit, how to get it of a :class:`bench.life.Life`.
LIFE = (
    ("", "ms", lambda life: life.wall_ms),
    (", processor time", "ms", lambda life: life.processor_ms),
    (", peak memory", "MiB", lambda life: life.peak_mib),
)
SIZE = 256 * MIB
ROM_SIZE = 64 << 10  # QEMU's are a multiple of that
RESET_VECTOR = ROM_SIZE - 16
THR = 0x3F8
#: Written by Python for each module that is imported, if it is asked to.
IMPORT = b"import time:"

# mov al, 0; mov dx, THR; out dx, al; hlt; jmp to hlt
HELLO = struct.pack("<BBBHB", 0xB0, 0, 0xBA, THR, 0xEE) + b"\xf4\xeb\xfd"

# mov al, 0; out EXIT_PORT, al; hlt; jmp to hlt
EXIT_PORT, EXIT_CODE = 0xF4, 1
END = struct.pack("<BBBB", 0xB0, 0, 0xE6, EXIT_PORT) + b"\xf4\xeb\xfd"


def rom(code):
    """A ROM image with ``code`` where the CPU begins."""
    return b"\xf4" * RESET_VECTOR + code.ljust(16, b"\xf4")


def bench_start(plan):
    """Fresh start, with the built-in guest loaded into memory but the ROM's program run."""
    bound = "from spawn to the guest's first byte out: an upper bound of exec to first KVM_RUN"
    python = [sys.executable, "-I", "-S", "-c", "import os; os.write(1, b'x')"]
    yield Result("start python alone", _times(python, plan.runs), "ms", note="for comparison")
    for name in ("no monitor", "monitor on a socket"):
        progress(f"start, {name}")
        with _hello(plan, name) as command:
            times = _times(command, plan.runs)
        yield Result(f"start {name}", times, "ms", START_LIMIT_MS, bound)
    yield from _life(plan)


def _life(plan):
    with _rom(END) as image:
        found = turns("start to exit", plan, lambda kind: _live(kind, plan, image))
    for name, unit, value in LIFE:
        samples = {kind: [value(one) for one in lives] for kind, lives in found.items()}
        first, *others = rows(f"start to exit{name}", unit, samples, less_is_better=True)
        if not name:
            first.limit = LIFE_LIMIT_MS
        yield from (first, *others)
    note = "in the kernel, which waits for grace periods: with irqchip, PIT and a vCPU, no VMM"
    yield Result(
        "start to exit: closing a VM", [_closing() for _ in range(plan.runs)], "ms", note=note
    )


def _closing():
    """Milliseconds that the kernel takes for a VM's end."""
    machine = Machine()
    time.sleep(AGE_S)
    start = time.monotonic_ns()
    machine.close()
    return (time.monotonic_ns() - start) / 1e6


def _live(kind, plan, image):
    """The life of one process of that kind of machine."""
    if kind is Vmm:
        command = [*plan.version.run, "-serial", "null", "-monitor", "none"]
    else:
        command = kind.command(SIZE)
    device = f"isa-debug-exit,iobase={EXIT_PORT:#x},iosize=4"
    command += ["-m", f"{SIZE // MIB}M", "-bios", str(image), "-device", device]
    life = Life.of(command, environment())
    if life.code != EXIT_CODE:
        raise BenchError(f"start to exit: {kind.program} ended with {life.code}")
    return life


def bench_imports(plan):
    """What a start imports; each module is some 0.15 ms of every update's pause."""
    with _hello(plan, "no monitor") as command:
        counts = [imports(command) for _ in range(plan.runs)]
    yield Result("modules imported", counts, "", note="until the guest's first byte is out")


def imports(command):
    """How many modules a command imports until it prints a NUL byte, or its guest does."""
    _, output = first_output(command, b"\0", errors=True, PYTHONPROFILEIMPORTTIME="1")
    # The line before the first has the titles.
    return output.partition(b"\0")[0].count(IMPORT) - 1


@contextlib.contextmanager
def _hello(plan, monitor):
    """The command of a machine that writes a NUL byte to standard output."""
    with _rom(HELLO) as image:
        socket = f"unix:{image.parent}/monitor,server=on,wait=off"
        yield [
            *(*plan.version.run, "-m", "256M", "-serial", "stdio", "-append", ""),
            *("-bios", str(image), "-monitor", "none" if monitor == "no monitor" else socket),
        ]


@contextlib.contextmanager
def _rom(code):
    """The path of an image with ``code``, in a folder of its own."""
    with tempfile.TemporaryDirectory(prefix="pyvmm-bench-") as folder:
        image = Path(folder, "rom")
        image.write_bytes(rom(code))
        yield image


def _times(command, runs):
    first_output(command)  # fills the page cache and writes bytecode
    return [first_output(command)[0] * 1e3 for _ in range(runs)]
