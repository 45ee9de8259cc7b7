import struct

import pytest

from pyvmm.x86 import layout, tables

SIZES = {0: 20, 1: 8, 2: 8, 3: 8, 4: 8}


def find(memory):
    """The entries of the table, found as a kernel does; its checksums are right."""
    area = memory.read(0x9FC00, 0x400)
    at = next(at for at in range(0, 0x400, 16) if area[at : at + 4] == b"_MP_")
    pointer = area[at : at + 16]
    assert sum(pointer) % 256 == 0
    _, address, paragraphs, revision, _, *features = struct.unpack("<4sIBBB5B", pointer)
    assert (paragraphs, revision, features) == (1, 4, [0] * 5)
    size = memory.read_u16(address + 4)
    assert layout.TABLES_START <= address < address + size <= layout.EBDA_START
    table = memory.read(address, size)
    assert sum(table) % 256 == 0
    signature, _, revision, count, lapic, extended = struct.unpack_from("<4sHB27xHIH", table)
    assert (signature, revision, lapic, extended) == (b"PCMP", 4, 0xFEE00000, 0)
    entries, at = [], 44
    while at < size:
        entries.append(table[at : at + SIZES[table[at]]])
        at += SIZES[table[at]]
    assert (at, len(entries)) == (size, count)
    assert [entry[0] for entry in entries] == sorted(entry[0] for entry in entries)
    return entries


@pytest.mark.parametrize("cpus", [1, 2, 255])
def test_table(memory, hardware, cpus):
    tables.write(memory, hardware(cpus))
    entries = find(memory)
    processors = [entry for entry in entries if entry[0] == 0]
    assert [(entry[1], entry[3]) for entry in processors] == [
        (index, 1 if index else 3) for index in range(cpus)
    ]
    assert [entry for entry in entries if entry[0] == 1] == [b"\x01\x00ISA   "]
    (ioapic,) = [entry for entry in entries if entry[0] == 2]
    assert ioapic[3:] == b"\x01" + (0xFEC00000).to_bytes(4, "little")
    assert ioapic[1] not in [entry[1] for entry in processors]
    routes = [entry for entry in entries if entry[0] == 3]
    assert all(entry[1:5] == bytes(4) and entry[6] == ioapic[1] for entry in routes)
    pins = [pin for pin in range(24) if pin != 2]
    assert [(entry[5], entry[7]) for entry in routes] == [(pin, pin) for pin in pins]
    local = [entry[1:] for entry in entries if entry[0] == 4]
    assert local == [b"\x03\0\0\0\0\0\0", b"\x01\0\0\0\0\xff\x01"]


def test_pci_bus(memory, hardware):
    tables.write(memory, hardware(2, 0, True))
    entries = find(memory)
    buses = [entry for entry in entries if entry[0] == 1]
    assert buses == [b"\x01\x00ISA   ", b"\x01\x01PCI   "]
    routes = [entry[1:] for entry in entries if entry[0] == 3]
    (ioapic,) = [entry[1] for entry in entries if entry[0] == 2]
    isa = [route[4] for route in routes if route[3] == 0]
    assert isa == [pin for pin in range(24) if pin not in (2, 5, 11)]
    # INTA of slots 1, 2 and 5: level, active low.
    assert [route for route in routes if route[3] == 1] == [
        bytes((0, 0xF, 0, 1, slot << 2, ioapic, gsi)) for slot, gsi in ((1, 11), (2, 5), (5, 11))
    ]
