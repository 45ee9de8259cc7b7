"""What a VMM needs beside guest RAM, from /proc/PID/smaps."""

import re
import time

from report import Result, progress
from vmm import Vmm

MONITOR_LIMIT_MIB = 40.0
PLAIN_LIMIT_MIB = 25.0
UPDATES = 20
SETTLE_S = 0.5
MAPPING = re.compile(r"[0-9a-f]+-[0-9a-f]+ \S+ \S+ \S+ \d+ *(.*)")
RAM = "/memfd:pc.ram"


def bench_memory(runs, quick):
    """Fresh, and after a chain of updates; with each kind of monitor, and without."""
    updates = 3 if quick else UPDATES
    for monitor, limit in (
        ("none", PLAIN_LIMIT_MIB),
        ("unix", MONITOR_LIMIT_MIB),
        ("terminal", MONITOR_LIMIT_MIB),
    ):
        fresh, updated = {"Pss": [], "Rss": []}, {"Pss": [], "Rss": []}
        for number in range(min(runs, 3)):
            progress(f"memory, monitor {monitor}: {number + 1} of {min(runs, 3)}")
            serial = "null" if monitor == "terminal" else "stdio"
            with Vmm(["-serial", serial, "-append", "counter"], monitor=monitor) as vm:
                if vm.console:
                    vm.console.expect("counter ready")
                _measure(vm, fresh)
                if vm.hmp:
                    for _ in range(updates):
                        vm.update()
                    _measure(vm, updated)
        name = f"memory monitor {monitor}"
        yield from _rows(name, fresh, limit)
        if updated["Pss"]:
            yield from _rows(f"{name}, {updates} updates", updated, limit)


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
    # A command first, so that what it loads is counted.
    if vm.hmp:
        vm.hmp.command("info status")
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
