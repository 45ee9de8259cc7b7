"""The ACPI tables as files of fw_cfg, with the script by which firmware puts them into memory and
links them (QEMU's hw/acpi/bios-linker-loader.c).

For firmware that was made for QEMU and finds no tables before it has done that. Kernels that are
loaded directly find those of ``tables.write``, which say the same.
"""

from __future__ import annotations

import struct

from pyvmm.x86 import acpi

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pyvmm.x86.hardware import Hardware

RSDP, TABLES, SCRIPT = "etc/acpi/rsdp", "etc/acpi/tables", "etc/table-loader"

_ENTRY_SIZE = 128
_ALLOCATE, _ADD_POINTER, _ADD_CHECKSUM = 1, 2, 3
_ANYWHERE, _BELOW_1M = 1, 2
_ALIGNMENT = 64  # of the FACS

# In each table, and in the root pointer.
_LENGTH, _CHECKSUM, _BODY = 4, 9, 36
_RSDP_CHECKSUM, _RSDP_XSDT, _RSDP_EXTENDED_CHECKSUM = 8, 24, 32
_FADT_FACS, _FADT_DSDT, _FADT_X_DSDT = 36, 40, 140


def build(hardware: Hardware) -> dict[str, bytes]:
    """Return the files by name. All pointers in them are offsets in :data:`TABLES`, and all
    checksums 0, as the script has them mended."""
    facs = acpi.facs()
    pointer, blob = acpi.build(hardware, len(facs), facs=0)
    rsdp, tables = bytearray(pointer), bytearray(facs + blob)
    (xsdt,) = struct.unpack_from("<Q", rsdp, _RSDP_XSDT)
    starts = [at for (at,) in struct.iter_unpack("<Q", _body(tables, xsdt))]
    pointers = [(RSDP, _RSDP_XSDT, 8)]
    pointers += [(TABLES, xsdt + _BODY + 8 * number, 8) for number in range(len(starts))]
    for fadt in [at for at in starts if tables[at : at + 4] == b"FACP"]:
        pointers += [
            (TABLES, fadt + offset, size)
            for offset, size in ((_FADT_FACS, 4), (_FADT_DSDT, 4), (_FADT_X_DSDT, 8))
        ]
        starts.append(struct.unpack_from("<I", tables, fadt + _FADT_DSDT)[0])
    sums = [(RSDP, _RSDP_CHECKSUM, 0, 20), (RSDP, _RSDP_EXTENDED_CHECKSUM, 0, len(rsdp))]
    sums += [
        (TABLES, start + _CHECKSUM, start, _length(tables, start)) for start in [*starts, xsdt]
    ]
    files = {RSDP: rsdp, TABLES: tables}
    for file, at, _, _ in sums:
        files[file][at] = 0
    script = [_entry("56sIB", _ALLOCATE, RSDP, 16, _BELOW_1M)]
    script.append(_entry("56sIB", _ALLOCATE, TABLES, _ALIGNMENT, _ANYWHERE))
    script += [
        _entry("56s56sIB", _ADD_POINTER, file, TABLES.encode(), at, size)
        for file, at, size in pointers
    ]
    script += [_entry("56sIII", _ADD_CHECKSUM, *one) for one in sums]
    return {RSDP: bytes(rsdp), TABLES: bytes(tables), SCRIPT: b"".join(script)}


def _length(tables: bytearray, start: int) -> int:
    length: int = struct.unpack_from("<I", tables, start + _LENGTH)[0]
    return length


def _body(tables: bytearray, start: int) -> bytearray:
    return tables[start + _BODY : start + _length(tables, start)]


def _entry(form: str, command: int, file: str, *fields: bytes | int) -> bytes:
    return struct.pack("<I" + form, command, file.encode(), *fields).ljust(_ENTRY_SIZE, b"\0")
