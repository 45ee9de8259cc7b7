"""virtio devices as the tiny guest's drivers find them on the real /dev/kvm."""

import shlex
import subprocess

import pytest
from harness.process import DEADLINE_S, pyvmm
from harness.stream import Peer, consoles

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


# ---- console -------------------------------------------------------------------------------


@SMP
def test_console_output(vm, tmp_path, smp):
    with Peer(tmp_path, "con0") as peer:
        machine = vm(*consoles(peer), append="virtio-console passes=5000", smp=smp)
        lines = b"".join(b"line %d\n" % number for number in range(1, 5001))
        assert peer.receive(len(lines)) == lines
        assert machine.wait_exit() == 0
        assert b"virtio-console PASS" in machine.serial
        assert machine.stderr() == ""


def test_console_output_to_a_peer_that_reads_late(vm, tmp_path):
    with Peer(tmp_path, "con0") as peer:
        machine = vm(*consoles(peer), append="virtio-console passes=100000")
        machine.expect("ready")
        peer.wait_full()
        machine.hmp("info status")  # the VMM is not held up
        lines = b"".join(b"line %d\n" % number for number in range(1, 100001))
        assert peer.receive(len(lines)) == lines
        assert machine.wait_exit() == 0


@pytest.mark.parametrize("ports", [0, 2])
def test_console_echo(vm, tmp_path, ports):
    peers = [Peer(tmp_path, f"con{number}") for number in range(ports + 1)]
    try:
        machine = vm(
            *consoles(*peers), append=f"virtio-console mode=echo port={ports} passes=50000"
        )
        machine.expect("ready")
        data = bytes(range(256)) * 200
        echoed = peers[ports].exchange(data, 50000)
        assert echoed == data[: len(echoed)]
        assert machine.wait_exit() == 0
    finally:
        for peer in peers:
            peer.close()


# ---- an evil guest -------------------------------------------------------------------------

VICTIMS = [
    *("-device", "virtio-rng-device") * 2,
    *("-chardev", "null,id=first", "-device", "virtio-serial-device"),
    *("-device", "virtconsole,chardev=first"),
    *("-chardev", "ringbuf,id=second", "-device", "virtio-serial-device"),
    *("-device", "virtserialport,chardev=second,name=org.test"),
    *("-drive", "file=../disk,format=raw,if=virtio"),
]


@SMP
@pytest.mark.parametrize("seed", [1, 2])
def test_evil_guest_harms_nobody_but_itself(vm, tmp_path, smp, seed):
    with open(tmp_path / "disk", "wb") as disk:
        disk.truncate(8 << 20)
    machine = vm(*VICTIMS, append=f"virtio-attack step=32 seed={seed}", smp=smp)
    machine.expect(r"attack \d+ broken [1-9]\d*\r\n")
    before, footprint = machine.memory_kib("Anonymous"), machine.footprint()
    for _ in range(6):
        machine.expect(r"attack \d+ broken \d+\r\n")
        assert machine.status == "running"
    assert machine.footprint() == footprint
    assert machine.memory_kib("Anonymous") - before < 1024
    assert b"FAIL" not in machine.serial
    assert machine.stderr() == ""


def test_queues_without_descriptors_for_them():
    words = ["-nodefaults", "-device", "virtio-serial-device,max_ports=31"]
    limit = f"ulimit -n 60; exec {shlex.join([pyvmm(), 'run', *words])}"
    done = subprocess.run(
        ["sh", "-c", limit], capture_output=True, text=True, check=False, timeout=DEADLINE_S
    )
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("pyvmm: -device: Too many open files: each queue")
