"""Puts the parts of a kernel into guest RAM, clear of each other and of what the loader writes.

Main thread, while no vCPU runs.
"""

from __future__ import annotations

import os

from pyvmm._util.keyval import check_text
from pyvmm._util.sizes import format_size
from pyvmm.errors import ConfigError
from pyvmm.x86 import layout

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pyvmm.boot.blob import Blob
    from pyvmm.boot.elf import Elf, Segment
    from pyvmm.memory.guest import GuestMemory

OWN = (
    (layout.BOOT_RECORD, layout.BOOT_RECORD + layout.BOOT_RECORD_SIZE),
    (layout.START_INFO, layout.BOOT_INFO_END),
    (layout.CMDLINE, layout.CMDLINE + layout.CMDLINE_SIZE),
    (layout.PAGE_TABLES, layout.PAGE_TABLES_END),
    (layout.SETUP_DATA, layout.SETUP_DATA + layout.SETUP_DATA_SIZE),
    (layout.TABLES_START, layout.VGA_START),
)
"""What loader and firmware write, as ``(start, end)``; no part of a kernel may lie there."""


def load_segments(memory: GuestMemory, blob: Blob, executable: Elf, entry: int) -> int:
    """Load all segments of *executable*, which *blob* is; return the first address beyond them.

    :raises ConfigError: *entry*, where the kernel starts, is in none of them, or one of them
        cannot lie where it is meant to
    """
    for segment in executable.loads:
        _leave_headers(memory, executable, segment)
    executable.loads = [each for each in executable.loads if each.mem_size]
    inside = any(each.paddr <= entry < each.paddr + each.mem_size for each in executable.loads)
    if not inside or entry >= layout.BELOW_4G_END:
        raise blob.error(f"it starts at {entry:#x}, where nothing is loaded; link it anew")
    # The highest first: it tells how much RAM is needed.
    for segment in reversed(executable.loads):
        check_place(memory, blob, segment.paddr, segment.mem_size)
    for segment in executable.loads:
        blob.copy(segment.offset, segment.file_size, memory, segment.paddr)
        bss = segment.mem_size - segment.file_size
        memory.fill(segment.paddr + segment.file_size, bss)
    last = executable.loads[-1]
    return last.paddr + last.mem_size


def _leave_headers(memory: GuestMemory, executable: Elf, segment: Segment) -> None:
    # A linker that is not told otherwise maps the file's headers in front of the code, in a
    # segment of their own or the code's: for a kernel at 1 MiB that is where the ROM is seen.
    low = min(layout.HIGH_START - segment.paddr, segment.mem_size)
    if (
        low > 0
        and not _is_free(memory, segment.paddr, low)
        and executable.headers_within(segment, low)
    ):
        segment.cut(low)


def _is_free(memory: GuestMemory, gpa: int, size: int) -> bool:
    own = any(gpa < end and start < gpa + size for start, end in OWN)
    return memory.contains(gpa, size) and not own


def check_place(memory: GuestMemory, blob: Blob, gpa: int, size: int) -> None:
    """Check that a part of *blob* can lie at *gpa*.

    :raises ConfigError: not all of that is RAM, or it is not free
    """
    if not memory.contains(gpa, size):
        end = gpa + size
        mend = "link the kernel elsewhere"
        if gpa >= layout.HIGH_START and end <= layout.BELOW_4G_END:
            mend = f"give at least -m {-(-end >> 20)}M"
        raise blob.error(f"{size:#x} bytes to be loaded at {gpa:#x} are not all RAM; {mend}")
    for start, end in OWN:
        if gpa < end and start < gpa + size:
            raise blob.error(
                f"what is to be loaded at {gpa:#x} covers the boot structures at {start:#x};"
                " link the kernel at 1M or above"
            )


def load_initrd(
    memory: GuestMemory,
    blob: Blob | None,
    kernel_end: int,
    last: int = layout.BELOW_4G_END - 1,
) -> tuple[int, int] | None:
    """Load the initrd at the top of RAM below 4 GiB; return where, and its size.

    :param last: highest address that it may occupy
    :raises ConfigError: the file cannot be read or does not fit
    """
    if not blob:
        return None
    ram_end = max(
        region.end for region in memory.regions
        if not region.readonly and region.end <= layout.BELOW_4G_END
    )  # fmt: skip
    start = (min(ram_end, last + 1) - blob.size) & -layout.PAGE
    if start < max(kernel_end, layout.HIGH_START):
        limit = f" and below {last + 1:#x}" if last + 1 < ram_end else ""
        raise blob.error(
            f"{format_size(blob.size)} do not fit into RAM above the kernel{limit};"
            f" {'give a smaller one' if limit else 'give more with -m'}"
        )
    blob.copy(0, blob.size, memory, start)
    return start, blob.size


def write_cmdline(
    memory: GuestMemory,
    text: str,
    first: bytes = b"",
    limit: int = layout.CMDLINE_SIZE - 1,
) -> int:
    """Write the kernel command line; return its address.

    :param first: what is put before it
    :param limit: longest that the kernel takes, without the NUL
    :raises ConfigError: it is too long, or no command line
    """
    check_text(text, "-append")
    data = os.fsencode(text)
    limit = min(limit, layout.CMDLINE_SIZE - 1) - len(first)
    if len(data) > limit:
        raise ConfigError(f"-append: {len(data)} bytes are too long; give at most {limit}")
    if any(byte < 0x20 and byte != 0x09 for byte in data):
        raise ConfigError("-append: it has a control character; write it on one line")
    memory.write(layout.CMDLINE, first + data + b"\0")
    return layout.CMDLINE
