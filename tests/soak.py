"""``make soak``: updates one after the other under serial traffic, and what they leave behind.

    make soak ARGS="1000 --smp 2"

Prints the pause's percentiles and, all along, what must stay constant: descriptors, shared
mappings, threads, processes with the guest's memory, memory, environment, size of the state. The
exit code is 1 if anything did not, if the guest missed a number, or if a client heard late that its
connection was closed.
"""

import argparse
import os
import re
import socket
import statistics
import sys
import tempfile
from pathlib import Path

from faults.tools import Qmp
from harness import Vm, process, wait_until

MEMORY_TOLERANCE_KIB = 1024  # private memory beside the guest's
STATE_TOLERANCE = 256  # what the serial port's queues hold differs
STATE_EVERY = 20  # updates; the others keep their state in memory
SAMPLES = 10
PROGRAM = "ticker period=2"


class SoakError(AssertionError):
    """Something was not as it has to be."""


def constants(machine):
    """What an update must leave as it was: title -> value."""
    # Until the helpers have ended, and were waited for.
    fds, threads = machine.footprint()
    mappings = Path(f"/proc/{machine.pid}/maps").read_text().splitlines()
    ram = process.memfd(machine.pid, "pc.ram").stat().st_ino
    environment = Path(f"/proc/{machine.pid}/environ").read_bytes()
    return {
        "fds": len(fds),
        "memfds": sum(fd.startswith("/memfd:") for fd in fds),
        "shared": sum(line.split()[1].endswith("s") for line in mappings),
        "threads": len(threads),
        "processes": len(process.mappers(ram)),
        "environment": len(re.sub(rb"(PYVMM_CPR_EXEC_STATE)=\d+", rb"\1=", environment)),
        "arguments": len(" ".join(machine.cmdline)),
    }


def check_numbers(machine):
    """The guest's lines are contiguous, to the byte."""
    start = machine.serial.index(b"tick 1\r\n")
    lines = bytes(machine.serial[start:]).split(b"\r\n")[:-1]
    if lines != [b"tick %d" % number for number in range(1, len(lines) + 1)]:
        raise SoakError("the guest's output has a gap or a repetition")
    return len(lines)


def update(machine, qmp, state):
    """One update; its pause in ms.

    :param state: URI of a state file, or None for one in memory
    """
    if state:
        machine.set_update(uri=state)
    reply = machine.hmp(f"migrate {state}" if state else "update")
    info = qmp.execute("query-migrate")
    if reply or info["status"] != "completed" or not info["running"]:
        raise SoakError(f"{reply} {info}")
    return max(pause["takeover-us"] for pause in info["cpu-pauses"]) / 1000


def check_closed_at_once(machine, qmp):
    """A client is told as soon as a new image closes its connection: nobody else has it."""
    path = str(machine.folder / "side.sock")
    address = {"type": "unix", "data": {"path": path}}
    backend = {"type": "socket", "data": {"addr": address, "wait": False}}
    qmp.execute("chardev-add", id="side", backend=backend)
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(path)
        wait_until(lambda: "disconnected:unix" not in machine.hmp("info chardev"), "the client")
        update(machine, qmp, None)
        qmp.execute("chardev-remove", id="side")
        client.settimeout(1)
        try:
            rest = client.recv(1)
        except TimeoutError:
            rest = None
    if rest != b"":
        raise SoakError("the end of a connection was told late")


def soak(machine, updates, show=lambda _row: None):
    """Update again and again; pauses in ms.

    :param show: called with each row of values
    :raises SoakError: if anything is not as it was
    """
    pauses, sizes = [], set()
    machine.expect(r"tick 1\r\n")
    with Qmp(machine.folder / "qmp.sock") as qmp:
        for number in range(1, updates + 1):
            state = "file:vm.state" if number % STATE_EVERY == 1 else None
            pauses.append(update(machine, qmp, state))
            if state:
                sizes.add((machine.folder / "vm.state").stat().st_size)
            if number == 2:
                first, memory = constants(machine), machine.memory_kib("Anonymous")
            if number > 2 and (number % max(updates // SAMPLES, 1) == 0 or number == updates):
                # The command line names the state: of the same kind of update each time.
                if state:
                    continue
                check_closed_at_once(machine, qmp)
                now, held = constants(machine), machine.memory_kib("Anonymous")
                lines = check_numbers(machine)
                row = {"updates": number, **now, "KiB": held, "state": max(sizes)}
                show(row | {"lines": lines})
                if now != first:
                    raise SoakError(f"after {number} updates: {first} became {now}")
                if abs(held - memory) > MEMORY_TOLERANCE_KIB:
                    raise SoakError(f"after {number} updates: {memory} KiB became {held} KiB")
    if max(sizes) - min(sizes) > STATE_TOLERANCE:
        raise SoakError(f"the state's size varies: {sorted(sizes)}")
    if machine.stderr():
        raise SoakError(machine.stderr())
    return pauses


def percentile(values, percent):
    """The value that so many percent do not exceed."""
    return sorted(values)[min(len(values) * percent // 100, len(values) - 1)]


def main():
    """Soak and print; the exit code."""
    parser = argparse.ArgumentParser(prog="soak", description=__doc__.splitlines()[0])
    parser.add_argument("updates", nargs="?", type=int, default=1000, help="how many (1000)")
    parser.add_argument("--smp", type=int, default=2, help="vCPUs (2)")
    parser.add_argument("-m", "--memory", default="256M", help="guest memory (256M)")
    options = parser.parse_args()
    if options.updates < 4:
        parser.error("updates: at least 4")
    rows = []

    def show(row):
        if not rows:
            print("  ".join(f"{title:>11}" for title in row))
        rows.append(row)
        print("  ".join(f"{value:>11}" for value in row.values()), flush=True)

    with tempfile.TemporaryDirectory() as folder:
        os.environ["XDG_RUNTIME_DIR"] = folder
        machine = vm(Path(folder), smp=options.smp, memory=options.memory)
        try:
            with machine:
                pauses = soak(machine, options.updates, show)
        except AssertionError as error:
            print(f"soak: {error}\n{machine.report()[-4000:]}", file=sys.stderr)
            return 1
    print(
        f"\npause in ms, as pyvmm sees it: p50 {statistics.median(pauses):.3f}, "
        f"p99 {percentile(pauses, 99):.3f}, max {max(pauses):.3f}"
    )
    return 0


def vm(folder, **arguments):
    """The VM that is soaked; not started yet."""
    qmp = ("-qmp", "unix:qmp.sock,server=on,wait=off")
    return Vm(folder, *qmp, append=PROGRAM, **arguments)


if __name__ == "__main__":
    sys.exit(main())
