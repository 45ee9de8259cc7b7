"""bzImage, Linux's compressed kernel: reads and checks the setup header (boot.rst, 2.12 or later).

Only what is entered in long mode: kernels of 64 bits since Linux 3.8. The real-mode part of the
file is left out. The header is hostile: what it points to is checked to lie within the file here
and within RAM where it is loaded.
"""

from __future__ import annotations

import struct

from pyvmm.boot import bootparams
from pyvmm.x86 import layout

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pyvmm.boot.blob import Blob

ENTRY_64 = 0x200
"""Where the code behind the setup sectors is entered in long mode."""

_SECTOR = 512
_PARAGRAPH = 16
_HEADER_MIN = 0x264  # ends with init_size
_VERSION_MIN = 0x20C
_LOADED_HIGH = 1 << 0
_XLF_KERNEL_64 = 1 << 0


class BzImage:
    """What a loader has to know of a bzImage; sizes and file offsets in bytes.

    :ivar header: the setup header, from 0x1f1
    :ivar code: offset and size of the protected-mode code
    :ivar payload: offset and size of the compressed kernel; size 0 if the header does not tell
    :ivar load_at: guest-physical address where the kernel is meant to run
    :ivar init_size: memory that it needs from there on before it reads the memory map
    :ivar initrd_addr_max: highest address that the initial RAM disk may occupy
    :ivar cmdline_size: longest command line, without its NUL
    :raises ConfigError: the header is malformed, or the kernel has no 64-bit entry
    """

    __slots__ = (
        "cmdline_size",
        "code",
        "header",
        "init_size",
        "initrd_addr_max",
        "load_at",
        "payload",
    )

    def __init__(self, blob: Blob) -> None:
        head = blob.head(2 * _SECTOR)
        if len(head) < _HEADER_MIN:
            raise blob.error("a bzImage that ends within its setup header; it is truncated")

        def field(kind: str, offset: int) -> int:
            value: int = struct.unpack_from(f"<{kind}", head, offset)[0]
            return value

        if field("H", 0x1FE) != bootparams.BOOT_FLAG:
            raise blob.error("a bzImage without the boot flag 0xaa55; it is damaged")
        high, wide = head[0x211] & _LOADED_HIGH, field("H", 0x236) & _XLF_KERNEL_64
        if field("H", 0x206) < _VERSION_MIN or not high or not wide:
            raise blob.error("a bzImage without a 64-bit entry; give a 64-bit Linux 3.8 or newer")
        # The jump over the header tells where it ends.
        end = 0x202 + head[0x201]
        if end < _HEADER_MIN:
            raise blob.error(f"the setup header of the bzImage ends at {end:#x}; it is damaged")
        self.header = head[bootparams.HEADER : min(end, bootparams.HEADER_END)]
        start = ((head[0x1F1] or 4) + 1) * _SECTOR
        size = field("I", 0x1F4) * _PARAGRAPH
        # syssize counts paragraphs of 16 bytes, the last of which the file need not fill. What is
        # beyond is none of the kernel: signatures are appended there.
        if 0 < start + size - blob.size < _PARAGRAPH:
            size = blob.size - start
        if size <= ENTRY_64 or start + size > blob.size:
            raise blob.error(
                f"the bzImage should have {start} + {size} bytes, but it has {blob.size}; it is"
                " truncated or damaged"
            )
        self.code = (start, size)
        offset, length = field("I", 0x248), field("I", 0x24C)
        if offset + length > size:
            raise blob.error("the payload of the bzImage lies beyond its end; it is damaged")
        self.payload = (start + offset, length if offset else 0)
        alignment = field("I", 0x230) if head[0x234] else 1
        if not alignment or alignment & (alignment - 1):
            raise blob.error(f"kernel_alignment {alignment:#x} of the bzImage is no power of two")
        preferred = field("Q", 0x258) or layout.HIGH_START
        self.load_at = preferred + -preferred % alignment
        self.init_size = max(field("I", 0x260), size)
        self.initrd_addr_max = field("I", 0x22C)
        self.cmdline_size = field("I", 0x238)
