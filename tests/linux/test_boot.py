"""An unmodified Debian kernel from its first instruction to its end."""

from harness import linux

#: From the start to the end of the guest, emulated machine included.
BOOT_S = 240


def test_vmlinux_boots_to_init_and_reboots(vm, tmp_path):
    script = "echo init: $(uname -sr) $(nproc)\nreboot -f\n"
    machine = vm(*linux.options(tmp_path, script), memory="256M")
    found = machine.expect(r"init: Linux (\d+)\.\d+\S* (\d+)\r?\n", BOOT_S)
    assert (int(found[1]) >= 6, int(found[2])) == (True, 1)
    assert machine.wait_exit(BOOT_S) == 0
    assert b"reboot: Restarting system" in machine.serial


def test_panic_ends_the_guest(vm, tmp_path):
    machine = vm(*linux.options(tmp_path, "echo c >/proc/sysrq-trigger\n"), memory="256M")
    machine.expect("Kernel panic - not syncing: sysrq triggered crash", BOOT_S)
    assert machine.wait_exit(BOOT_S) == 0


def test_what_is_typed_reaches_a_program(vm, tmp_path):
    script = "echo ready\nread -r line\necho got $line\nreboot -f\n"
    machine = vm(*linux.options(tmp_path, script), memory="256M")
    machine.expect(r"ready\r?\n", BOOT_S)
    machine.type("a line\n")
    machine.expect(r"got a line\r?\n", BOOT_S)
    assert machine.wait_exit(BOOT_S) == 0
