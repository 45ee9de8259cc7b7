"""Results of the benchmarks: statistics, the table, the JSON file."""

import json
import os
import platform
import sys
from datetime import UTC, datetime

import pyvmm


class Result:
    """One row.

    :param name: benchmark and variant
    :param samples: what was measured; may be empty, then ``note`` says why
    :param unit: of the samples
    :param limit: the target: the median must not be above it; None if there is none
    :param note: what the reader must know about it
    :param tail: a target for the 99th percentile, likewise
    """

    def __init__(self, name, samples, unit, limit=None, note="", *, tail=None):
        self.name = name
        self.samples = samples
        self.unit = unit
        self.limit = limit
        self.tail = tail
        self.note = note

    @property
    def median(self):
        """The median, None without samples."""
        return percentile(self.samples, 50) if self.samples else None

    @property
    def passed(self):
        """Whether the targets were met, None if there is none or nothing was measured."""
        limits = [(50, self.limit), (99, self.tail)]
        met = [
            percentile(self.samples, percent) <= limit
            for percent, limit in limits
            if limit is not None and self.samples
        ]
        return all(met) if met else None

    def as_dict(self):
        """For JSON."""
        found = {"name": self.name, "unit": self.unit, "target": self.limit, "pass": self.passed}
        if self.tail is not None:
            found["target-p99"] = self.tail
        if self.samples:
            found |= {
                "median": self.median,
                "p10": percentile(self.samples, 10),
                "p90": percentile(self.samples, 90),
                "p99": percentile(self.samples, 99),
                "min": min(self.samples),
                "max": max(self.samples),
            }
        return found | {"note": self.note, "samples": self.samples}


def percentile(samples, percent):
    """By linear interpolation between the two nearest samples."""
    ordered = sorted(samples)
    at = (len(ordered) - 1) * percent / 100
    low = int(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (at - low)


def table(results, colour):
    """The rows under their headings, as text."""
    head = ("benchmark", "unit", "n", "median", "p10", "p90", "p99", "min", "max", "target", "")
    rows = [head]
    for result in results:
        spread = [""] * 6
        if result.samples:
            samples = result.samples
            values = [percentile(samples, percent) for percent in (50, 10, 90, 99)]
            spread = [f"{value:.2f}" for value in (*values, min(samples), max(samples))]
        target = "" if result.limit is None else f"<= {result.limit:.2f}"
        if result.tail is not None:
            target += f", p99 <= {result.tail:.2f}"
        verdict = {True: "pass", False: "FAIL", None: ""}[result.passed]
        count = str(len(result.samples))
        rows.append((result.name, result.unit, count, *spread, target, verdict))
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    lines = []
    for row, result in zip(rows, [None, *results], strict=True):
        cells = [cell.rjust(width) for cell, width in zip(row, widths, strict=True)]
        cells[0] = row[0].ljust(widths[0])
        cells[1] = row[1].ljust(widths[1])
        if colour and row[-1]:
            cells[-1] = f"\x1b[{32 if result.passed else 31}m{cells[-1]}\x1b[0m"
        lines.append("  ".join(cells).rstrip())
        if result and result.note:
            lines.append(f"    {result.note}")
    return "\n".join(lines)


def host():
    """What the numbers depend on."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "pyvmm": pyvmm.__version__,
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "kernel": platform.release(),
        "cpu": _cpu(),
        "cpus": len(os.sched_getaffinity(0)),
        "kvm": sorted(name for name in os.listdir("/sys/module") if name.startswith("kvm")),
        "load": os.getloadavg(),
    }


def write_json(path, facts, results):
    """Everything, with all samples."""
    with open(path, "w", encoding="utf-8") as file:
        json.dump({"host": facts, "results": [one.as_dict() for one in results]}, file, indent=1)
        file.write("\n")


def progress(text):
    """Tell whoever waits."""
    print(text, file=sys.stderr, flush=True)


def _cpu():
    with open("/proc/cpuinfo", encoding="utf-8") as file:
        for line in file:
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.machine()
