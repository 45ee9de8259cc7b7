"""The memory map that a kernel is told, from the regions of guest memory (e820 types)."""

from __future__ import annotations

from pyvmm.x86 import layout

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pyvmm.memory.guest import GuestMemory

RAM = 1
RESERVED = 2
ACPI = 3  # to be had once the tables in it were read


def memory_map(memory: GuestMemory) -> list[tuple[int, int, int]]:
    """Return ``(start, size, type)`` in bytes, in rising order, without overlaps.

    At the end of conventional memory are the firmware's tables. Reserved are what follows up to
    1 MiB, and the top of the 32-bit space.
    """
    entries = [
        (layout.TABLES_START, layout.EBDA_START - layout.TABLES_START, ACPI),
        (layout.EBDA_START, layout.HIGH_START - layout.EBDA_START, RESERVED),
        (layout.RESERVED_START, layout.ABOVE_4G_START - layout.RESERVED_START, RESERVED),
    ]
    for region in memory.regions:
        if not region.readonly:
            end = layout.TABLES_START if region.end == layout.VGA_START else region.end
            entries.append((region.gpa, end - region.gpa, RAM))
    return sorted(entries)
