"""virtio devices as the tiny guest's drivers find them on the real /dev/kvm: nothing is lost,
repeated or torn, whatever they live through, and whenever that comes."""

import re
import shlex
import subprocess

import pytest
from harness import lives
from harness.process import DEADLINE_S, pyvmm
from harness.stream import Peer, consoles

SMP = pytest.mark.parametrize("smp", [1, 2])


def numbers(machine, name):
    """The numbers of the guest's complete progress lines."""
    text = machine.serial[: machine.serial.rfind(b"\n") + 1].decode()
    return [int(number) for number in re.findall(rf"^{name} (\d+)\r?\n", text, re.M)]


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


@SMP
@lives.STANDS_STILL
def test_entropy_goes_on(any_vm, smp):
    machine = any_vm("-device", "virtio-rng-device", append="virtio-rng step=16", smp=smp)
    machine.expect(r"rng \d+\r\n")
    before, _ = machine.footprint()
    for _ in range(3):
        machine.live()
        machine.seen = len(machine.serial)
        machine.expect(r"rng \d+\r\n")
    assert machine.footprint()[0] == before
    assert b"FAIL" not in machine.serial
    assert machine.stderr() == ""
    shown = numbers(machine, "rng")
    assert shown == list(range(16, shown[-1] + 1, 16))


def test_guest_resets_and_uses_the_device_again(any_vm):
    machine = any_vm("-device", "virtio-rng-device", append="virtio-rng step=8")
    for _ in range(3):
        machine.expect(r"program virtio-rng on 1 cpus\r\nrng 8\r\n")
        machine.live()
        # The next start is not out before the reset.
        machine.seen = len(machine.serial)
        machine.hmp("system_reset")
    assert machine.stderr() == ""


def test_stop_and_cont(any_vm):
    source = ("-object", "rng-random,id=r", "-device", "virtio-rng-device,rng=r")
    machine = any_vm(*source, append="virtio-rng step=8")
    for number in range(5):
        machine.seen = len(machine.serial)
        machine.expect(r"rng \d+\r\n")
        machine.hmp("stop")
        if number % 4 == 0:
            machine.live()
        assert machine.status == "paused"
        machine.hmp("cont")
    machine.seen = len(machine.serial)
    machine.expect(r"rng \d+\r\n")
    assert b"FAIL" not in machine.serial


def test_device_is_shown(any_vm):
    machine = any_vm("-device", "virtio-rng-device,id=entropy", append="virtio-rng step=8")
    machine.expect("rng 8")
    machine.live()
    tree = machine.hmp("info qtree")
    assert "virtio-rng-device" in tree
    assert "entropy" in tree
    assert "virtio-rng-device" in machine.hmp("info mtree")


# ---- console -------------------------------------------------------------------------------


@SMP
@lives.CONNECTED
def test_console_output(any_vm, tmp_path, smp):
    with Peer(tmp_path, "con0") as peer:
        machine = any_vm(*consoles(peer), append="virtio-console passes=40000", smp=smp)
        machine.expect("ready")
        before, _ = machine.footprint()
        peer.receive(1 << 16, keep=True)
        machine.live()
        peer.wait_full()  # nobody takes it
        assert machine.status == "running"  # the VMM is not held up
        machine.live()
        assert machine.footprint()[0] == before
        lines = b"".join(b"line %d\n" % number for number in range(1, 40001))
        assert peer.receive(len(lines)) == lines
        assert machine.wait_exit() == 0
        assert b"virtio-console PASS" in machine.serial
        assert machine.stderr() == ""


@pytest.mark.parametrize("ports", [0, 2])
@lives.CONNECTED
@lives.BUSES
def test_console_echo(any_vm, tmp_path, ports, bus):
    peers = [Peer(tmp_path, f"con{number}") for number in range(ports + 1)]
    try:
        parts = [bytes([65 + number]) * 19973 for number in range(2)] + [bytes(range(256)) * 40]
        data = b"".join(parts)
        machine = any_vm(
            *consoles(*peers), append=f"virtio-console mode=echo port={ports} passes={len(data)}"
        )
        machine.expect("ready")
        for part in parts:
            machine.live()
            peers[ports].send(part)
        assert peers[ports].receive(len(data)) == data
        assert machine.wait_exit() == 0
        assert b"FAIL" not in machine.serial
        assert machine.stderr() == ""
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
def test_evil_guest_harms_nobody_but_itself(any_vm, tmp_path, smp):
    with open(tmp_path / "disk", "wb") as disk:
        disk.truncate(8 << 20)
    machine = any_vm(*VICTIMS, append=f"virtio-attack step=16 seed={smp}", smp=smp)
    machine.expect(r"attack \d+ broken [1-9]\d*\r\n")
    machine.live()
    footprint, before = machine.footprint(), machine.memory_kib("Anonymous")
    for number in range(6):
        machine.expect(r"attack \d+ broken \d+\r\n")
        if number % 3 == 1:
            machine.live()
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
