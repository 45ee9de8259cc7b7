"""virtio devices as the tiny guest's drivers find them on the real /dev/kvm."""

import pytest

SMP = pytest.mark.parametrize("smp", [1, 2])


@SMP
def test_entropy(vm, smp):
    machine = vm("-device", "virtio-rng-device", append="virtio-rng step=8 passes=4", smp=smp)
    assert machine.wait_exit() == 0
    assert b"rng 32\r\nvirtio-rng PASS\r\n" in machine.serial
    assert machine.stderr() == ""


def test_second_slot_and_its_interrupt(vm):
    # The guest takes the first entropy device; what is in front of it moves it.
    for count in (1, 8):
        devices = ["-device", "virtio-rng-device"] * count
        machine = vm(*devices, append=f"virtio-rng nth={count - 1} step=8 passes=1")
        machine.expect("virtio-rng PASS")
        assert machine.wait_exit() == 0


def test_guest_resets_and_uses_the_device_again(vm):
    machine = vm("-device", "virtio-rng-device", append="virtio-rng step=8")
    for _ in range(3):
        machine.expect(r"program virtio-rng on 1 cpus\r\nrng 8\r\n")
        # The next start is not out before the reset.
        machine.seen = len(machine.serial)
        machine.hmp("system_reset")
    assert machine.stderr() == ""


def test_stop_and_cont(vm):
    machine = vm("-device", "virtio-rng-device", append="virtio-rng step=8")
    for _ in range(5):
        machine.seen = len(machine.serial)
        machine.expect(r"rng \d+\r\n")
        machine.hmp("stop")
        machine.hmp("cont")
    assert b"FAIL" not in machine.serial


def test_device_is_shown(vm):
    machine = vm("-device", "virtio-rng-device,id=entropy", append="virtio-rng step=8")
    machine.expect("rng 8")
    tree = machine.hmp("info qtree")
    assert "virtio-rng-device" in tree
    assert "entropy" in tree
    assert "virtio-rng-device" in machine.hmp("info mtree")
