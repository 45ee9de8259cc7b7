"""Puts a kernel into guest memory, whatever kind it is, and says how to enter it.

The kind is told by evidence in the file: a bzImage's setup header, an ELF file's PVH note, a
multiboot header, what an ELF file of 64 bits without either has if it is Linux (``linux.
is_vmlinux``), a boot sector's signature. What shows none of these is refused by name. With
``-machine kernel-type`` the operator says what it is. Of a kernel that can do both, a 32-bit one
is entered by multiboot, as other loaders do, and a 64-bit one by PVH, since multiboot knows 32-bit
ELF only.

Main thread, while no vCPU runs: before the start and again at each reset, since the guest has
written over its own kernel by then. After a live update nothing is loaded.
"""

from __future__ import annotations

import struct

from pyvmm.boot import elf, flat, multiboot, pvh
from pyvmm.boot.blob import FileBlob
from pyvmm.boot.place import check_place, load_initrd, load_segments, write_cmdline
from pyvmm.errors import ConfigError
from pyvmm.x86 import layout

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from pyvmm.boot.blob import Blob
    from pyvmm.boot.config import KernelConfig
    from pyvmm.memory.guest import GuestMemory

# Kinds in the boot record.
NONE, PVH, MULTIBOOT, FLAT, LINUX64 = range(5)

_RECORD = struct.Struct("<4sIIIII8x")
_RECORD_MAGIC = b"PVMB"
_SETUP_HEADER_MAGIC = b"HdrS"
_HEAD_SIZE = 0x206  # up to and with that magic, in a bzImage


class LoadedKernel:
    """How to enter what was loaded.

    ``kind`` NONE means the reset vector; FLAT real mode at 0000:entry, all segments 0, SP equal
    to entry; PVH and MULTIBOOT 32-bit protected mode without paging, flat 4 GiB segments,
    interrupts off, with ``eax`` and, in ``ebx``, ``info`` as given; LINUX64 long mode with
    ``cr3`` as given and ``info`` in ``rsi``. The boot record says the same to the ROM.
    """

    __slots__ = ("cr3", "eax", "entry", "info", "kind")

    def __init__(self, kind: int, entry: int, info: int = 0, eax: int = 0, cr3: int = 0) -> None:
        self.kind = kind
        self.entry = entry
        self.info = info
        self.eax = eax
        self.cr3 = cr3

    @property
    def is_real_mode(self) -> bool:
        """Whether the processor starts in real mode."""
        return self.kind in (NONE, FLAT)


def load(
    memory: GuestMemory,
    config: KernelConfig,
    rsdp: int = 0,
    open_file: Callable[[str, str], FileBlob] = FileBlob,
) -> LoadedKernel:
    """Load as *config* says, and leave the boot record for the ROM; return how to enter.

    :param rsdp: guest-physical address of the ACPI tables' root pointer; 0 if there are none
    :param open_file: opens a file by path and option, or has it still (``BootFiles.open``)
    :raises ConfigError: a file or the command line cannot be used
    """
    if config.kernel:
        with open_file(config.kernel, "-kernel") as blob:
            if config.initrd:
                with open_file(config.initrd, "-initrd") as initrd:
                    kernel = _load_kernel(_Boot(memory, config, rsdp, blob, initrd))
            else:
                kernel = _load_kernel(_Boot(memory, config, rsdp, blob, None))
    elif config.initrd or config.append:
        raise ConfigError("-initrd and -append need a kernel; add -kernel FILE")
    else:
        kernel = LoadedKernel(NONE, layout.ROM_END - 16)
    fields = (kernel.kind, kernel.entry, kernel.info, kernel.eax, kernel.cr3)
    memory.write(layout.BOOT_RECORD, _RECORD.pack(_RECORD_MAGIC, *fields))
    return kernel


def prepare(blob: Blob, config: KernelConfig) -> int:
    """Make sure that *blob* can be loaded without the package on disk; return how many of its
    first bytes that takes. Debug information is behind them.

    :raises ConfigError: it is no kernel that can be loaded
    """
    _recognize(blob, config.type)
    if config.type != "flat":
        head = blob.head(_HEAD_SIZE)
        if head.startswith(elf.MAGIC):
            return elf.Elf(blob).file_end
        if head.endswith(_SETUP_HEADER_MAGIC):
            from pyvmm.boot import bzimage, linux

            header = bzimage.BzImage(blob)
            if config.unpack == "host":
                linux.prepare(blob, header)
            return sum(header.code)
    return blob.size


class _Boot:
    """What one boot is made of."""

    __slots__ = ("blob", "config", "initrd", "memory", "rsdp")

    def __init__(
        self,
        memory: GuestMemory,
        config: KernelConfig,
        rsdp: int,
        blob: Blob,
        initrd: Blob | None,
    ) -> None:
        self.memory = memory
        self.config = config
        self.rsdp = rsdp
        self.blob = blob
        self.initrd = initrd


def _load_kernel(boot: _Boot) -> LoadedKernel:
    return _recognize(boot.blob, boot.config.type)(boot)


def _recognize(blob: Blob, wanted: str) -> Callable[[_Boot], LoadedKernel]:
    """Return what loads a boot's kernel *blob*.

    :raises ConfigError: nothing does
    """
    if wanted == "flat":
        return _load_flat
    auto = wanted == "auto"
    head = blob.head(_HEAD_SIZE)
    executable = elf.Elf(blob) if head[:4] == elf.MAGIC[: len(head)] else None
    if executable is None and head.endswith(_SETUP_HEADER_MAGIC) and (auto or wanted == "linux"):
        return _linux_loader(None)
    entry = pvh.find_entry(executable) if executable and (auto or wanted == "pvh") else None
    prefers_pvh = executable is not None and executable.is_64 and entry is not None
    if not prefers_pvh and (auto or wanted == "multiboot"):
        header = multiboot.find_header(blob)
        if header:
            return lambda boot: _load_multiboot(boot, header, executable)
    if executable and entry is not None:
        return lambda boot: _load_pvh(boot, executable, entry)
    if executable and (wanted == "linux" or (auto and _is_linux(blob, executable))):
        return _linux_loader(executable)
    if auto and executable is None and _is_boot_sector(head):
        return _load_flat
    # The names of what is no kernel are only imported when they are needed.
    from pyvmm.boot import foreign

    raise foreign.error(blob, executable, wanted)


def _is_linux(blob: Blob, executable: elf.Elf) -> bool:
    from pyvmm.boot import linux

    return executable.is_64 and linux.is_vmlinux(executable) and not multiboot.is_version_2(blob)


def _is_boot_sector(head: bytes) -> bool:
    # An EFI program may have the signature, too, and a truncated bzImage has it.
    signature = head[flat.SIGNATURE_AT : flat.SIGNATURE_AT + 2]
    cut = head[_HEAD_SIZE - 4 :] in (b"H", b"Hd", b"Hdr")
    return signature == flat.SIGNATURE and not cut and not head.startswith(b"MZ")


def _load_flat(boot: _Boot) -> LoadedKernel:
    if boot.config.initrd or boot.config.append:
        raise boot.blob.error("a flat image takes no -initrd and no -append; leave them out")
    return LoadedKernel(FLAT, flat.load(boot.memory, boot.blob))


def _linux_loader(executable: elf.Elf | None) -> Callable[[_Boot], LoadedKernel]:
    """Return what loads a bzImage, or the vmlinux *executable*. What that needs is imported here:
    most of the loaders is of use to Linux alone, whose resets shall find it imported."""
    from pyvmm.boot import bootparams, linux  # noqa: F401

    return lambda boot: _load_linux(boot, executable)


def _load_linux(boot: _Boot, executable: elf.Elf | None) -> LoadedKernel:
    from pyvmm.boot import bootparams, linux

    memory, config = boot.memory, boot.config
    if executable:
        kernel = linux.load_vmlinux(memory, boot.blob, executable)
    else:
        kernel = linux.load_bzimage(memory, boot.blob, config.unpack == "host")
    initrd = load_initrd(memory, boot.initrd, kernel.end, kernel.initrd_addr_max)
    cmdline = write_cmdline(memory, config.append, limit=kernel.cmdline_size)
    info = bootparams.write(memory, kernel.header, kernel.start, cmdline, initrd, boot.rsdp)
    return LoadedKernel(LINUX64, kernel.entry, info, cr3=bootparams.write_page_tables(memory))


def _load_pvh(boot: _Boot, executable: elf.Elf, entry: int) -> LoadedKernel:
    memory = boot.memory
    end = load_segments(memory, boot.blob, executable, entry)
    initrd = load_initrd(memory, boot.initrd, end)
    cmdline = write_cmdline(memory, boot.config.append)
    return LoadedKernel(PVH, entry, pvh.write_start_info(memory, cmdline, initrd, boot.rsdp))


def _load_multiboot(
    boot: _Boot, header: multiboot.Header, executable: elf.Elf | None
) -> LoadedKernel:
    memory, blob = boot.memory, boot.blob
    if header.raw:
        offset, start, size, mem_size, entry = header.raw
        check_place(memory, blob, start, mem_size)
        blob.copy(offset, size, memory, start)
        memory.fill(start + size, mem_size - size)
        end = start + mem_size
    elif executable:
        entry = executable.physical(executable.entry)
        end = load_segments(memory, blob, executable, entry)
    else:
        raise blob.error("multiboot without load addresses, and not ELF; link it as ELF")
    initrd = load_initrd(memory, boot.initrd, end)
    # The first word names the kernel, as with other loaders.
    cmdline = write_cmdline(memory, boot.config.append, b"kernel ")
    info = multiboot.write_info(memory, cmdline, initrd)
    return LoadedKernel(MULTIBOOT, entry, info, multiboot.BOOT_MAGIC)
