"""virtio devices on PCI on the real /dev/kvm: where they are, how many there can be, and what an
evil driver does to them. What they do otherwise stands with that of virtio-mmio."""

import re
import shlex

import pytest
from harness import lives

RNG = ("-device", "virtio-rng-pci")
SMP = pytest.mark.parametrize("smp", [1, 2])
INTERRUPTS = pytest.mark.parametrize("words", ["pci", "pci intx"], ids=["messages", "line"])


def image(folder, mebibytes):
    path = folder / "disk.img"
    with open(path, "wb") as file:
        file.truncate(mebibytes << 20)
    return path


def disk(path):
    return [
        *("-drive", f"file={path},format=raw,if=none,id=disk"),
        *("-device", "virtio-blk-pci,drive=disk,serial=abc"),
    ]


# ---- what there is -------------------------------------------------------------------------


def test_scan_finds_each_device_where_it_was_put(vm, tmp_path):
    path = image(tmp_path, 1)
    machine = vm(
        *("-device", "virtio-rng-pci,addr=5,bus=pcie.0,disable-legacy=on,disable-modern=off"),
        *disk(path),
        *("-device", "virtio-serial,vectors=2"),
        append="pci-scan",
    )
    assert machine.wait_exit() == 0
    text = machine.serial.decode()
    found = dict(re.findall(r"pci ([0-9a-f]+)\.0 id 1af4:([0-9a-f]+) ", text))
    assert found == {"5": "1044", "1": "1042", "2": "1043"}
    functions = text.split("pci ")
    assert all(one.count("capability 0x9 ") == 5 for one in functions if "1af4" in one)
    assert all(one.count("capability 0x11 ") == 1 for one in functions if "1af4" in one)


def test_more_devices_than_interrupt_lines(vm):
    machine = vm(*RNG * 20, append="virtio-rng pci nth=19 step=8 passes=1")
    machine.expect("virtio-rng PASS")
    assert machine.wait_exit() == 0
    machine = vm(*RNG * 20, append="virtio-rng pci intx nth=18 step=8 passes=1")
    machine.expect("virtio-rng PASS")
    assert machine.wait_exit() == 0


def test_devices_on_both_buses(any_vm):
    devices = ("-device", "virtio-rng-device,id=first", *RNG, "-device", "virtio-rng,id=third")
    for words in ("pci nth=1", ""):
        machine = any_vm(*devices, append=f"virtio-rng {words} step=8")
        machine.expect(r"rng \d+\r\n")
        machine.live()
        machine.seen = len(machine.serial)
        machine.expect(r"rng \d+\r\n")
        tree = machine.hmp("info qtree")
        assert tree.count("dev: virtio-rng-pci") == 2
        assert 'dev: virtio-rng-device, id "first"' in tree
        # The guest places those that it looks at.
        placed = machine.hmp("info mtree").count("virtio-rng-pci BAR 4")
        assert placed == (2 if words else 0)
        machine.hmp_quit()


# ---- what they live through ----------------------------------------------------------------


@INTERRUPTS
@lives.STANDS_STILL
def test_disk_goes_on(any_vm, tmp_path, words):
    path = image(tmp_path, 4)
    machine = any_vm(*disk(path), append=f"virtio-blk {words} depth=32 zero mb=1", smp=2)
    machine.expect("pass 0 ok")
    for _ in range(2):
        machine.live()
    machine.seen = len(machine.serial)
    for _ in range(2):
        machine.expect(r"blk pass \d+ ok")
    done = [int(number) for number in re.findall(rb"blk pass (\d+) ok", bytes(machine.serial))]
    assert done == list(range(len(done)))
    assert machine.stderr() == ""


def test_an_update_keeps_the_place(vm):
    machine = vm(*RNG, append="virtio-rng pci step=8")
    machine.expect(r"rng \d+\r\n")

    def command(device):
        return [device if word == "virtio-rng-pci" else word for word in machine.argv]

    for other in ("virtio-rng-pci,addr=2", "virtio-rng-device", "virtio-rng-pci,vectors=1"):
        reply = machine.hmp(f"update {shlex.join(command(other))}")
        assert "-device" in reply, reply
    machine.argv = command("virtio-rng,addr=01.0,bus=pcie.0")
    machine.update()
    machine.seen = len(machine.serial)
    machine.expect(r"rng \d+\r\n")
    assert machine.stderr() == ""


# ---- an evil guest -------------------------------------------------------------------------

VICTIMS = [
    *RNG * 2,
    *("-chardev", "null,id=first", "-device", "virtio-serial-pci"),
    *("-device", "virtconsole,chardev=first"),
    *("-chardev", "ringbuf,id=second", "-device", "virtio-serial-pci"),
    *("-device", "virtserialport,chardev=second,name=org.test"),
    *disk("../disk.img"),
]


@SMP
def test_evil_guest_harms_nobody_but_itself(any_vm, tmp_path, smp):
    image(tmp_path, 8)
    machine = any_vm(*VICTIMS, append=f"virtio-attack pci step=8 seed={smp}", smp=smp)
    machine.expect(r"attack \d+ broken [1-9]\d*\r\n")
    machine.live()
    footprint, before = machine.footprint(), machine.memory_kib("Anonymous")
    for number in range(4):
        machine.expect(r"attack \d+ broken \d+\r\n")
        if number % 3 == 1:
            machine.live()
        assert machine.status == "running"
    assert machine.footprint() == footprint
    assert machine.memory_kib("Anonymous") - before < 1024
    assert b"FAIL" not in machine.serial
    assert machine.stderr() == ""
