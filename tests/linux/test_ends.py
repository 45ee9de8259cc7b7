"""How a guest ends, and begins anew: what its kernel does, and what the options make of it.

That -no-reboot ends a guest which reboots or panics, other tests rely on.
"""

from harness import linux

BOOT_S = 240

#: Each boot takes one order from the serial port.
ORDERS = """
modprobe -abq $(cat /sys/bus/acpi/devices/QEMU0001:00/modalias 2>/dev/null)
echo ready
read -r order
[ $order != panic ] || echo c >/proc/sysrq-trigger
$order -f
"""
#: As if there were no -no-reboot.
REBOOT = ("-action", "reboot=reset")


def order(machine, text, answer):
    """Wait until a boot takes orders, and give one."""
    machine.expect(r"ready\r?\n", BOOT_S)
    machine.type(f"{text}\n")
    machine.expect(answer, BOOT_S)


def test_reboots_and_poweroff_over_updates(vm, tmp_path):
    options = linux.options(tmp_path, ORDERS)
    machine = vm(*options, *REBOOT, "-no-shutdown", memory="256M", smp=2)
    order(machine, "reboot", "reboot: Restarting system")
    machine.update(BOOT_S)
    order(machine, "reboot", "reboot: Restarting system")
    machine.update(BOOT_S)
    order(machine, "poweroff", "reboot: Power down")
    machine.wait_status("paused (shutdown)", BOOT_S)
    assert machine.serial.count(b"ready\r\n") == 3
    assert machine.stderr() == ""


def test_panic_pauses_and_a_reset_boots_again(vm, tmp_path):
    options = linux.options(tmp_path, ORDERS, files=linux.module_tree())
    panic = ("-device", "pvpanic", "-action", "panic=pause")
    machine = vm(*options, *panic, memory="256M")
    order(machine, "panic", "Kernel panic - not syncing: sysrq triggered crash")
    machine.wait_status("paused (guest-panicked)", BOOT_S)
    machine.hmp("system_reset")
    machine.hmp("cont")
    order(machine, "reboot", "reboot: Restarting system")
    assert machine.wait_exit(BOOT_S) == 0


def test_panic_that_nobody_looks_for_boots_again(vm, tmp_path):
    options = linux.options(tmp_path, ORDERS, files=linux.module_tree())
    ignored = ("-device", "pvpanic", "-action", "panic=none")
    machine = vm(*options, *REBOOT, *ignored, memory="256M")
    order(machine, "panic", "Kernel panic - not syncing: sysrq triggered crash")
    order(machine, "poweroff", "reboot: Power down")
    assert machine.wait_exit(BOOT_S) == 0
