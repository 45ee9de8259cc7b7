"""A measurement of pyvmm and, where there is one, of QEMU's microvm with the same back end.

In turns, so that what else the host does meets both; the ratio is of neighbouring runs.
"""

import shutil

from bench.machines import BenchError, Qemu, QemuVirtio, Vmm
from bench.report import Result, progress


def beside(name, unit, runs, measure, limit=None, *, less_is_better=False):
    """Three rows: pyvmm, QEMU, and how many times as good QEMU is.

    :param measure: gives a sample; called with :class:`Vmm` or :class:`QemuVirtio`
    :param limit: how many times as good QEMU may be; None: the ratio is only told
    """
    kinds = [Vmm]
    if shutil.which(Qemu.program):
        kinds.append(QemuVirtio)
    found = {kind.program: [] for kind in kinds}
    for number in range(runs):
        progress(f"{name} {number + 1}/{runs}")
        for kind in kinds:
            found[kind.program].append(measure(kind))
            if not found[kind.program][-1]:
                raise BenchError(f"{name}: {kind.program} did nothing")
    results = [Result(f"{name} {who}", samples, unit) for who, samples in found.items()]
    if len(kinds) == 1:
        results[0].note = "no QEMU to compare with"
        return results
    ratios = [
        own / other if less_is_better else other / own
        for own, other in zip(*found.values(), strict=True)
    ]
    title = f"{name} pyvmm/QEMU" if less_is_better else f"{name} QEMU/pyvmm"
    return [*results, Result(title, ratios, "x", limit)]
