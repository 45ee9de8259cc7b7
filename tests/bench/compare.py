"""Two versions of pyvmm in one run: what else the host does meets both.

They are measured in turns of a few samples, and which of them begins changes from turn to turn.
"""

from bench.report import Result, of_medians


def bench(benchmark, plan, other, turn):
    """Three rows for each of the benchmark's: this version, the other one, and the ratio of the
    medians; one row for what only one of them has, or what was left out.

    :param plan: of this version
    :param other: the version to compare with
    :param turn: samples of one version before it is the other's turn
    """
    found = {}
    try:
        for result, version in _measured(benchmark, plan, other, turn):
            own = found.setdefault(result.name, {})
            if version in own:
                own[version].samples += result.samples
            else:
                own[version] = result
    finally:
        # Keeps what was found before one of them failed.
        for results in found.values():
            yield from _rows(results, plan.version, other)


def _measured(benchmark, plan, other, turn):
    pair = [plan.version, other]
    for start in range(0, plan.runs, turn):
        runs = min(turn, plan.runs - start)
        for version in pair:
            for result in benchmark(plan.but(version=version, runs=runs)):
                yield result, version
        pair.reverse()


def _rows(results, this, other):
    own, theirs = results.get(this), results.get(other)
    if own is None:
        yield Result(f"{theirs.name}, only in {other.name}", theirs.samples, theirs.unit)
        return
    yield own
    if theirs is None or not theirs.samples or not own.samples:
        return
    yield Result(f"  {other.name}", theirs.samples, theirs.unit)
    yield of_medians(f"  {this.name}/{other.name}", own.samples, theirs.samples)
