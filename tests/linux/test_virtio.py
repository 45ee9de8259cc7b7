"""Debian's own drivers of virtio devices are not disturbed by updates."""

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
