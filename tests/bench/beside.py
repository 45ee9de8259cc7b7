"""A measurement of pyvmm and, where there is one, of QEMU's microvm with the same back end and the
same kind of memory, and with the memory that it takes by itself.

In turns, so that what else the host does meets all; the ratios are of neighbouring runs.
"""

import shutil

from bench.machines import BenchError, Qemu, QemuDefault, QemuVirtio, Vmm
from bench.report import Result, paired, progress


def beside(name, unit, plan, measure, limit=None, *, less_is_better=False):
    """The rows of one figure: see :func:`turns` and :func:`rows`.

    :param measure: gives a sample; called with one of the kinds of machines
    """
    found = turns(name, plan, measure)
    for kind, samples in found.items():
        if not all(samples):
            raise BenchError(f"{name}: {kind.label} did nothing")
    results = rows(name, unit, found, limit, less_is_better=less_is_better)
    if len(found) == 1:
        results[0].note = "no QEMU to compare with"
    return results


def turns(name, plan, measure):
    """What ``measure(kind)`` gives, as lists by kind: one of each kind after the other."""
    kinds = [Vmm]
    if plan.beside and shutil.which(Qemu.program):
        kinds += [QemuVirtio] if plan.quick else [QemuVirtio, QemuDefault]
    found = {kind: [] for kind in kinds}
    for number in range(plan.runs):
        progress(f"{name} {number + 1}/{plan.runs}")
        for kind in kinds:
            found[kind].append(measure(kind))
    return found


def rows(name, unit, found, limit=None, *, less_is_better=False):
    """A row for each kind, and how many times as good each QEMU is.

    :param found: samples by kind, pyvmm's first
    :param limit: how many times as good the QEMU with the same memory may be; None: the ratio is
        only told
    """
    (own, *others), (ours, *theirs) = found, found.values()
    results = [Result(f"{name}: {kind.label}", one, unit) for kind, one in found.items()]
    for kind, samples in zip(others, theirs, strict=True):
        most = limit if kind.memory == own.memory else None
        if less_is_better:
            results.append(paired(f"{name}: {own.label}/{kind.label}", ours, samples, most))
        else:
            results.append(paired(f"{name}: {kind.label}/{own.label}", samples, ours, most))
    return results
