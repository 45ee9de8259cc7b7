"""The firmware's tables as Linux reads them. What a kernel finds by ACPI: test_cloud.py."""

from harness import linux

BOOT_S = 240

BUTTON = """
button=/sys/firmware/acpi/interrupts/ff_pwr_btn
echo ready
while grep -q '^ *0 ' $button; do sleep 0.2; done
echo pressed
poweroff -f
"""


def test_power_button(vm, tmp_path):
    machine = vm(*linux.options(tmp_path, BUTTON, modules=["button"]), memory="256M")
    machine.expect("ready\r?\n", BOOT_S)
    machine.hmp("system_powerdown")
    machine.expect("pressed\r?\n", BOOT_S)
    assert machine.wait_exit(BOOT_S) == 0
    assert b"reboot: Power down" in machine.serial


def test_processors_without_acpi(vm, tmp_path):
    options = linux.options(
        tmp_path,
        "echo cpus: $(nproc)\nreboot -f\n",
        f"reboot=t {linux.NO_AGP}",
        kernel=linux.OTHER_KERNEL,
    )
    machine = vm(*options, "-machine", "acpi=off", memory="256M", smp=2)
    machine.expect(r"cpus: 2\r?\n", BOOT_S)
    assert machine.wait_exit(BOOT_S) == 0
