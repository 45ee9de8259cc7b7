"""What guests made for QEMU look for, seen by a guest: from ring 3 and from ring 0."""

import re
import struct

import pytest
from harness import process

POLICY = "kvm-pit.lost_tick_policy"


def fnv1a(data):
    """As the guest prints it."""
    value = 0xCBF29CE484222325
    for byte in data:
        value = (value ^ byte) * 0x100000001B3 & (1 << 64) - 1
    return value


def files(machine):
    """Size and hash of each file that the guest has listed, by name."""
    found = re.findall(rb"file (\S+) (\d+) 0x(\w+)\r\n", bytes(machine.serial))
    return {name.decode(): (int(size), int(value, 16)) for name, size, value in found}


@pytest.mark.parametrize("smp", [1, 2])
def test_guest_finds_all_of_it(vm, tmp_path, smp):
    content = bytes(range(251)) * 40
    (tmp_path / "content").write_bytes(content)
    machine = vm(
        *("-device", "pvpanic", "-device", "vmcoreinfo", "-device", "pc-testdev"),
        *("-fw_cfg", f"opt/file,file={tmp_path}/content", "-fw_cfg", "opt/text,string=hello"),
        *("-global", f"{POLICY}=discard"),
        append=f"fwcfg testdev passes=2 pyvmm.cpus={smp}",
        smp=smp,
    )
    machine.expect(r"fwcfg ram 0x4000000\r\n")
    machine.expect(r"fwcfg 2\r\nfwcfg PASS\r\n")
    assert machine.wait_exit() == 0
    assert machine.stderr() == ""
    found = files(machine)
    assert found["opt/text"] == (5, fnv1a(b"hello"))
    assert found["opt/file"] == (len(content), fnv1a(content))
    assert found["etc/e820"] == (20, fnv1a(struct.pack("<QQI", 0, 64 << 20, 1)))
    assert found["etc/pvpanic-port"] == (2, fnv1a(b"\x05\x05"))
    assert {"etc/acpi/rsdp", "etc/acpi/tables", "etc/table-loader", "etc/vmcoreinfo"} < set(found)


def test_reset_finds_it_as_it_was(vm):
    machine = vm("-device", "vmcoreinfo", append="fwcfg")
    machine.expect(r"fwcfg 2\r\n")
    (before,) = {files(machine)["etc/vmcoreinfo"]}
    machine.hmp("system_reset")
    machine.expect(r"program fwcfg")
    machine.expect(r"fwcfg 1\r\n")
    assert files(machine)["etc/vmcoreinfo"] == before


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["-fw_cfg", "opt/x,file=nowhere"], "pyvmm: -fw_cfg: file=nowhere: No such file"),
        (["-global", "kvm-pit.x=1"], "pyvmm: -global: 'kvm-pit.x' cannot be set"),
        (
            ["-device", "pc-testdev", "-debugcon", "null"],
            "pyvmm: -device isa-debugcon: .* overlaps pc-testdev; choose other ports",
        ),
    ],
)
def test_what_cannot_be_is_one_line(words, problem):
    done = process.run_cli("run", "-serial", "none", "-monitor", "none", *words)
    assert done.returncode == 2
    assert re.match(problem, done.stderr), done.stderr
    assert done.stderr.count("\n") == 1
