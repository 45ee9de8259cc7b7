"""The script, done as firmware does it."""

import struct

import pytest

from pyvmm.x86 import acpi_linker

ALLOCATE, ADD_POINTER, ADD_CHECKSUM = 1, 2, 3


def linked(files, places):
    """The files as they are in memory, at such places."""
    memory = {name: bytearray(data) for name, data in files.items()}
    script = files["etc/table-loader"]
    assert len(script) % 128 == 0
    allocated = []
    for at in range(0, len(script), 128):
        (command,) = struct.unpack_from("<I", script, at)
        name = script[at + 4 : at + 60].rstrip(b"\0").decode()
        if command == ALLOCATE:
            alignment, zone = struct.unpack_from("<IB", script, at + 60)
            assert places[name] % alignment == 0
            assert (zone == 2) == (places[name] < 1 << 20)
            allocated.append(name)
        elif command == ADD_POINTER:
            source = script[at + 60 : at + 116].rstrip(b"\0").decode()
            offset, size = struct.unpack_from("<IB", script, at + 116)
            assert {name, source} <= set(allocated)
            field = memory[name][offset : offset + size]
            value = int.from_bytes(field, "little") + places[source]
            memory[name][offset : offset + size] = value.to_bytes(size, "little")
        else:
            assert command == ADD_CHECKSUM
            offset, start, length = struct.unpack_from("<III", script, at + 60)
            assert memory[name][offset] == 0
            memory[name][offset] = -sum(memory[name][start : start + length]) & 0xFF
    return memory


@pytest.mark.parametrize(("cpus", "virtio"), [(1, 0), (255, 64)])
def test_linked_tables_are_whole(hardware, cpus, virtio):
    places = {"etc/acpi/rsdp": 0xF0010, "etc/acpi/tables": 0x7FFF0000}
    memory = linked(acpi_linker.build(hardware(cpus, virtio)), places)
    rsdp, tables = memory["etc/acpi/rsdp"], memory["etc/acpi/tables"]
    assert sum(rsdp[:20]) % 256 == sum(rsdp) % 256 == 0

    def table(address):
        start = address - 0x7FFF0000
        (length,) = struct.unpack_from("<I", tables, start + 4)
        data = tables[start : start + length]
        assert len(data) == length
        assert sum(data) % 256 == 0
        return bytes(data)

    xsdt = table(int.from_bytes(rsdp[24:32], "little"))
    found = {
        data[:4]: data for data in (table(at) for (at,) in struct.iter_unpack("<Q", xsdt[36:]))
    }
    assert set(found) == {b"FACP", b"APIC"}
    facs, dsdt = struct.unpack_from("<II", found[b"FACP"], 36)
    assert struct.unpack_from("<QQ", found[b"FACP"], 132) == (0, dsdt)
    assert facs % 64 == 0
    assert tables[facs - 0x7FFF0000 :].startswith(b"FACS\x40\0\0\0")
    assert table(dsdt).startswith(b"DSDT")
