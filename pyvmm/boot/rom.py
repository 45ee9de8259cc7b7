"""The ROM: reads its file and maps it where the processor starts and where real mode sees it."""

from __future__ import annotations

from pyvmm.memory.guest import MemoryRegion
from pyvmm.x86 import layout

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pyvmm.memory.backend import RamBackend
    from pyvmm.memory.guest import GuestMemory


def read(path: str) -> bytes:
    """Return the contents of the file that ``-bios`` names: whole pages, at most 256 KiB.

    :raises ConfigError: the file cannot be read, or has another size
    """
    # A new image of an update has the ROM already.
    from pyvmm.boot.blob import FileBlob

    with FileBlob(path, "-bios", layout.ROM_MAX) as blob:
        if blob.size % layout.PAGE:
            raise blob.error(f"{blob.size} bytes are not a multiple of 4K; pad the image")
        return blob.read(0, blob.size)


def ranges(size: int) -> list[tuple[int, int, int]]:
    """Return where *size* bytes of ROM are seen, as ``(gpa, length, offset in the ROM)``.

    All of it ends at 4 GiB; its last part, at most 128 KiB, ends at 1 MiB too.
    """
    mirror = min(size, layout.ROM_MIRROR_MAX)
    return [
        (layout.ROM_MIRROR_END - mirror, mirror, size - mirror),
        (layout.ROM_END - size, size, 0),
    ]


def add(memory: GuestMemory, backend: RamBackend, ram: RamBackend) -> None:
    """Add *backend*, which holds the ROM's bytes, to guest memory, read-only.

    The place of option ROMs below it is filled with what *ram* has there, where it is not seen as
    RAM: zeros, which the guest cannot change either.
    """
    found = ranges(backend.size)
    for gpa, size, offset in found:
        memory.add(MemoryRegion(backend.name, gpa, size, backend, offset, readonly=True))
    start, size = layout.OPTION_ROMS, found[0][0] - layout.OPTION_ROMS
    memory.add(MemoryRegion("option ROMs", start, size, ram, start, readonly=True))
