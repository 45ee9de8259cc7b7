"""The PCI bus and virtio on it, on the real /dev/kvm, as the tiny guest's drivers find them."""

import re
import shlex

import pytest
from harness import lives

INTERRUPTS = pytest.mark.parametrize("how", ["", "intx", "pci=ecam"])


def test_functions_are_where_they_were_asked_for(vm):
    machine = vm(
        *("-device", "virtio-rng-pci,addr=3", "-device", "virtio-rng-pci,id=second"),
        *("-device", "virtio-rng,addr=3.2,bus=pcie.0", "-device", "virtio-rng-device"),
        append="virtio-rng nth=0 passes=1",
    )
    machine.expect("virtio-rng PASS")
    assert machine.wait_exit() == 0


def test_bus_is_shown(any_vm):
    devices = ["-device", "virtio-rng-pci,addr=3", "-device", "virtio-rng,id=second,addr=3.1"]
    machine = any_vm(*devices, append="virtio-rng step=8")
    machine.expect("rng 8")
    machine.live()
    assert machine.hmp("info pci") == (
        "  Bus  0, device   0, function 0:\r\n"
        "    Host bridge: PCI device 1b36:0008\r\n"
        '      id ""\r\n'
        "  Bus  0, device   3, function 0:\r\n"
        "    Class 0255: PCI device 1af4:1044\r\n"
        "      PCI subsystem 1af4:1100\r\n"
        "      IRQ 7, pin A\r\n"
        "      BAR1: 32 bit memory at 0xc0000000 [0xc0000fff].\r\n"
        "      BAR4: 64 bit prefetchable memory at 0xc0100000 [0xc0103fff].\r\n"
        '      id ""\r\n'
        "  Bus  0, device   3, function 1:\r\n"
        "    Class 0255: PCI device 1af4:1044\r\n"
        "      PCI subsystem 1af4:1100\r\n"
        "      IRQ 7, pin A\r\n"
        "      BAR1: 32 bit memory of 0x1000 bytes, not enabled.\r\n"
        "      BAR4: 64 bit prefetchable memory of 0x4000 bytes, not enabled.\r\n"
        '      id "second"\r\n'
    ).replace("\r", "")


def test_machine_without_a_bus(vm):
    machine = vm(append="ticker period=20")
    machine.expect("tick 1")
    assert machine.hmp("info pci") == "there is no PCI bus\n"


def test_bus_without_devices_and_what_is_refused(vm):
    machine = vm("-machine", "pci=on", append="ticker period=20")
    machine.expect("tick 1")
    assert machine.hmp("info pci").startswith("  Bus  0, device   0, function 0:")
    reply = machine.hmp(f"update {shlex.join([*machine.argv[:-2], '-S'])}")
    assert "-machine" in reply, reply


def numbers(machine, name):
    """The numbers of the guest's complete progress lines."""
    text = machine.serial[: machine.serial.rfind(b"\n") + 1].decode()
    return [int(number) for number in re.findall(rf"^{name} (\d+)\r?\n", text, re.M)]


@INTERRUPTS
@pytest.mark.parametrize("smp", [1, 2])
@lives.STANDS_STILL
def test_entropy_goes_on(any_vm, smp, how):
    devices = ["-device", "virtio-rng-pci", "-device", "virtio-rng,addr=5"]
    machine = any_vm(*devices, append=f"virtio-rng nth=1 step=16 {how}", smp=smp)
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


@INTERRUPTS
def test_guest_resets_and_uses_the_device_again(any_vm, how):
    machine = any_vm("-device", "virtio-rng-pci", append=f"virtio-rng step=8 {how}")
    for _ in range(3):
        machine.expect(r"program virtio-rng on 1 cpus\r\nrng 8\r\n")
        machine.live()
        # The next start is not out before the reset.
        machine.seen = len(machine.serial)
        machine.hmp("system_reset")
    assert machine.stderr() == ""
