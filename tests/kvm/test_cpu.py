"""What the guest's CPUs say that they can."""

import pytest
from harness import guests, run_cli


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


def test_memory_is_cacheable(vm, tmp_path):
    # mov $0x2ff, %ecx; rdmsr; cmp $0x806, %eax: MTRRs on, write-back by default
    code = b"\x66\xb9\xff\x02\x00\x00\x0f\x32\x66\x3d\x06\x08\x00\x00"
    good = guests.print_text("write-back\n") + guests.HALT
    code += b"\x75" + bytes([len(good)]) + good + guests.print_text("other\n") + guests.HALT
    machine = vm("-kernel", guests.flat(tmp_path, code))
    assert machine.expect(r"\S+\n").group() == b"write-back\n"
    machine.hmp("system_reset")
    assert machine.expect(r"\S+\n").group() == b"write-back\n"


def test_update_keeps_what_was_taken_away(vm, tmp_path):
    machine = vm("-cpu", "host,-tsc-deadline", append="timers period=50 rounds=0", smp=2)
    machine.expect("kvmclock=1 deadline=0")
    machine.update()
    machine.expect("timers ok")
