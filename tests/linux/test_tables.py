"""What Linux finds of the machine by the firmware's tables, and how it ends it."""

import re
from pathlib import Path

import pytest
from harness import linux
from nested import image, packages

BOOT_S = 240

SYSFS = "mkdir -p /sys\nmount -t sysfs sys /sys\n"
LOOK = r"""
dmesg | grep -E 'ACPI (BIOS )?(Error|Warning|Exception)|\[Firmware' | sed 's/^/complaint: /'
grep -E '^ *(4|8|9):' /proc/interrupts | sed 's/  */ /g; s/^/irq: /'
grep -E '^(physical id|core id|apicid)' /proc/cpuinfo | sed 's/[ \t]*:/ =/; s/^/cpu: /'
ls /sys/bus/acpi/devices | sed 's/^/acpi: /'
echo clocksource: $(cat /sys/devices/system/clocksource/clocksource0/current_clocksource)
"""
ALARM = """
rtc=/sys/class/rtc/rtc0
echo $(($(cat $rtc/since_epoch) + 2)) >$rtc/wakealarm
while [ -n "$(cat $rtc/wakealarm)" ]; do sleep 0.2; done
echo alarm: $(grep rtc0 /proc/interrupts | awk '{ print $2 + $3 }')
"""
BUTTON = """
button=/sys/firmware/acpi/interrupts/ff_pwr_btn
insmod /modules/button.ko
echo ready
while grep -q '^ *0 ' $button; do sleep 0.2; done
echo pressed
"""


def lines(machine, name):
    """What the guest printed behind a word."""
    return re.findall(rf"^{name}: (.*?)\r?$", machine.serial.decode(errors="replace"), re.M)


def test_devices_and_processors(vm, tmp_path):
    script = f"{SYSFS}{LOOK}{ALARM}poweroff -f\n"
    options = linux.options(tmp_path, script, "quiet")
    machine = vm(*options, "-device", "pvpanic", memory="256M", smp="2,sockets=2")
    machine.expect("alarm: 1\r?\n", BOOT_S)
    assert machine.wait_exit(BOOT_S) == 0
    assert lines(machine, "complaint") == []
    shown = [(line.split()[0], line.split()[-1]) for line in lines(machine, "irq")]
    assert shown == [("4:", "ttyS0"), ("8:", "rtc0"), ("9:", "acpi")]
    cpus = lines(machine, "cpu")
    places = [re.sub(r"\D+", "", line) for line in cpus]
    assert places == [*"000", *"101"]  # socket, core, APIC id
    found = set(lines(machine, "acpi"))
    assert {"PNP0501:00", "PNP0B00:00", "QEMU0001:00", "LNXPWRBN:00"} <= found
    assert lines(machine, "clocksource") == ["kvm-clock"]


def test_power_button(vm, tmp_path):
    options = linux.options(tmp_path, f"{SYSFS}{BUTTON}poweroff -f\n", "quiet")
    # The kernel unpacks one archive after the other.
    initrd = Path(options[options.index("-initrd") + 1])
    found = image.modules(packages.unpacked(packages.OUTER_KERNEL), ["button"])
    files = {f"modules/{name}.ko": data for name, data in found.items()}
    initrd.write_bytes(initrd.read_bytes() + image.cpio(files))
    machine = vm(*options, memory="256M")
    machine.expect("ready\r?\n", BOOT_S)
    machine.hmp("system_powerdown")
    machine.expect("pressed\r?\n", BOOT_S)
    assert machine.wait_exit(BOOT_S) == 0
    assert b"reboot: Power down" in machine.serial


@pytest.mark.parametrize("way", ["acpi", "kbd"])
def test_reboot(vm, tmp_path, way):
    machine = vm(*linux.options(tmp_path, "reboot -f\n", f"reboot={way}"), memory="256M")
    machine.expect("reboot: Restarting system", BOOT_S)
    assert machine.wait_exit(BOOT_S) == 0


def test_processors_without_acpi(vm, tmp_path):
    options = linux.options(tmp_path, "echo cpus: $(nproc)\nreboot -f\n", "quiet")
    machine = vm(*options, "-machine", "acpi=off", memory="256M", smp=2)
    machine.expect(r"cpus: 2\r?\n", BOOT_S)
    assert machine.wait_exit(BOOT_S) == 0
