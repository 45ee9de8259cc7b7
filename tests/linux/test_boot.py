"""Unmodified Debian kernels from their first instruction to their end, by both boot protocols."""

import hashlib
import os
import re

from harness import guests, linux

#: From the start to the end of the guest, emulated machine included.
BOOT_S = 240
M = 1 << 20
#: Without the NUL at the end.
CMDLINE_SIZE = 2047


def test_vmlinux_by_pvh(vm, tmp_path):
    script = """
echo init: $(uname -sr) $(nproc)
read -r line
echo got $line
reboot -f
"""
    machine = vm(
        *linux.options(tmp_path, script, f"reboot=kbd {linux.NO_AGP}", kernel=linux.OTHER_KERNEL),
        memory="256M",
    )
    found = machine.expect(r"init: Linux (\d+)\.\d+\S* (\d+)\r?\n", BOOT_S)
    assert (int(found[1]) >= 6, int(found[2])) == (True, 1)
    machine.type("a line\n")
    machine.expect(r"got a line\r?\n", BOOT_S)
    assert machine.wait_exit(BOOT_S) == 0
    assert b"reboot: Restarting system" in machine.serial


def test_bzimage_unpacks_itself_beside_all_that_it_is_given(vm, tmp_path):
    """It chooses its place by chance, where neither memory map nor command line nor initial RAM
    disk forbid it."""
    script = """
echo up: $(uname -r)
echo cmdline: $(md5sum </proc/cmdline)
echo file: $(md5sum <big)
echo memory: $(grep MemTotal /proc/meminfo)
grep 'System RAM' /proc/iomem | sed 's/^/ram: /'
reboot -f
"""
    big = os.urandom(M) * 64
    padding = "x" * (CMDLINE_SIZE - len(linux.CMDLINE) - 1)
    options = linux.options(tmp_path, script, padding, files={"big": big})
    machine = vm(*options, "-machine", "kernel-unpack=guest", memory="5G")
    machine.expect(r"up: \S+-cloud-amd64", BOOT_S)
    wanted = hashlib.md5(f"{linux.CMDLINE} {padding}\n".encode()).hexdigest()
    machine.expect(f"cmdline: {wanted}", BOOT_S)
    machine.expect(f"file: {hashlib.md5(big).hexdigest()}", BOOT_S)
    total = int(machine.expect(r"memory: MemTotal: (\d+) kB", BOOT_S)[1])
    assert total > 4.7 * M  # less what the kernel has taken for itself
    assert machine.wait_exit(BOOT_S) == 0
    ranges = re.findall(rb"ram: (\w+)-(\w+) ", machine.serial)
    assert (b"100000000", b"17fffffff") in ranges[-1:]
    assert all(int(end, 16) < 0xC000_0000 for _, end in ranges[:-1])


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


def test_request_of_the_pic_from_before_it_was_let_through(vm):
    """By the local APIC: KVM looks for one when it comes, and not when LINT0 is opened."""
    machine = vm("-kernel", guests.image("real-lint0.bin"))
    for number in (1, 2, 3):
        machine.expect(rf"real-lint0 {number:08x}\r\n", BOOT_S)


def test_boots_with_neither_acpi_nor_mp_table(vm, tmp_path):
    """Debian's cloud kernel reads no MP table: the PIT is its only clock, by way of the PIC."""
    script = "echo timer: $(grep timer /proc/interrupts)\nread -r line\nreboot -f\n"
    options = linux.options(tmp_path, script)
    again = ("-action", "reboot=reset")
    machine = vm(*options, *again, "-machine", "acpi=off", memory="256M")
    for _ in range(2):
        machine.expect(r"timer: 0: +\d+ +XT-PIC", BOOT_S)
        machine.type("go\n")
        machine.expect("reboot: Restarting system", BOOT_S)
    machine.expect(r"timer: 0: +\d+ +XT-PIC", BOOT_S)
