"""Puts a kernel into guest memory, whatever kind it is, and says how to enter it.

The kind is told by content: an ELF file with a PVH note, a multiboot header, or else a flat
real-mode image. Of a kernel that can do both, a 32-bit one is entered by multiboot, as other
loaders do, and a 64-bit one by PVH, since multiboot knows 32-bit ELF only. Main thread, while no
vCPU runs: before the start and again at each reset, since the guest has written over its own
image by then. After a live update nothing is loaded.
"""

from __future__ import annotations

import os
import struct

from pyvmm._util.keyval import check_text
from pyvmm._util.sizes import format_size
from pyvmm.boot import elf, flat, multiboot, pvh
from pyvmm.boot.image import ImageFile
from pyvmm.errors import ConfigError
from pyvmm.x86 import layout

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pyvmm.memory.guest import GuestMemory

# Kinds in the boot record.
NONE, PVH, MULTIBOOT, FLAT = range(4)

_RECORD = struct.Struct("<4sIIII12x")
_RECORD_MAGIC = b"PVMB"
_OWN = (
    (layout.BOOT_RECORD, layout.BOOT_RECORD + layout.BOOT_RECORD_SIZE),
    (layout.START_INFO, layout.BOOT_INFO_END),
    (layout.CMDLINE, layout.CMDLINE + layout.CMDLINE_SIZE),
    (layout.TABLES_START, layout.VGA_START),
)


class KernelConfig:
    """``-kernel``, ``-initrd`` and ``-append``; an empty path means none."""

    __slots__ = ("append", "initrd", "kernel")

    def __init__(self, kernel: str = "", initrd: str = "", append: str = "") -> None:
        self.kernel = kernel
        self.initrd = initrd
        self.append = append


class LoadedKernel:
    """How to enter what was loaded.

    ``kind`` NONE means the reset vector; FLAT real mode at 0000:entry, all segments 0, SP equal
    to entry; PVH and MULTIBOOT 32-bit protected mode without paging, flat 4 GiB segments,
    interrupts off, with ``eax`` and ``ebx`` as given. The boot record says the same to the ROM.
    """

    __slots__ = ("eax", "ebx", "entry", "kind")

    def __init__(self, kind: int, entry: int, eax: int = 0, ebx: int = 0) -> None:
        self.kind = kind
        self.entry = entry
        self.eax = eax
        self.ebx = ebx

    @property
    def is_real_mode(self) -> bool:
        """Whether the processor starts in real mode."""
        return self.kind in (NONE, FLAT)


def load(memory: GuestMemory, config: KernelConfig, rsdp: int = 0) -> LoadedKernel:
    """Load as *config* says, and leave the boot record for the ROM.

    :param rsdp: address of ACPI's root pointer, for kernels that can be told; 0 if there is none
    :raises ConfigError: a file or the command line cannot be used
    """
    if config.kernel:
        with ImageFile(config.kernel, "-kernel") as image:
            kernel = _load_image(memory, image, config, rsdp)
    elif config.initrd or config.append:
        raise ConfigError("-initrd and -append need a kernel; add -kernel FILE")
    else:
        kernel = LoadedKernel(NONE, layout.ROM_END - 16)
    record = _RECORD.pack(_RECORD_MAGIC, kernel.kind, kernel.entry, kernel.ebx, kernel.eax)
    memory.write(layout.BOOT_RECORD, record)
    return kernel


def _load_image(
    memory: GuestMemory, image: ImageFile, config: KernelConfig, rsdp: int
) -> LoadedKernel:
    head = image.head(4)
    executable = elf.Elf(image) if head == elf.MAGIC[: len(head)] else None
    pvh_entry = pvh.find_entry(executable) if executable else None
    prefers_pvh = executable is not None and executable.is_64 and pvh_entry is not None
    header = None if prefers_pvh else multiboot.find_header(image)
    if header:
        return _load_multiboot(memory, image, config, header, executable)
    if executable and pvh_entry is not None:
        return _load_pvh(memory, image, config, executable, pvh_entry, rsdp)
    if executable:
        raise image.error("ELF with neither a PVH note nor a multiboot header; give such a kernel")
    if config.initrd or config.append:
        raise image.error("a flat image takes no -initrd and no -append; leave them out")
    return LoadedKernel(FLAT, flat.load(memory, image))


def _load_pvh(
    memory: GuestMemory,
    image: ImageFile,
    config: KernelConfig,
    executable: elf.Elf,
    entry: int,
    rsdp: int,
) -> LoadedKernel:
    end = _load_segments(memory, image, executable, entry)
    initrd = _load_initrd(memory, config.initrd, end)
    cmdline = _write_cmdline(memory, config.append)
    return LoadedKernel(PVH, entry, 0, pvh.write_start_info(memory, cmdline, initrd, rsdp))


def _load_multiboot(
    memory: GuestMemory,
    image: ImageFile,
    config: KernelConfig,
    header: multiboot.Header,
    executable: elf.Elf | None,
) -> LoadedKernel:
    if header.raw:
        offset, start, size, mem_size, entry = header.raw
        _check_place(memory, image, start, mem_size)
        image.copy(offset, size, memory, start)
        memory.fill(start + size, mem_size - size)
        end = start + mem_size
    elif executable:
        entry = executable.physical(executable.entry)
        end = _load_segments(memory, image, executable, entry)
    else:
        raise image.error("multiboot without load addresses, and not ELF; link it as ELF")
    initrd = _load_initrd(memory, config.initrd, end)
    # The first word names the kernel, as with other loaders.
    cmdline = _write_cmdline(memory, config.append, b"kernel ")
    info = multiboot.write_info(memory, cmdline, initrd)
    return LoadedKernel(MULTIBOOT, entry, multiboot.BOOT_MAGIC, info)


def _load_segments(memory: GuestMemory, image: ImageFile, executable: elf.Elf, entry: int) -> int:
    """Load all segments; return the first address beyond the last."""
    inside = any(each.paddr <= entry < each.paddr + each.mem_size for each in executable.loads)
    if not inside or entry >= layout.BELOW_4G_END:
        raise image.error(f"it starts at {entry:#x}, where nothing is loaded; link it anew")
    for segment in executable.loads:
        _check_place(memory, image, segment.paddr, segment.mem_size)
    for segment in executable.loads:
        image.copy(segment.offset, segment.file_size, memory, segment.paddr)
        bss = segment.mem_size - segment.file_size
        memory.fill(segment.paddr + segment.file_size, bss)
    last = executable.loads[-1]
    return last.paddr + last.mem_size


def _check_place(memory: GuestMemory, image: ImageFile, gpa: int, size: int) -> None:
    if not memory.contains(gpa, size):
        raise image.error(
            f"{format_size(size)} to be loaded at {gpa:#x} are not all RAM; give more with -m, or"
            " link the kernel lower"
        )
    for start, end in _OWN:
        if gpa < end and start < gpa + size:
            raise image.error(
                f"what is to be loaded at {gpa:#x} covers the boot structures at {start:#x};"
                " link the kernel at 1M or above"
            )


def _load_initrd(memory: GuestMemory, path: str, kernel_end: int) -> tuple[int, int] | None:
    """Load the initrd at the top of RAM below 4 GiB; return where, and its size."""
    if not path:
        return None
    ram_end = max(
        region.end for region in memory.regions
        if not region.readonly and region.end <= layout.BELOW_4G_END
    )  # fmt: skip
    with ImageFile(path, "-initrd") as image:
        start = (ram_end - image.size) & -layout.PAGE
        if start < max(kernel_end, layout.HIGH_START):
            raise image.error(
                f"{format_size(image.size)} do not fit into RAM above the kernel; give more with -m"
            )
        image.copy(0, image.size, memory, start)
        return start, image.size


def _write_cmdline(memory: GuestMemory, text: str, first: bytes = b"") -> int:
    check_text(text, "-append")
    data = os.fsencode(text)
    limit = layout.CMDLINE_SIZE - len(first) - 1
    if len(data) > limit:
        raise ConfigError(f"-append: {len(data)} bytes are too long; give at most {limit}")
    if any(byte < 0x20 and byte != 0x09 for byte in data):
        raise ConfigError("-append: it has a control character; write it on one line")
    memory.write(layout.CMDLINE, first + data + b"\0")
    return layout.CMDLINE
