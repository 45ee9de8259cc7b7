"""The table of what native code answers (``_native/answers.h``), as the buses are: made of what
the devices there declare (``core.native``), and given to all vCPUs.

Regions come, go and move while vCPUs run: then there is another table, and the one before is kept
for as long as a vCPU is in it.
"""

from __future__ import annotations

from pyvmm._native import ffi, memory_barrier
from pyvmm.core.threads import Lock

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from typing import Any

    from pyvmm.core.bus import Bus, BusDevice
    from pyvmm.kvm.vcpu import Vcpu

#: Registers of memory are 4 bytes apart.
_MMIO_UNIT = 4


class Answers:
    """The table of one machine, which its buses keep.

    :param vcpus: who is given it
    :param ports: the bus of IN and OUT
    :param mmio: that of addresses without memory
    """

    def __init__(self, vcpus: Sequence[Vcpu], ports: Bus, mmio: Bus) -> None:
        self._gates = [vcpu.gate for vcpu in vcpus]
        self._buses = ((ports, 1), (mmio, _MMIO_UNIT))
        self._lock = Lock()
        # Each with the devices, which keep what it points to.
        self._tables: list[tuple[Any, list[BusDevice]]] = []
        for bus, _ in self._buses:
            bus.observe(self._replace)
        self._replace()

    def _replace(self) -> None:
        with self._lock:
            latest = self._make()
            for gate in self._gates:
                gate.answers = latest[0]
            # A vCPU says first which one it uses, and then looks whether that is the latest.
            memory_barrier()
            used = {gate.used for gate in self._gates}
            self._tables = [table for table in self._tables if table[0] in used]
            self._tables.append(latest)

    def _make(self) -> tuple[Any, list[BusDevice]]:
        found = [
            [
                (region, region.device.answers, unit)
                for region in bus.regions
                if region.device.answers
            ]
            for bus, unit in self._buses
        ]
        entries = [entry for bus in found for entry in bus]
        table = ffi.new("struct pyvmm_answers *", {"regions": len(entries)})
        table.port_count, table.mmio_count = map(len, found)
        for entry, (region, answers, unit) in zip(table.regions, entries, strict=True):
            entry.start, entry.length = region.start, region.length
            entry.reads = _bits(answers.reads, unit)
            entry.writes = _bits(answers.writes, unit)
            entry.kind = answers.kind
            entry.device = answers.device
        return table, [region.device for region, _, _ in entries]


def _bits(offsets: Iterable[int], unit: int) -> list[int]:
    bits = sum(1 << offset // unit for offset in offsets)
    return [bits & (1 << 64) - 1, bits >> 64]
