"""Flat real-mode images: raw bytes at 0x7c00, as a BIOS leaves a boot sector, of any length.

Entry is 0000:7c00 with all segments 0, SP 0x7c00 and interrupts off. There is no disk behind it.
"""

from __future__ import annotations

from pyvmm._util.sizes import format_size
from pyvmm.x86 import layout

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pyvmm.boot.blob import Blob
    from pyvmm.memory.guest import GuestMemory

SIGNATURE = b"\x55\xaa"
"""What makes a BIOS take a sector for a boot sector, at :data:`SIGNATURE_AT`."""
SIGNATURE_AT = 510
SIZE_MAX = layout.TABLES_START - layout.FLAT_START


def load(memory: GuestMemory, blob: Blob) -> int:
    """Load *blob*; return where it starts.

    :raises ConfigError: it does not fit
    """
    if blob.size > SIZE_MAX:
        raise blob.error(
            f"{blob.size} bytes are too large for a flat real-mode image, which has at most"
            f" {SIZE_MAX} ({format_size(SIZE_MAX)}); give a kernel, or a disk image with -drive"
        )
    blob.copy(0, blob.size, memory, layout.FLAT_START)
    return layout.FLAT_START
