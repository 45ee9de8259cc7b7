"""Every program of the built-in guest passes, on one vCPU and on two."""

import re
import subprocess

import pytest
from faults.tools import faulty
from harness import guests, lives, run_cli, wait_until

SMP = pytest.mark.parametrize("smp", [1, 2])


def lines(machine, prefix):
    text = machine.serial.decode().replace("\r", "")
    return [line for line in text.splitlines() if line.startswith(prefix)]


@SMP
@pytest.mark.parametrize(
    ("program", "ok"),
    [
        ("memhash mb=16 passes=3", "memhash pass 3 ok"),
        ("timers passes=2 period=200", r"timers ok 2 .*"),
        ("pingpong passes=2", "pingpong 1024"),
        ("piospin passes=1", "piospin 4096"),
        # The slowest CPU's rounds, which may be two at once: 4 is passed, not always shown.
        ("torture passes=4", r"torture ([4-9]|\d\d+) ok"),
        ("ticker passes=3 period=20", "tick 3"),
        ("ticker passes=3 period=20 irq=ioapic timer=pit", "tick 3"),
        ("halt passes=3 period=20 timer=pit", "halt 3"),
    ],
)
def test_program_passes(vm, program, ok, smp):
    machine = vm(append=f"{program} pyvmm.cpus={smp}", smp=smp)
    name = program.split()[0]
    machine.expect(f"program {name} on {smp} cpus\r\n")
    machine.expect(f"{ok}\r\n{name} PASS\r\n")
    assert machine.wait_exit() == 0
    assert machine.stderr() == ""


@SMP
def test_selftest_gives_its_verdict_as_exit_code(vm, smp):
    machine = vm(
        "-device", "isa-debug-exit", append="selftest mb=4 debugexit=0x10", memory="32M", smp=smp
    )
    assert machine.wait_exit() == 0x10 << 1 | 1
    assert lines(machine, "selftest") == ["selftest PASS"]


@SMP
def test_ticker_prints_each_tick_once_and_in_order(vm, smp):
    machine = vm(append="ticker passes=20 period=10", smp=smp)
    assert machine.wait_exit() == 0
    assert lines(machine, "tick ") == [f"tick {n}" for n in range(1, 21)]


@SMP
def test_counter_counts_in_shared_memory(vm, smp):
    machine = vm(append="counter", smp=smp)
    machine.expect("counter ready")

    def count():
        return int(machine.hmp("xp /gx 0x200000").split(":")[1], 0)

    first = count()
    wait_until(lambda: count() > first, "a higher count")


@SMP
def test_shell(any_vm, smp):
    machine = any_vm(smp=smp)
    machine.expect("guest> ")
    machine.live()
    assert "uptime - milliseconds" in machine.shell("help")
    assert machine.shell("echo one two") == "one two\n"
    assert machine.shell("cpus").startswith(f"cpus {smp}\n")
    first = int(machine.shell("counter").split()[1])
    machine.type("ticker on\n")
    machine.expect(r"counter \d+\r\n")
    machine.live()
    machine.type("ticker off\n")
    machine.expect("guest> ")
    assert int(machine.shell("counter").split()[1]) > first
    assert "unknown command: nonsense" in machine.shell("nonsense")
    machine.type("poweroff\n")
    assert machine.wait_exit() == 0


def test_shell_hashes_what_the_monitor_reads(any_vm):
    machine = any_vm()
    machine.expect("guest> ")
    shown = machine.hmp("xp /32xb 0x100000")
    machine.live()
    expected = 0xCBF29CE484222325
    for byte in re.findall(r"0x([0-9a-f]{2})\b", shown):
        expected = (expected ^ int(byte, 16)) * 0x100000001B3 % 2**64
    assert machine.shell("hash 0x100000 32") == f"hash 0x100000 0x20 = 0x{expected:x}\n"


def test_clock_is_the_host_s(any_vm):
    machine = any_vm()
    machine.expect("guest> ")
    machine.live()
    before = subprocess.run(["date", "-u", "+%F"], capture_output=True, text=True).stdout.strip()
    shown = machine.shell("clock").split()[1]
    after = subprocess.run(["date", "-u", "+%F"], capture_output=True, text=True).stdout.strip()
    assert before <= shown <= after


@pytest.mark.parametrize("name", guests.REAL)
def test_flat_image(vm, name):
    machine = vm("-kernel", guests.image(f"{name}.bin"))
    for number in (1, 2, 3):
        machine.expect(rf"{name} {number:08x}\r\n")
    assert b"FAIL" not in machine.serial


@SMP
def test_multiboot_kernel(vm, smp):
    machine = vm("-kernel", guests.image("guest-mb.elf"), append="memhash mb=4 passes=2", smp=smp)
    machine.expect(f"program memhash on {smp} cpus")
    machine.expect("memhash PASS")
    assert machine.wait_exit() == 0


def test_second_cpu_that_comes_late(vm):
    # As its thread does on a loaded host.
    late = "import time; arguments[0].index and time.sleep(0.3)"
    machine = vm(
        *("-kernel", guests.image("guest.elf")),
        append="memhash mb=4 passes=2",
        smp=2,
        program=faulty("pyvmm.machine.cpu:Cpu._enter", late),
    )
    machine.expect("program memhash on 2 cpus")
    assert machine.wait_exit() == 0


@pytest.mark.parametrize("kernel", ["guest.elf", "guest-mb.elf"])
def test_initrd_reaches_the_guest(vm, tmp_path, kernel):
    initrd = tmp_path / "initrd"
    initrd.write_bytes(bytes(range(256)) * 33)
    machine = vm("-kernel", guests.image(kernel), "-initrd", initrd, append="shell")
    machine.expect("guest> ")
    shown = machine.shell("modules")
    match = re.fullmatch(r"modules 1\nmodule 0 at (0x[0-9a-f]+) size 8448\n", shown)
    assert match, shown
    assert " 0x04 0x05 0x06 0x07" in machine.hmp(f"xp /8xb {match[1]}")


def test_append_reaches_the_guest(vm):
    machine = vm(append='shell key="a b" x=1,y=2')
    machine.expect("guest> ")
    assert machine.shell("cmdline").startswith('cmdline shell key="a b" x=1,y=2')


def test_memory_map_skips_the_hole_below_4g(vm):
    # Never touched, so none of it becomes the host's.
    machine = vm(memory="6G")
    machine.expect("guest> ")
    ranges = dict(re.findall(r"ram (0x[0-9a-f]+) size (0x[0-9a-f]+)", machine.shell("memory")))
    assert ranges["0x100000"] == hex(0xC0000000 - 0x100000)
    assert ranges["0x100000000"] == hex(3 << 30)
    assert machine.shell("hash 0x1bffff000 0x1000").startswith("hash 0x1bffff000 0x1000 = 0x")
    assert "is not RAM" in machine.shell("hash 0x1c0000000 1")


def test_another_rom_is_entered_at_the_reset_vector(vm, tmp_path):
    code = guests.print_text("other rom\n") + guests.HALT
    machine = vm("-bios", guests.rom(tmp_path, code))
    machine.expect("other rom\n")


def test_rom_with_nothing_to_boot_says_so(vm):
    machine = vm("-bios", guests.BUILD.parents[1] / "firmware" / "build" / "bios.bin")
    machine.expect("pyvmm firmware: nothing to boot")
    assert machine.status == "running"


@lives.CONNECTED
def test_debug_console_has_the_guest_s_output(any_vm, tmp_path):
    log = tmp_path / "debug.log"
    machine = any_vm("-debugcon", f"file:{log}", append="shell console=both")
    machine.expect("guest> ")
    assert machine.shell("echo before") == "before\n"
    machine.live()
    assert machine.shell("echo after") == "after\n"
    machine.type("poweroff\n")
    assert machine.wait_exit() == 0
    assert log.read_bytes() == bytes(machine.serial)


def test_second_serial_port(vm, tmp_path):
    log = tmp_path / "com2.log"
    code = guests.print_text("com2", 0x2F8) + guests.print_text("com1") + guests.HALT
    machine = vm("-serial", f"file:{log}", "-kernel", guests.flat(tmp_path, code))
    machine.expect("com1")
    assert log.read_text() == "com2"


def test_output_on_standard_output():
    done = run_cli(
        *("run", "-m", "32M", "-serial", "stdio", "-monitor", "none"),
        *("-append", "ticker passes=3 period=10"),
    )
    assert done.returncode == 0
    assert done.stderr == ""
    assert done.stdout.splitlines() == [
        "program ticker on 1 cpus", "tick 1", "tick 2", "tick 3", "ticker PASS"
    ]  # fmt: skip


def test_request_of_the_pic_that_nobody_takes(any_vm, tmp_path):
    """KVM is made to look for it again and again, and the guest, which is halted with interrupts
    off, does not notice."""
    code = b"\xfa"  # cli
    # PIC: edge, cascade, vector base 8, 8086 mode, line 0 only. PIT: 100 Hz.
    ports = [(0x20, 0x11), (0x21, 8), (0x21, 4), (0x21, 1), (0x21, 0xFE)]
    ports += [(0x43, 0x34), (0x40, 0x9C), (0x40, 0x2E)]
    for port, value in ports:
        code += guests.out8(port, value)
    code += guests.print_text("halted\n") + b"\xf4" + guests.print_text("woken\n") + guests.HALT
    looks = "import os; os.write(2, b'looks\\n')"
    machine = any_vm(
        *("-kernel", guests.flat(tmp_path, code)),
        program=faulty("pyvmm.machine.cpu:Cpu._look_for_interrupts", looks),
    )
    machine.expect("halted\n")
    wait_until(lambda: machine.stderr().count("looks") > 1, "KVM is made to look")
    machine.live()
    before = machine.stderr().count("looks")
    wait_until(lambda: machine.stderr().count("looks") > before, "and goes on to")
    machine.hmp("info status")
    assert b"woken" not in machine.serial
