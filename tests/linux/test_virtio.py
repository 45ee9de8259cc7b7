"""Debian's own drivers find the virtio devices by ACPI, and updates do not disturb them."""

import pytest
from harness import linux
from harness.stream import Peer, consoles

BOOT_S = 240
UPDATES = 3
MODULES = ("virtio_mmio", "virtio_console", "virtio_rng")
RNG = ("-device", "virtio-rng-device")


@pytest.fixture
def peers(tmp_path):
    """The other ends of a console and a port."""
    made = [Peer(tmp_path, "con0"), Peer(tmp_path, "port1")]
    yield made
    for peer in made:
        peer.close()


def test_drivers_find_their_devices(vm, tmp_path, peers):
    console, port = peers
    # One descriptor for both ways: what comes while nobody has a port open is thrown away.
    script = """
mkdir /sys
mount -t sysfs sysfs /sys
echo rng $(cat /sys/class/misc/hw_random/rng_current)
echo random $(head -c 512 /dev/hwrng | md5sum)
echo name $(cat /sys/class/virtio-ports/vport1p1/name)
exec 3<>/dev/vport1p1
echo ping >&3
read -r line <&3
echo port $line
exec 4<>/dev/hvc0
stty raw -echo <&4
echo hello >&4
read -r line <&4
echo console $line
grep virtio /proc/interrupts
poweroff -f
"""
    options = linux.options(tmp_path, script, modules=MODULES)
    machine = vm(*options, *RNG, *consoles(console, port), memory="256M", smp=2)
    machine.expect(r"rng virtio_rng\.0\r?\n", BOOT_S)
    assert machine.expect(r"random ([0-9a-f]{32})", BOOT_S)[1] != b"0" * 32
    machine.expect(r"name org.test.port1\r?\n", BOOT_S)
    assert port.receive(5, timeout=BOOT_S) == b"ping\n"
    port.send(b"pong\n")
    machine.expect(r"port pong\r?\n", BOOT_S)
    assert console.receive(6, timeout=BOOT_S) == b"hello\n"
    console.send(b"there\n")
    machine.expect(r"console there\r?\n", BOOT_S)
    machine.expect(r"16: .*IO-APIC +16-edge +virtio0", BOOT_S)
    assert machine.wait_exit(BOOT_S) == 0
    assert machine.stderr() == ""


def test_console_output_goes_on_over_updates(vm, tmp_path, peers):
    console, port = peers
    script = """
i=0
while :; do echo "line $i"; i=$((i + 1)); done >/dev/hvc0
"""
    options = linux.options(tmp_path, script, modules=MODULES)
    machine = vm(*options, *RNG, *consoles(console, port), memory="256M", smp=2)
    for _ in range(UPDATES):
        console.receive(len(console.received) + 200, keep=True, timeout=BOOT_S)
        machine.update(BOOT_S)
    console.receive(len(console.received) + 200, keep=True, timeout=BOOT_S)
    # Of the last line there may be a part only.
    *lines, _ = console.received.decode().split("\r\n")
    assert lines == [f"line {number}" for number in range(len(lines))]
    assert machine.stderr() == ""
