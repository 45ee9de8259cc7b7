"""The tables as a kernel finds them in memory; iasl has the last word on their form."""

import re
import struct
import subprocess

import pytest
from harness import needs

from pyvmm.errors import ConfigError
from pyvmm.x86 import layout, tables


def find(memory):
    """All tables by signature, found from the EBDA's pointer as a kernel does."""
    segment = memory.read_u16(0x40E)
    area = memory.read(segment << 4, 1024)
    at = next(at for at in range(0, 1024, 16) if area[at : at + 8] == b"RSD PTR ")
    rsdp = area[at : at + 36]
    assert sum(rsdp[:20]) % 256 == sum(rsdp) % 256 == 0
    assert rsdp[15] == 2
    found = {b"RSDP": rsdp, b"address": (segment << 4) + at}
    xsdt = read(memory, int.from_bytes(rsdp[24:32], "little"))
    for (address,) in struct.iter_unpack("<Q", xsdt[36:]):
        table = read(memory, address)
        found[table[:4]] = table
    fadt = found[b"FACP"]
    facs, dsdt = struct.unpack_from("<II", fadt, 36)
    assert struct.unpack_from("<QQ", fadt, 132) == (0, dsdt)
    assert facs % 64 == 0
    found |= {b"XSDT": xsdt, b"DSDT": read(memory, dsdt), b"FACS": memory.read(facs, 64)}
    return found


def read(memory, address):
    """One table, whose checksum and place are right."""
    size = memory.read_u32(address + 4)
    table = memory.read(address, size)
    assert sum(table) % 256 == 0
    assert layout.TABLES_START <= address < address + size <= layout.EBDA_START
    return table


def madt_entries(madt):
    entries, at = [], 44
    while at < len(madt):
        entries.append(madt[at : at + madt[at + 1]])
        at += madt[at + 1]
    assert at == len(madt)
    return entries


@pytest.fixture
def written(memory, hardware):
    """Writes the tables of such hardware and finds them again."""

    def write(*args):
        rsdp = tables.write(memory, hardware(*args))
        found = find(memory)
        assert found[b"address"] == rsdp == 0x9FC20
        return found

    return write


@pytest.fixture(scope="session")
def iasl():
    """Runs iasl with arguments; fails on any error, warning or remark."""
    program = needs.program("iasl")

    def run(*args):
        done = subprocess.run([program, *args], capture_output=True, text=True, check=False)
        output = done.stdout + done.stderr
        summary = re.findall(r"(\d+) (?:Errors?|Warnings?|Remarks?)\b", output)
        assert done.returncode == 0, output
        assert not any(int(count) for count in summary), output
        assert not re.search(r"invalid|incorrect|mismatch|\*\*\*", output, re.IGNORECASE), output
        return output

    return run


def test_fixed_hardware(written):
    fadt = written()[b"FACP"]
    assert len(fadt) == 276
    assert struct.unpack_from("<HI", fadt, 46) == (9, 0)  # SCI, no SMI command: always ACPI mode
    assert struct.unpack_from("<IIIIII", fadt, 56) == (0x600, 0, 0x604, 0, 0, 0x608)
    assert fadt[88:92] == b"\x04\x02\x00\x04"
    assert struct.unpack_from("<BBBBQ", fadt, 208) == (1, 32, 0, 3, 0x608)
    assert fadt[108] == 0x32  # the century, as rtc.CENTURY
    legacy, no_8042, no_vga, rtc = 1, 0, 1 << 2, 0
    assert struct.unpack_from("<H", fadt, 109)[0] == legacy | no_8042 | no_vga | rtc
    (flags,) = struct.unpack_from("<I", fadt, 112)
    assert flags & 1 << 4 == 0  # the power button is the fixed one
    assert flags & 1 << 8 == 0  # the timer has 24 bits
    assert flags & 1 << 10  # a reset register:
    assert struct.unpack_from("<BBBBQB", fadt, 116) == (1, 8, 0, 1, 0x64, 0xFE)
    assert flags & 1 << 20 == 0  # not hardware-reduced: 8259s and ISA interrupts exist


@pytest.mark.parametrize("cpus", [1, 2, 255])
def test_processors_and_interrupts(written, cpus):
    madt = written(cpus)[b"APIC"]
    assert struct.unpack_from("<II", madt, 36) == (0xFEE00000, 1)
    entries = madt_entries(madt)
    assert [entry for entry in entries if entry[0] == 0] == [
        bytes((0, 8, index, index, 1, 0, 0, 0)) for index in range(cpus)
    ]
    assert [entry for entry in entries if entry[0]] == [
        struct.pack("<BBBBII", 1, 12, 0, 0, 0xFEC00000, 0),
        struct.pack("<BBBBIH", 2, 10, 0, 9, 9, 0xD),
        struct.pack("<BBBHB", 4, 6, 0xFF, 0, 1),
    ]


def test_facs(written):
    facs = written()[b"FACS"]
    assert (facs[:4], facs[4:8], sum(facs[8:32])) == (b"FACS", b"\x40\0\0\0", 0)


@pytest.fixture
def source(iasl, tmp_path):
    """Returns a table's source without comments and spaces, as iasl has it."""

    def source(table):
        (tmp_path / "table.dat").write_bytes(table)
        iasl("-p", f"{tmp_path}/table", "-d", f"{tmp_path}/table.dat")
        text = (tmp_path / "table.dsl").read_text()
        return re.sub(r"/\*.*?\*/|//[^\n]*|\s", "", text, flags=re.DOTALL)

    return source


def devices_of(text):
    return dict(re.findall(r"Device\((\w+)\)(.*?)(?=Device|$)", text))


def test_devices(written, source):
    text = source(written()[b"DSDT"])
    devices = devices_of(text)
    assert list(devices) == ["COM1", "COM2", "RTC", "PEVT", "FWCF", "VR00", "VR01", "VR02"]
    assert 'EisaId("PNP0501")' in devices["COM2"]
    assert "0x02F8,0x02F8,0x01,0x08" in devices["COM2"]
    assert "IRQNoFlags(){3}" in devices["COM2"]
    assert 'EisaId("PNP0B00")' in devices["RTC"]
    assert "IRQNoFlags(){8}" in devices["RTC"]
    assert 'Name(_HID,"QEMU0001")' in devices["PEVT"]
    assert "0x0505,0x0505,0x01,0x01" in devices["PEVT"]
    assert 'Name(_HID,"QEMU0002")Name(_STA,0x0B)' in devices["FWCF"]
    assert "0x0510,0x0510,0x01,0x0C" in devices["FWCF"]
    last = devices["VR02"]
    assert 'Name(_HID,"LNRO0005")' in last
    assert "Name(_UID,0x02)" in last
    assert "Memory32Fixed(ReadWrite,0xFEB00400,0x00000200,)" in last
    assert "Interrupt(ResourceConsumer,Edge,ActiveHigh,Exclusive,,,){0x00000007,}" in last
    assert "Name(_S5,Package(0x04){Zero,Zero,Zero,Zero})" in text


def test_pci_bus(written, source):
    found = written(2, 0, True)
    devices = devices_of(source(found[b"DSDT"]))
    assert list(devices)[-2:] == ["PCI0", "MBRD"]
    bus = devices["PCI0"]
    assert 'Name(_HID,EisaId("PNP0A08"))' in bus
    assert 'Name(_CID,EisaId("PNP0A03"))' in bus
    assert "WordBusNumber(ResourceProducer,MinFixed,MaxFixed,PosDecode,0x0000,0x0000,0x0000" in bus
    assert "IO(Decode16,0x0CF8,0x0CF8,0x01,0x08,)" in bus
    assert "0x0000,0xC000,0xFFFF,0x0000,0x4000" in bus
    assert "0x00000000,0xC0000000,0xDFFFFFFF,0x00000000,0x20000000" in bus
    assert "0x0000001000000000,0x0000001FFFFFFFFF,0x0000000000000000,0x0000001000000000" in bus
    routes = re.findall(r"Package\(0x04\)\{(\w+),Zero,Zero,(\w+)\}", bus)
    assert routes == [("0x0001FFFF", "0x0B"), ("0x0002FFFF", "0x05"), ("0x0005FFFF", "0x0B")]
    # Linux uses what MCFG tells of only if a device that is no bus has it.
    assert 'EisaId("PNP0C02")' in devices["MBRD"]
    assert "Memory32Fixed(ReadWrite,0xE0000000,0x00100000,)" in devices["MBRD"]
    assert found[b"MCFG"][44:] == struct.pack("<QHBB4x", 0xE0000000, 0, 0, 0)
    overrides = [entry for entry in madt_entries(found[b"APIC"]) if entry[0] == 2]
    assert overrides == [struct.pack("<BBBBIH", 2, 10, 0, gsi, gsi, 0xD) for gsi in (5, 9, 11)]


def test_mcfg_comes_with_pci_alone(memory, hardware):
    tables.write(memory, hardware(2, 3, True))
    with_pci = set(find(memory))
    tables.write(memory, hardware(2, 3))
    assert with_pci - set(find(memory)) == {b"MCFG"}


@pytest.mark.parametrize(("cpus", "virtio", "pci"), [(1, 0, False), (255, 64, True)])
def test_iasl_decodes_and_compiles_all(written, iasl, tmp_path, cpus, virtio, pci):
    found = written(cpus, virtio, pci)
    for name in (b"XSDT", b"FACP", b"FACS", b"APIC", b"DSDT", *[b"MCFG"] * pci):
        path = tmp_path / name.decode()
        path.with_suffix(".dat").write_bytes(found[name])
        iasl("-p", str(path), "-d", f"{path}.dat")
        iasl("-p", f"{path}-again", f"{path}.dsl")
        again = (tmp_path / f"{name.decode()}-again.aml").read_bytes()
        if name == b"FACS":
            assert again == found[name]
        else:
            # All but checksum and compiler, where iasl puts itself.
            assert again[:9] == found[name][:9]
            assert again[36:] == found[name][36:]


def test_no_room_for_more(memory, hardware):
    with pytest.raises(ConfigError, match="no room"):
        tables.write(memory, hardware(255, 1000))
    assert memory.read(0xA0000 - 1, 1) == b"\0"


def test_without_acpi(memory, hardware):
    assert tables.write(memory, hardware(), with_acpi=False) == 0
    area = memory.read(layout.TABLES_START, layout.VGA_START - layout.TABLES_START)
    assert b"RSD PTR " not in area
    assert b"FACP" not in area
    assert b"_MP_" in area


def test_nothing_else_is_touched(memory, hardware):
    tables.write(memory, hardware())
    low = memory.read(0, layout.TABLES_START)
    changed = {at for at, byte in enumerate(low) if byte != 0xEE}
    assert changed == {0x40E, 0x40F, 0x413, 0x414}
    assert memory.read_u16(0x413) == layout.TABLES_START >> 10
