"""Linux on a machine with PCI: it finds the bus by ACPI, and uses the devices on it, by messages
and by interrupt lines, through updates."""

import hashlib
import os
import re

import pytest
from harness import linux
from harness.network import GUEST_MAC, StreamPeer

BOOT_S = 240
DISK_SIZE = 4 << 20
LOOK = r"""
for device in /sys/bus/pci/devices/*; do
    cd $device
    echo pci: ${device##*/} $(cat vendor) $(cat device) $(basename $(readlink driver) 2>/dev/null)
done
cd /
grep virtio /proc/interrupts | sed 's/  */ /g; s/^ */irq: /'
dmesg -r | grep -E '^<[0-4]>|MMCONFIG|ECAM|BAR' | sed 's/^/log: /'
echo net: $(cat /sys/class/net/eth0/address)
n=0
while true; do
    n=$((n + 1))
    echo 3 >/proc/sys/vm/drop_caches
    echo sum: $n $(md5sum </dev/vda) $(head -c 64 /dev/hwrng | wc -c)
done
"""
MODULES = ("virtio_pci", "virtio_blk", "virtio_net", "virtio_rng")
FUNCTIONS = {
    "0000:00:00.0": "0x1b36 0x0008",
    "0000:00:01.0": "0x1af4 0x1042 virtio-pci",
    "0000:00:02.0": "0x1af4 0x1041 virtio-pci",
    "0000:00:03.0": "0x1af4 0x1044 virtio-pci",
}


def lines(machine, name):
    """What the guest printed behind a word."""
    text = machine.serial.decode(errors="replace").replace("\r", "")
    return re.findall(rf"^{name}: (.*)\n", text, re.M)


@pytest.mark.parametrize("how", ["", "pci=nomsi"])
def test_bus_is_found_and_works_over_updates(vm, tmp_path, how):
    contents = os.urandom(DISK_SIZE)
    disk = tmp_path / "disk"
    disk.write_bytes(contents)
    options = linux.options(tmp_path, LOOK, how, modules=MODULES)
    with StreamPeer(tmp_path) as network:
        machine = vm(
            *options,
            *("-drive", f"file={disk},format=raw,if=none,id=d0", "-device", "virtio-blk,drive=d0"),
            *(word.replace("virtio-net-device", "virtio-net-pci") for word in network.options),
            *("-device", "virtio-rng-pci"),
            memory="256M",
            smp=2,
        )
        machine.expect(r"sum: 1 ", BOOT_S)
        found = dict(line.split(" ", 1) for line in lines(machine, "pci"))
        assert {place: text.strip() for place, text in found.items()} == FUNCTIONS
        assert lines(machine, "net") == [GUEST_MAC.hex(":")]
        irqs = lines(machine, "irq")
        kind = "IO-APIC" if how else "PCI-MSI"
        assert len(irqs) >= 3, irqs
        assert all(kind in line for line in irqs), irqs
        log = lines(machine, "log")
        assert not [line for line in log if re.search("can't claim|no space|failed", line)], log
        for _ in range(3):
            machine.update(BOOT_S)
            machine.seen = len(machine.serial)
            machine.expect(r"sum: \d+ \w+ .*\n(?s:.*)sum: \d+ \w+ .*\n", BOOT_S)
    sums = [line.split() for line in lines(machine, "sum")]
    assert {line[1] for line in sums} == {hashlib.md5(contents).hexdigest()}
    assert {line[-1] for line in sums} == {"64"}
    assert [int(line[0]) for line in sums] == list(range(1, len(sums) + 1))
    assert machine.stderr() == ""
