"""virtio devices over live updates: nothing lost, repeated or torn, whenever the update comes."""

import re

import pytest
from harness.stream import Peer, consoles


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
    source = ("-object", "rng-random,id=r", "-device", "virtio-rng-device,rng=r")
    machine = vm(*source, append="virtio-rng step=16")
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


@pytest.mark.parametrize("smp", [1, 2])
def test_console_output_under_updates_is_complete(vm, tmp_path, smp):
    with Peer(tmp_path, "con0") as peer:
        machine = vm(*consoles(peer), append="virtio-console", smp=smp)
        machine.expect("ready")
        before = machine.footprint()
        for number in range(10):
            if number % 2:
                peer.wait_full()  # an update with output that nobody takes
            else:
                peer.receive(1 << 16, keep=True)
            machine.update()
            assert machine.footprint() == before
        machine.hmp("stop")
        text = peer.rest()
        lines = text[: text.rfind(b"\n")].split(b"\n")
        assert len(lines) > 1000
        assert lines == [b"line %d" % number for number in range(1, len(lines) + 1)]
        assert machine.stderr() == ""


@pytest.mark.parametrize("ports", [0, 1])
def test_console_echo_under_updates_is_complete(vm, tmp_path, ports):
    peers = [Peer(tmp_path, f"con{number}") for number in range(ports + 1)]
    try:
        machine = vm(*consoles(*peers), append=f"virtio-console mode=echo port={ports}")
        machine.expect("ready")
        sent = bytearray()
        for number in range(8):
            data = bytes([65 + number]) * 9973
            sent += data
            peers[ports].send(data)
            machine.update()
        assert peers[ports].receive(len(sent)) == bytes(sent)
        assert b"FAIL" not in machine.serial
        assert machine.stderr() == ""
    finally:
        for peer in peers:
            peer.close()


@pytest.mark.parametrize("smp", [1, 2])
def test_evil_guest_does_not_keep_updates_away(vm, smp):
    devices = ["-device", "virtio-rng-device"] * 2
    devices += ["-chardev", "null,id=first", "-device", "virtio-serial-device"]
    devices += ["-device", "virtconsole,chardev=first", "-device", "virtserialport,name=org.test"]
    machine = vm(*devices, append="virtio-attack step=8", smp=smp)
    for _ in range(10):
        machine.expect(r"attack \d+ broken \d+\r\n")
        machine.update()
    machine.expect(r"attack \d+ broken \d+\r\n")
    assert b"FAIL" not in machine.serial
    assert machine.stderr() == ""
