"""Builds small kernel images for tests: ELF executables, Xen notes, multiboot headers, bzImages."""

from __future__ import annotations

import struct

from pyvmm.memory.backend import RamBackend
from pyvmm.memory.config import RamConfig
from pyvmm.memory.guest import GuestMemory
from pyvmm.x86.layout import ram_ranges


def guest_memory(size: int = 16 << 20) -> GuestMemory:
    """Return *size* bytes of memfd RAM, mapped as the machine maps it."""
    memory = GuestMemory()
    memory.add_ram(RamBackend(RamConfig("memory-backend-memfd", "ram0", size)), ram_ranges(size))
    return memory


def note(name: bytes, type_: int, desc: bytes, pad: int = 4) -> bytes:
    """Return one ELF note, name (behind its header of 12 bytes) and description padded."""
    return b"".join(
        (
            struct.pack("<III", len(name), len(desc), type_),
            name + bytes(-(12 + len(name)) % pad),
            desc + bytes(-len(desc) % pad),
        )
    )


def pvh_note(entry: int) -> bytes:
    """Return the note that says where a PVH kernel starts."""
    return note(b"Xen\0", 18, struct.pack("<Q", entry))


def multiboot_header(flags: int = 0, *addresses: int) -> bytes:
    """Return a multiboot 1 header, with the five address fields if given."""
    magic = 0x1BADB002
    words = (magic, flags, -(magic + flags) & 0xFFFF_FFFF, *addresses)
    return struct.pack(f"<{len(words)}I", *words)


def elf(
    code: bytes = b"\xf4",
    *,
    wide: bool = True,
    notes: bytes = b"",
    notes_align: int = 4,
    load_at: int = 0x10_0000,
    mem_size: int | None = None,
    vaddr: int | None = None,
    entry: int | None = None,
    segments: tuple[tuple[int, int, int, int, int, int], ...] = (),
    **ehdr: int,
) -> bytes:
    """Return an executable that loads *code*, and *notes* if given.

    :param notes_align: the notes' p_align
    :param segments: more program headers: type, offset, vaddr, paddr, file size, memory size
    :param ehdr: fields of the ELF header to falsify, by their names in elf.h; ``ei_class`` and
        ``ei_data`` too
    """
    phdr_size, ehdr_size = (56, 64) if wide else (32, 52)
    table = [(1, 0, vaddr or load_at, load_at, len(code), mem_size or len(code))]
    if notes:
        table.append((4, 0, 0, 0, len(notes), len(notes)))
    code_at = ehdr_size + phdr_size * (len(table) + len(segments))
    table[0] = (table[0][0], code_at, *table[0][2:])
    if notes:
        table[1] = (4, code_at + len(code), *table[1][2:])
    phdrs = b""
    for type_, offset, virtual, physical, file_size, memory_size in (*table, *segments):
        align = notes_align if type_ == 4 else 4
        if wide:
            phdrs += struct.pack(
                "<IIQQQQQQ", type_, 7, offset, virtual, physical, file_size, memory_size, align
            )
        else:
            phdrs += struct.pack(
                "<8I", type_, offset, virtual, physical, file_size, memory_size, 7, align
            )
    fields = {
        "ei_class": 2 if wide else 1, "ei_data": 1, "e_type": 2, "e_machine": 62 if wide else 3,
        "e_version": 1, "e_entry": load_at if entry is None else entry, "e_phoff": ehdr_size,
        "e_shoff": 0, "e_flags": 0, "e_ehsize": ehdr_size, "e_phentsize": phdr_size,
        "e_phnum": len(table) + len(segments), "e_shentsize": 0, "e_shnum": 0, "e_shstrndx": 0,
    }  # fmt: skip
    fields |= ehdr
    head, *rest = list(fields.items())[:2], *list(fields.items())[2:]
    ident = b"\x7fELF" + bytes(value for _, value in head) + b"\x01" + bytes(9)
    values = [value for _, value in rest]
    return (
        ident + struct.pack("<HHIQQQIHHHHHH" if wide else "<HHIIIIIHHHHHH", *values)
        + phdrs + code + notes
    )  # fmt: skip


def boot_sector(code: bytes) -> bytes:
    """Return *code*, at most 510 bytes, as a flat image with a boot sector's signature."""
    assert len(code) <= 510
    return code.ljust(510, b"\0") + b"\x55\xaa"


def pack(data: bytes, method: str) -> bytes:
    """Return *data* as the payload of a bzImage, compressed as Linux's build does it.

    :param method: gzip, bzip2, lzma, xz, lz4, zstd or none
    """
    import bz2
    import gzip
    import lzma

    import lz4.block
    import zstandard

    size = struct.pack("<I", len(data))
    if method == "none":
        return data
    if method == "gzip":
        return gzip.compress(data)
    if method == "bzip2":
        return bz2.compress(data) + size
    if method == "lzma":
        return lzma.compress(data, lzma.FORMAT_ALONE) + size
    if method == "xz":
        # As scripts/xz_wrap.sh: a filter for x86 code and a checksum that the kernel knows.
        filters = [{"id": lzma.FILTER_X86}, {"id": lzma.FILTER_LZMA2, "dict_size": 32 << 20}]
        return lzma.compress(data, check=lzma.CHECK_CRC32, filters=filters) + size
    if method == "zstd":
        packer = zstandard.ZstdCompressor(write_content_size=False, write_checksum=True)
        return packer.compress(data) + size
    legacy = b"\x02\x21\x4c\x18"
    for at in range(0, len(data), 8 << 20):
        block = lz4.block.compress(data[at : at + (8 << 20)], store_size=False)
        legacy += struct.pack("<I", len(block)) + block
    return legacy + size


#: The setup header's fields by the names that boot.rst has: where each lies, and its format.
SETUP_HEADER = {
    "setup_sects": (0x1F1, "B"), "syssize": (0x1F4, "I"), "boot_flag": (0x1FE, "H"),
    "jump": (0x200, "H"), "header": (0x202, "4s"), "version": (0x206, "H"),
    "type_of_loader": (0x210, "B"), "loadflags": (0x211, "B"), "code32_start": (0x214, "I"),
    "initrd_addr_max": (0x22C, "I"), "kernel_alignment": (0x230, "I"),
    "relocatable_kernel": (0x234, "B"), "min_alignment": (0x235, "B"), "xloadflags": (0x236, "H"),
    "cmdline_size": (0x238, "I"), "payload_offset": (0x248, "I"), "payload_length": (0x24C, "I"),
    "setup_data": (0x250, "Q"), "pref_address": (0x258, "Q"), "init_size": (0x260, "I"),
}  # fmt: skip


def bzimage(payload: bytes, code: bytes = b"\xf4" * 0x400, **header: int | bytes) -> bytes:
    """Return a bzImage of *code*, which is entered in long mode at 0x200, with *payload* behind.

    :param header: fields to falsify, by their names in :data:`SETUP_HEADER`
    """
    payload_offset = len(code)
    code += payload + bytes(-(len(code) + len(payload)) % 16)
    fields: dict[str, int | bytes] = {
        "setup_sects": 2, "syssize": len(code) // 16, "boot_flag": 0xAA55,
        "jump": 0x6AEB, "header": b"HdrS", "version": 0x20F,
        "loadflags": 1, "code32_start": 0x100000,
        "initrd_addr_max": 0x7FFF_FFFF, "kernel_alignment": 0x200000,
        "relocatable_kernel": 1, "min_alignment": 21, "xloadflags": 3,
        "cmdline_size": 2047, "payload_offset": payload_offset,
        "payload_length": len(payload), "pref_address": 0x100_0000, "init_size": 0x20_0000,
    }  # fmt: skip
    fields |= header
    setup = bytearray(3 * 512)
    for name, value in fields.items():
        offset, kind = SETUP_HEADER[name]
        struct.pack_into(f"<{kind}", setup, offset, value)
    return bytes(setup) + code
