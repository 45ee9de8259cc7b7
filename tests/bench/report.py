"""Results of the benchmarks: statistics, ratios, the table, the JSON file."""

import json
import random
import sys
import threading
import time

#: Units of ratios, and what their spread is the spread of.
PAIRED, MEDIANS = "x", "x~"
UNITS = {
    PAIRED: "ratios of samples that were taken one after the other",
    MEDIANS: "ratio of the medians; its spread by bootstrap",
}
RESAMPLES = 200
#: How long nothing is said at the most.
SILENCE_S = 10.0


class Result:
    """One row.

    :param name: benchmark and variant; rows that belong together have the same text before ": "
    :param samples: what was measured; may be empty, then ``note`` says why
    :param unit: of the samples
    :param limit: the target: the median must not be above it; None if there is none
    :param note: what the reader must know about it
    :param tail: a target for the 99th percentile, likewise
    :param failed: the benchmark of that name came to an end before its time
    """

    def __init__(self, name, samples, unit, limit=None, note="", *, tail=None, failed=False):
        self.name = name
        self.samples = samples
        self.unit = unit
        self.limit = limit
        self.tail = tail
        self.note = note
        self.failed = failed

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


def paired(name, own, other, limit=None):
    """The row of the ratios of samples that were taken in turns, the first with the first."""
    ratios = [one / two for one, two in zip(own, other, strict=True)]
    return Result(name, ratios, PAIRED, limit)


def of_medians(name, own, other):
    """The row of the ratio of two medians; its spread is that of samples like these."""
    chance = random.Random(0)  # the same samples give the same row

    def median(samples):
        return percentile(chance.choices(samples, k=len(samples)), 50)

    pairs = [(median(own), median(other)) for _ in range(RESAMPLES)]
    return Result(name, [one / two if two else float("nan") for one, two in pairs], MEDIANS)


def table(results, colour):
    """The rows under their headings, as text; what rows have in common is said once."""
    head = ("benchmark", "unit", "n", "median", "p10", "p90", "p99", "target", "")
    rows, common = [head], None
    for result in results:
        title, _, part = result.name.rpartition(": ")
        name = f"  {part}" if title and title == common else result.name
        common = title
        spread = [""] * 4
        if result.samples:
            spread = [_shown(percentile(result.samples, percent)) for percent in (50, 10, 90, 99)]
        target = "" if result.limit is None else f"<= {result.limit:.2f}"
        if result.tail is not None:
            target += f", p99 <= {result.tail:.2f}"
        verdict = {True: "pass", False: "FAIL", None: ""}[result.passed]
        count = str(len(result.samples))
        rows.append((name, result.unit, count, *spread, target, verdict))
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
    used = {result.unit for result in results}
    lines += [f"{unit}: {meaning}" for unit, meaning in UNITS.items() if unit in used]
    return "\n".join(lines)


def _shown(value):
    """A figure with as many places as say something."""
    return f"{value:.2f}" if abs(value) < 1000 else f"{value:.0f}"


def header(facts):
    """The facts about the host, one a line, as text."""
    width = max(len(name) for name in facts)
    return "\n".join(f"{name.ljust(width)}  {_told(value)}" for name, value in facts.items())


def _told(value):
    if isinstance(value, dict):
        return "; ".join(f"{name}: {_told(one)}" for name, one in value.items())
    if isinstance(value, (list, tuple)):
        return " ".join(_told(one) for one in value)
    return f"{value:.2f}" if isinstance(value, float) else str(value)


def write_json(path, facts, results):
    """Everything, with all samples."""
    found = {"host": facts, "units": UNITS, "results": [one.as_dict() for one in results]}
    with open(path, "w", encoding="utf-8") as file:
        json.dump(found, file, indent=1)
        file.write("\n")


class Progress:
    """Tells whoever waits what is being done, and again if it takes long."""

    def __init__(self):
        self._told = threading.Event()
        self._text, self._since = "", time.monotonic()

    def tell(self, text):
        """Say what begins now."""
        self._text, self._since = text, time.monotonic()
        self._told.set()
        self._say(text)

    def repeat(self, silence_s=SILENCE_S):
        """Begin to say what takes so long, whenever nothing was said for a while."""
        threading.Thread(target=self._repeat, args=(silence_s,), daemon=True).start()

    def _repeat(self, silence_s):
        while True:
            if self._told.wait(silence_s):
                self._told.clear()
            elif self._text:
                self._say(f"{self._text}: {time.monotonic() - self._since:.0f} s")

    def _say(self, text):
        print(text, file=sys.stderr, flush=True)


_progress = Progress()
progress, repeat_progress = _progress.tell, _progress.repeat
