"""What a VMM needs beside guest RAM, from /proc/PID/smaps."""

import contextlib
import re
import tempfile
import time

from harness.terminal import Terminal

from bench.machines import Vmm
from bench.report import Result, progress

MONITOR_LIMIT_MIB = 40.0
PLAIN_LIMIT_MIB = 25.0
UPDATES = 20
SETTLE_S = 0.5
MAPPING = re.compile(r"[0-9a-f]+-[0-9a-f]+ \S+ \S+ \S+ \d+ *(.*)")
RAM = "/memfd:pc.ram"


def bench_memory(plan):
    """Fresh, and after a chain of updates; with each kind of monitor, and without."""
    updates = 3 if plan.quick else UPDATES
    for monitor, limit in (
        ("none", PLAIN_LIMIT_MIB),
        ("unix", MONITOR_LIMIT_MIB),
        ("terminal", MONITOR_LIMIT_MIB),
    ):
        fresh, updated = {"Pss": [], "Rss": []}, {"Pss": [], "Rss": []}
        for number in range(plan.runs):
            progress(f"memory, monitor {monitor}: {number + 1} of {plan.runs}")
            with _MACHINES[monitor](plan.version) as vm:
                _measure(vm, fresh)
                if monitor != "none":
                    for _ in range(updates):
                        vm.update()
                    _measure(vm, updated)
        name = f"memory monitor {monitor}"
        yield from _rows(name, fresh, limit)
        if updated["Pss"]:
            yield from _rows(f"{name}, {updates} updates", updated, limit)


@contextlib.contextmanager
def _counting(version, **arguments):
    with Vmm(append="counter", version=version, **arguments) as vm:
        vm.expect("counter ready")
        if arguments.get("monitor", True):
            vm.hmp("info status")  # so that what a command loads is counted
        yield vm


class _OnTerminal(Terminal):
    """A machine with its monitor on a terminal."""

    def __init__(self, version):
        self._scratch = tempfile.TemporaryDirectory(prefix="pyvmm-bench-")
        options = ("-m", "256M", "-serial", "null", "-append", "counter", "-monitor", "stdio")
        super().__init__(self._scratch.name, *options, columns=1000, program=version.run)

    def __enter__(self):
        self.expect(r"\(pyvmm\)")
        self.command("info status", "VM status: running")
        return self

    def __exit__(self, *_):
        self.close()
        self._scratch.cleanup()

    def update(self):
        """Replace pyvmm by the same one."""
        self.command("update")


_MACHINES = {
    "none": lambda version: _counting(version, monitor=False),
    "unix": _counting,
    "terminal": _OnTerminal,
}


def beside_ram(smaps, ram=RAM):
    """Sums in MiB of Pss and Rss over all mappings of ``smaps`` but those of guest RAM."""
    sums = {"Pss": 0, "Rss": 0}
    counted = True
    for line in smaps.splitlines():
        mapping = MAPPING.fullmatch(line)
        if mapping:
            counted = not mapping[1].startswith(ram)
            continue
        key, _, value = line.partition(":")
        if counted and key in sums:
            sums[key] += int(value.split()[0])
    return {key: kib / 1024 for key, kib in sums.items()}


def _measure(vm, into):
    time.sleep(SETTLE_S)
    with open(f"/proc/{vm.pid}/smaps", encoding="utf-8", errors="replace") as file:
        for key, mib in beside_ram(file.read()).items():
            into[key].append(mib)


def _rows(name, sums, limit):
    return [
        Result(name, sums["Pss"], "MiB", limit, "Pss beside guest RAM"),
        Result(
            f"  {name}, Rss", sums["Rss"], "MiB", note="with what it shares with other processes"
        ),
    ]
