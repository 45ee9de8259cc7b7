"""Linux kernels that are entered in long mode: a bzImage, or a vmlinux without a PVH note.

A bzImage is unpacked by the host and the ELF within is entered directly, at the address that it
is linked for (what its own decompressor does last), or it is loaded as it is and unpacks itself.
The latter also if its payload is of a format that is not known here. Without its decompressor a
kernel does not move: there is no KASLR. Main thread, fresh boots and resets only.
"""

from __future__ import annotations

from pyvmm.boot import cache, unpack
from pyvmm.boot.blob import DataBlob
from pyvmm.boot.bzimage import ENTRY_64, BzImage
from pyvmm.boot.elf import MAGIC, Elf
from pyvmm.boot.place import check_place, load_segments
from pyvmm.x86 import layout

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pyvmm.boot.blob import Blob
    from pyvmm.memory.guest import GuestMemory

CMDLINE_SIZE = 2047
"""What a kernel without a setup header takes: x86's COMMAND_LINE_SIZE without the NUL."""
INITRD_ADDR_MAX = 0x7FFF_FFFF
"""What every 64-bit kernel's setup header says of the initial RAM disk."""

_START_KERNEL_MAP = 0xFFFF_FFFF_8000_0000
_ALIGN_MIN = 2 << 20


class LinuxKernel:
    """A kernel in guest memory, from ``start`` up to ``end``, to be entered at ``entry``.

    ``header`` is its setup header, empty if it has none; the other two are the limits that it sets.
    """

    __slots__ = ("cmdline_size", "end", "entry", "header", "initrd_addr_max", "start")

    def __init__(self, entry: int, start: int, end: int, header: BzImage | None = None) -> None:
        self.entry = entry
        self.start = start
        self.end = end
        self.header = header.header if header else b""
        self.cmdline_size = header.cmdline_size if header else CMDLINE_SIZE
        self.initrd_addr_max = header.initrd_addr_max if header else INITRD_ADDR_MAX


def is_vmlinux(executable: Elf) -> bool:
    """Return whether a 64-bit *executable* shows that it is Linux.

    It has notes of that name, as all have since Linux 4.20 (include/linux/build-salt.h), or it is
    linked as Linux is (arch/x86/kernel/vmlinux.lds.S): the lowest part at a multiple of the
    smallest alignment, 2 MiB, and that much above the last 2 GiB of the virtual addresses; with
    the physical address of its entry, in that part, in the header.
    """
    first = executable.loads[0]
    return executable.find_note(b"Linux\0") is not None or (
        first.vaddr == _START_KERNEL_MAP + first.paddr
        and first.paddr % _ALIGN_MIN == 0
        and first.paddr <= executable.entry < first.paddr + first.mem_size
    )


def load_vmlinux(
    memory: GuestMemory, blob: Blob, executable: Elf, header: BzImage | None = None
) -> LinuxKernel:
    """Load the 64-bit ELF file *blob*; return the kernel.

    :param header: of the bzImage that it was unpacked from
    :raises ConfigError: it cannot lie where it is linked for
    """
    if not executable.is_64:
        raise blob.error("32-bit ELF, and Linux is entered in 64 bits; give a 64-bit kernel")
    entry = executable.physical(executable.entry)
    end = load_segments(memory, blob, executable, entry)
    return LinuxKernel(entry, executable.loads[0].paddr, end, header)


def load_bzimage(memory: GuestMemory, blob: Blob, by_host: bool) -> LinuxKernel:
    """Load the bzImage *blob*, unpacked if *by_host* says so and its format is known; return the
    kernel.

    :raises ConfigError: it is malformed, or there is no RAM where it is meant to run
    """
    header = BzImage(blob)
    unpacked = _unpacked(blob, header) if by_host else None
    if unpacked:
        with unpacked:
            return load_vmlinux(memory, unpacked, Elf(unpacked), header)
    start, end = header.load_at, header.load_at + header.init_size
    if end > layout.BELOW_4G_END:
        raise blob.error(f"it is meant to run at {start:#x}, beyond 3G; build it for less")
    check_place(memory, blob, start, header.init_size)
    blob.copy(*header.code, memory, start)
    return LinuxKernel(start + ENTRY_64, start, end, header)


def prepare(blob: Blob, header: BzImage) -> None:
    """Import what it takes to unpack the bzImage *blob* once more."""
    import hashlib  # noqa: F401  (of the cache)

    offset, size = header.payload
    unpack.prepare(blob.read(offset, min(size, 16)))


def _unpacked(blob: Blob, header: BzImage) -> Blob | None:
    offset, size = header.payload
    head = blob.read(offset, min(size, 16))
    packed = unpack.is_known(head)
    if size > unpack.UNPACKED_MAX or not (packed or head.startswith(MAGIC)):
        return None
    payload = blob.read(offset, size)
    if not packed:
        return DataBlob(blob, payload)
    name = cache.key(payload)
    kept = cache.get(name)
    if kept:
        # Errors are about the file that the operator named.
        kept.path, kept.option = blob.path, blob.option
        return kept
    data = unpack.unpack(blob, payload)
    cache.put(name, data)
    return DataBlob(blob, data)
