"""What the guest's CPUs say that they can, and what they keep of what the guest told them."""

import pytest
from harness import guests, needs, run_cli


def feature_printer(folder, leaf, bit):
    """A flat image that prints ``on`` if a bit of a leaf's ECX is set, else ``off``."""
    on = guests.print_text("on\n") + guests.HALT
    code = (
        b"\x66\xb8" + leaf.to_bytes(4, "little")  # mov $leaf, %eax
        + b"\x0f\xa2"  # cpuid
        + b"\x66\x0f\xba\xe1" + bytes([bit])  # bt $bit, %ecx
        + b"\x73" + bytes([len(on)])  # jnc
        + on + guests.print_text("off\n") + guests.HALT
    )  # fmt: skip
    return guests.flat(folder, code)


@pytest.mark.parametrize(
    ("options", "pattern"),
    [
        ("host", "kvmclock=1 deadline=1"),
        ("host,-tsc-deadline", "kvmclock=1 deadline=0"),
        ("max,kvmclock=off", "kvmclock=0 deadline=1"),
        ("host,kvm=off", "kvmclock=0 deadline=1"),
    ],
)
def test_features_as_the_guest_finds_them(vm, options, pattern):
    machine = vm("-cpu", options, append="timers period=20 rounds=2")
    machine.expect(pattern)
    machine.expect("timers ok 2")


@pytest.mark.parametrize(("sign", "printed"), [("+", "on"), ("-", "off")])
def test_feature_in_the_first_leaf(vm, tmp_path, sign, printed):
    image = feature_printer(tmp_path, 1, 31)
    machine = vm("-cpu", f"host,{sign}hypervisor", "-kernel", image)
    assert machine.expect(r"o\w+\n").group().split()[-1] == printed.encode()


def test_feature_that_no_kvm_has():
    result = run_cli("run", "-cpu", "host,+ia64", "-nodefaults")
    assert result.returncode != 0
    assert result.stderr == "pyvmm: -cpu: ia64 cannot be had on this host; leave it out\n"


def test_memory_is_cacheable(any_vm, tmp_path):
    # mov $0x2ff, %ecx; rdmsr; cmp $0x806, %eax: MTRRs on, write-back by default
    code = b"\x66\xb9\xff\x02\x00\x00\x0f\x32\x66\x3d\x06\x08\x00\x00"
    good = guests.print_text("write-back\n") + guests.HALT
    code += b"\x75" + bytes([len(good)]) + good + guests.print_text("other\n") + guests.HALT
    machine = any_vm("-kernel", guests.flat(tmp_path, code))
    assert machine.expect(r"\S+\n").group() == b"write-back\n"
    machine.live()
    machine.hmp("system_reset")
    assert machine.expect(r"\S+\n").group() == b"write-back\n"


def test_what_was_taken_away_stays_away(any_vm):
    machine = any_vm("-cpu", "host,-tsc-deadline", append="timers period=50 rounds=0", smp=2)
    machine.expect("kvmclock=1 deadline=0")
    machine.live()
    machine.seen = len(machine.serial)
    machine.expect("timers ok")
    machine.hmp("system_reset")
    machine.expect("kvmclock=1 deadline=0")


def test_pages_that_kvm_does_not_own_any_more(any_vm):
    """KVM writes to where some registers point. A guest that has put something else there since
    keeps it, also over a reset, which leaves none of them on."""
    machine = any_vm("-kernel", guests.image("real-pv.bin"))
    for _ in range(2):
        machine.expect("real-pv 0000000")
        machine.live()
    machine.hmp("system_reset")
    machine.expect("real-pv 00000001")
    machine.live()
    machine.seen = len(machine.serial)
    machine.expect("real-pv 0000000")
    assert b"FAIL" not in machine.serial


def test_what_pae_paging_has_read(any_vm):
    """The page-directory-pointer registers, which memory does not agree with any more."""
    machine = any_vm("-kernel", guests.image("real-pae.bin"))
    verdict = machine.expect("real-pae (00000001|has .*)\r\n")[1].decode()
    if verdict != "00000001":
        needs.another_host(f"this KVM {verdict}")
    number = 0
    for _ in range(3):
        machine.live()
        machine.seen = len(machine.serial)
        found = int(machine.expect(r"real-pae ([0-9a-f]{8})")[1], 16)
        assert found > number
        number = found
    assert machine.serial.count(b"real-pae 00000001\r\n") == 1
    assert b"FAIL" not in machine.serial
