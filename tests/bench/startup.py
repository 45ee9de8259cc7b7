"""Guests that are one 16-byte program in a ROM, at the reset vector: nothing runs before it.

Start-up: from the spawn of ``pyvmm run`` to the guest's first byte on the serial port. Exits:
port accesses that Python serves, by the thousand.
"""

import os
import struct
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path

from report import Result, progress
from vmm import TIMEOUT_S, Stream, Vmm

START_LIMIT_MS = 100.0
EXITS = 1000  # port accesses between two bytes on the serial port
ROM_SIZE = 4096
RESET_VECTOR = ROM_SIZE - 16
SCRATCH = 0x3FF  # a register of the serial port that does nothing
THR = 0x3F8

# mov dx, THR; out dx, al; hlt; jmp to hlt
HELLO = struct.pack("<BHB", 0xBA, THR, 0xEE) + b"\xf4\xeb\xfd"


def exit_loop(opcode):
    """mov dx, SCRATCH; mov cx, EXITS; opcode; loop; mov dx, THR; out dx, al; jmp to start"""
    code = struct.pack("<BHBHB", 0xBA, SCRATCH, 0xB9, EXITS, opcode) + b"\xe2\xfd"
    code += struct.pack("<BHB", 0xBA, THR, 0xEE)
    return code + struct.pack("<Bb", 0xEB, -len(code) - 2)


def rom(code):
    """A ROM image with ``code`` where the CPU begins."""
    return b"\xf4" * RESET_VECTOR + code.ljust(16, b"\xf4")


def bench_start(runs, quick):
    """Fresh start, with the built-in guest loaded into memory but the ROM's program run."""
    bound = "from spawn to the guest's first byte out: an upper bound of exec to first KVM_RUN"
    python = [sys.executable, "-I", "-S", "-c", "import os; os.write(1, b'x')"]
    yield Result("start python alone", _spawn_times(python, runs), "ms", note="for comparison")
    with tempfile.TemporaryDirectory(prefix="pyvmm-bench-") as folder:
        image = Path(folder, "rom")
        image.write_bytes(rom(HELLO))
        socket = f"unix:{folder}/monitor,server=on,wait=off"
        for name, monitor in (("no monitor", "none"), ("monitor on a socket", socket)):
            progress(f"start, {name}")
            command = ["pyvmm", "run", "-m", "256M", "-serial", "stdio", "-append", ""]
            command += ["-bios", str(image), "-monitor", monitor]
            times = _spawn_times(command, runs)
            yield Result(f"start {name}", times, "ms", START_LIMIT_MS, bound)


def bench_exits(runs, quick):
    """The cost of one port access, without what else the guest does."""
    for name, opcode in (("write", 0xEE), ("read", 0xEC)):
        progress(f"exits, port {name}")
        with tempfile.NamedTemporaryFile(prefix="pyvmm-bench-") as image:
            image.write(rom(exit_loop(opcode)))
            image.flush()
            with Vmm(["-serial", "stdio", "-bios", image.name], monitor="none") as vm:
                vm.console.expect("(?s).")
                times = [_next_byte(vm.console) for _ in range(runs + 1)]
        costs = [(later - now) / 1e3 / EXITS for now, later in pairwise(times)]
        note = f"one exit to Python and back, mean of {EXITS}"
        yield Result(f"exit port {name}", costs, "us", note=note)


def _next_byte(console: Stream):
    console.expect("(?s).")
    return time.monotonic_ns()


def _spawn_times(command, runs):
    _spawn_time(command)  # fills the page cache and writes bytecode
    return [_spawn_time(command) for _ in range(runs)]


def _spawn_time(command):
    """ms from spawning ``command`` to its first byte on standard output; ends it."""
    read_fd, write_fd = os.pipe()
    actions = [
        (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
        (os.POSIX_SPAWN_DUP2, write_fd, 1),
        (os.POSIX_SPAWN_CLOSE, read_fd),
        (os.POSIX_SPAWN_CLOSE, write_fd),
    ]
    environment = os.environ | {"PYTHONDONTWRITEBYTECODE": ""}
    start = time.monotonic_ns()
    pid = os.posix_spawnp(command[0], command, environment, file_actions=actions)
    os.close(write_fd)
    stream = Stream(read_fd)
    try:
        stream.expect("(?s).", TIMEOUT_S)
        return (time.monotonic_ns() - start) / 1e6
    finally:
        stream.close()
        os.kill(pid, 15)
        os.waitpid(pid, 0)
