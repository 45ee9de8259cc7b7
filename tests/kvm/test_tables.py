"""The firmware's tables in a running machine: there at each boot, and not touched afterwards."""

from harness import guests

# mov $0x9fc0, %ax; mov %ax, %es; cmpb $'R', %es:0x20; jne .+6 over all that follows: the RSDP
# must be there, and is spoilt for the next boot to mend.
LOOK = b"\xb8\xc0\x9f\x8e\xc0\x26\x80\x3e\x20\x00\x52"
SPOIL = b"\x26\xc6\x06\x20\x00\x00"  # movb $0, %es:0x20


def memory(machine, address, size):
    lines = machine.hmp(f"xp /{size}xb {address:#x}").splitlines()
    return bytes(int(word, 16) for line in lines for word in line.split(":")[1].split())


def pointer(machine, at):
    return int.from_bytes(memory(machine, at, 8), "little")


def test_tables_come_back_with_every_reset(any_vm, tmp_path):
    body = SPOIL + guests.print_text("found\n") + guests.out8(0x64, 0xFE)
    code = LOOK + b"\x75" + bytes([len(body)]) + body + guests.HALT
    machine = any_vm("-kernel", guests.flat(tmp_path, code))
    for _ in range(3):
        machine.expect("found\n")
        machine.live()


def test_tables_tell_of_this_machine(any_vm):
    machine = any_vm("-device", "pvpanic,ioport=0x510", "-serial", "null", smp=3)
    machine.expect("guest> ")
    rsdp = memory(machine, 0x9FC20, 36)
    assert (rsdp[:8], sum(rsdp) % 256) == (b"RSD PTR ", 0)
    xsdt = int.from_bytes(rsdp[24:32], "little")
    fadt, madt = (pointer(machine, xsdt + at) for at in (36, 44))
    dsdt = pointer(machine, fadt + 140)
    found = {}
    for at in (xsdt, fadt, madt, dsdt):
        table = memory(machine, at, int.from_bytes(memory(machine, at + 4, 4), "little"))
        assert sum(table) % 256 == 0
        found[table[:4]] = table
    assert list(found) == [b"XSDT", b"FACP", b"APIC", b"DSDT"]
    processors = [found[b"APIC"][at : at + 4] for at in range(44, 44 + 3 * 8, 8)]
    assert processors == [bytes((0, 8, index, index)) for index in range(3)]
    assert found[b"APIC"][44 + 3 * 8] == 1
    for part in (b"COM1", b"COM2", b"QEMU0001", b"\x47\x01\x10\x05\x10\x05\x01\x01"):
        assert part in found[b"DSDT"]
    assert b"QEMU0002" not in found[b"DSDT"]  # whose ports the other has
    machine.live()
    assert memory(machine, 0x9FC20, 36) == rsdp
    assert memory(machine, dsdt, len(found[b"DSDT"])) == found[b"DSDT"]


def test_no_acpi(vm):
    machine = vm("-machine", "acpi=off")
    machine.expect("guest> ")
    assert memory(machine, 0x9FC10, 4) == b"_MP_"
    assert memory(machine, 0x9FC20, 8) == bytes(8)
