"""virtio devices over live updates: nothing lost, repeated or torn, whenever the update comes."""

import re

import pytest


def numbers(machine, name):
    """The numbers of the guest's complete progress lines."""
    text = machine.serial[: machine.serial.rfind(b"\n") + 1].decode()
    return [int(number) for number in re.findall(rf"^{name} (\d+)\r?\n", text, re.M)]


@pytest.mark.parametrize("smp", [1, 2])
def test_entropy_goes_on(vm, smp):
    machine = vm("-device", "virtio-rng-device", append="virtio-rng step=16", smp=smp)
    machine.expect(r"rng \d+")
    before = machine.footprint()
    for _ in range(15):
        machine.update()
        machine.expect(r"rng \d+\r\n")
        assert machine.footprint() == before
    assert b"FAIL" not in machine.serial
    assert machine.stderr() == ""
    shown = numbers(machine, "rng")
    assert shown == list(range(16, shown[-1] + 1, 16))


def test_stopped_guest_goes_on_where_it_was(vm):
    machine = vm("-device", "virtio-rng-device", append="virtio-rng step=16")
    machine.expect(r"rng \d+")
    machine.hmp("stop")
    machine.update()
    assert machine.status == "paused"
    machine.hmp("cont")
    for _ in range(3):
        machine.seen = len(machine.serial)
        machine.expect(r"rng \d+\r\n")
    assert b"FAIL" not in machine.serial


def test_new_command_must_have_the_same_devices_in_the_same_order(vm):
    machine = vm("-device", "virtio-rng-device", append="virtio-rng step=16")
    machine.expect(r"rng \d+")
    without = [*machine.argv, "-incoming", "file:vm.state"]
    at = without.index("virtio-rng-device")
    del without[at - 1 : at + 1]
    machine.set_update(without)
    reply = machine.hmp("migrate file:vm.state")
    assert "-device is nothing, this machine has virtio-rng-device" in reply
    machine.update()
    machine.expect(r"rng \d+\r\n")
