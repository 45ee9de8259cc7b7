"""Builds small kernel images for tests: ELF executables, Xen notes and multiboot headers."""

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
    """Return one ELF note, name and description padded."""
    return b"".join(
        (
            struct.pack("<III", len(name), len(desc), type_),
            name + bytes(-len(name) % pad),
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
    load_at: int = 0x10_0000,
    mem_size: int | None = None,
    vaddr: int | None = None,
    entry: int | None = None,
    segments: tuple[tuple[int, int, int, int, int, int], ...] = (),
    **ehdr: int,
) -> bytes:
    """Return an executable that loads *code*, and *notes* if given.

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
        if wide:
            phdrs += struct.pack(
                "<IIQQQQQQ", type_, 7, offset, virtual, physical, file_size, memory_size, 4
            )
        else:
            phdrs += struct.pack(
                "<8I", type_, offset, virtual, physical, file_size, memory_size, 7, 4
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
