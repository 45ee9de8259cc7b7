"""The items of fw_cfg, as QEMU's microvm has them (include/standard-headers/linux/qemu_fw_cfg.h,
hw/i386/fw_cfg.c, hw/i386/x86-common.c): numbers, memory map, tables, and what the guest is booted
from for firmware that loads it by itself.

Made at the guest's first access, on a vCPU's thread, of what does not change while the machine is
there. Left out: what QEMU tells of a multiboot or PVH kernel beside its command line and initial
RAM disk, boot order, NUMA and SMBIOS.
"""

from __future__ import annotations

import os
import struct

from pyvmm.boot.blob import FileBlob
from pyvmm.boot.bzimage import BzImage
from pyvmm.devices.fw_cfg import (
    ARCH_LOCAL,
    FILE_DIR,
    FILE_FIRST,
    ID,
    ID_DMA,
    ID_TRADITIONAL,
    SIGNATURE,
    Bytes,
    FilePart,
)
from pyvmm.devices.vmcoreinfo import VmCoreInfo
from pyvmm.errors import ConfigError
from pyvmm.machine import firmware
from pyvmm.machine.fw_cfg_files import MOST, NAME_SIZE, OWN_NAMES
from pyvmm.x86 import acpi_linker, layout

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

    from pyvmm.devices.fw_cfg import Item
    from pyvmm.machine.config import MachineConfig
    from pyvmm.machine.parts import Parts

UUID, RAM_SIZE, NOGRAPHIC, NB_CPUS = 0x02, 0x03, 0x04, 0x05
KERNEL_ADDR, KERNEL_SIZE, INITRD_ADDR, INITRD_SIZE = 0x07, 0x08, 0x0A, 0x0B
BOOT_MENU, MAX_CPUS = 0x0E, 0x0F
KERNEL_DATA, INITRD_DATA, CMDLINE_ADDR, CMDLINE_SIZE = 0x11, 0x12, 0x13, 0x14
CMDLINE_DATA, SETUP_ADDR, SETUP_SIZE, SETUP_DATA = 0x15, 0x16, 0x17, 0x18
IRQ0_OVERRIDE = ARCH_LOCAL | 0x02

#: The keys of the operator's items, behind those of the machine's and room for more of these.
USER_FIRST = FILE_FIRST + MOST

# Where QEMU has firmware put the parts of Linux.
_REAL_MODE, _COMMAND_LINE, _PROTECTED_MODE = 0x1_0000, layout.CMDLINE, layout.HIGH_START
_E820_RAM = 1
_PAGE_MASK = 4095
# Setup header (Documentation/arch/x86/boot.rst).
_TYPE_OF_LOADER, _LOADFLAGS, _RAMDISK, _HEAP_END, _CMD_LINE_PTR, _XLOADFLAGS = (
    *(0x210, 0x211, 0x218, 0x224, 0x228),
    0x236,
)
_LOADER_QEMU, _CAN_USE_HEAP, _CAN_BE_LOADED_ABOVE_4G = 0xB0, 0x80, 0x02


def make(parts: Parts, config: MachineConfig, files: Mapping[str, int]) -> dict[int, Item]:
    """Return the items by key.

    :param files: what the guest is booted from, by option
    """
    items: dict[int, Item] = {
        SIGNATURE: Bytes(b"QEMU"),
        ID: _u32(ID_TRADITIONAL | ID_DMA),
        UUID: Bytes(bytes(16)),
        RAM_SIZE: Bytes(struct.pack("<Q", config.memory_size)),
        NOGRAPHIC: _u16(1),
        NB_CPUS: _u16(config.smp),
        BOOT_MENU: _u16(0),
        MAX_CPUS: _u16(config.smp),
        # The timer is on the IOAPIC's pin 0, as the MADT says.
        IRQ0_OVERRIDE: _u32(0),
    }
    if config.kernel.kernel:
        items |= _boot_items(config, files)
    named = {OWN_NAMES.index(name) + FILE_FIRST: (name, one) for name, one in _own(parts, config)}
    if parts.fw_cfg_files is not None:
        named |= dict(enumerate(sorted(parts.fw_cfg_files.items.items()), USER_FIRST))
    items |= {key: item for key, (_, item) in named.items()}
    entries = sorted((name, item.size, key) for key, (name, item) in named.items())
    directory = struct.pack(">I", len(entries)) + b"".join(
        struct.pack(f">IHH{NAME_SIZE}s", size, key, 0, name.encode()) for name, size, key in entries
    )
    items[FILE_DIR] = Bytes(directory)
    return items


def _own(parts: Parts, config: MachineConfig) -> list[tuple[str, Item]]:
    hardware = firmware.describe(parts, config)
    found: list[tuple[str, Item]] = [("etc/e820", Bytes(_e820(config.memory_size)))]
    if config.acpi:
        found += [(name, Bytes(data)) for name, data in acpi_linker.build(hardware).items()]
    if hardware.pvpanic is not None:
        found.append(("etc/pvpanic-port", _u16(hardware.pvpanic)))
    found += [("etc/vmcoreinfo", one) for one in parts.devices if isinstance(one, VmCoreInfo)]
    return found


def _e820(size: int) -> bytes:
    # RAM alone, and without the hole below 1 MiB, which firmware knows of.
    low = min(size, layout.BELOW_4G_END)
    parts = [(0, low), (layout.ABOVE_4G_START, size - low)]
    return b"".join(struct.pack("<QQI", *part, _E820_RAM) for part in parts if part[1])


def _boot_items(config: MachineConfig, files: Mapping[str, int]) -> dict[int, Item]:
    command_line = os.fsencode(config.kernel.append) + b"\0"
    items: dict[int, Item] = {
        CMDLINE_ADDR: _u32(_COMMAND_LINE),
        CMDLINE_SIZE: _u32(len(command_line)),
        CMDLINE_DATA: Bytes(command_line),
    }
    setup, initrd_max = b"", 0xFFFF_FFFF
    if "-kernel" in files:
        setup, size = _read_linux(files["-kernel"], config.kernel.kernel)
        if setup:
            items |= {
                KERNEL_ADDR: _u32(_PROTECTED_MODE),
                KERNEL_SIZE: _u32(size),
                KERNEL_DATA: FilePart(files["-kernel"], len(setup), size),
            }
            if not setup[_XLOADFLAGS] & _CAN_BE_LOADED_ABOVE_4G:
                (initrd_max,) = struct.unpack_from("<I", setup, 0x22C)
    place = 0, 0
    if "-initrd" in files:
        size = os.fstat(files["-initrd"]).st_size
        last = min(initrd_max, min(config.memory_size, layout.BELOW_4G_END) - 1)
        if size < last:
            place = last - size & ~_PAGE_MASK, size
            items |= {
                INITRD_ADDR: _u32(place[0]),
                INITRD_SIZE: _u32(size),
                INITRD_DATA: FilePart(files["-initrd"], 0, size),
            }
    if setup:
        items |= {
            SETUP_ADDR: _u32(_REAL_MODE),
            SETUP_SIZE: _u32(len(setup)),
            SETUP_DATA: Bytes(_filled(setup, *place)),
        }
    return items


def _read_linux(fd: int, path: str) -> tuple[bytes, int]:
    """Return the real-mode part of a bzImage and the size of the rest; nothing if it is none."""
    try:
        with FileBlob(path, "-kernel", fd=fd) as blob:
            if blob.head(0x206)[0x202:] != b"HdrS":
                return b"", 0
            start, size = BzImage(blob).code
            return blob.read(0, start), size
    except ConfigError:
        return b"", 0


def _filled(setup: bytes, initrd: int, size: int) -> bytes:
    # What a boot loader enters into the header; firmware copies it as it is.
    filled = bytearray(setup)
    filled[_TYPE_OF_LOADER] = _LOADER_QEMU
    filled[_LOADFLAGS] |= _CAN_USE_HEAP
    struct.pack_into("<II", filled, _RAMDISK, initrd, size)
    struct.pack_into("<H", filled, _HEAP_END, _COMMAND_LINE - _REAL_MODE - 0x200)
    struct.pack_into("<I", filled, _CMD_LINE_PTR, _COMMAND_LINE)
    return bytes(filled)


def _u16(value: int) -> Bytes:
    return Bytes(struct.pack("<H", value))


def _u32(value: int) -> Bytes:
    return Bytes(struct.pack("<I", value))
