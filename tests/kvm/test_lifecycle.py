"""What a guest's reset, shutdown, panic and crash lead to: run states and exit codes."""

import os
import pty
import signal
import termios

import pytest
from harness import guests, lives, run_cli, wait_until

BANNER = "type help"
PANIC = ("-device", "pvpanic")
RESETS = {
    "i8042": guests.out8(0x64, 0xFE),
    "port92": guests.out8(0x92, 0x01),
    # lidt 0x7c07 (limit 0), int $3: no handler for any fault is left
    "triple-fault": b"\x0f\x01\x1e\x20\x7c\xcd\x03",
}


@pytest.mark.parametrize("command", ["reset", "triplefault"])
def test_guest_reset_boots_again(any_vm, command):
    machine = any_vm(smp=2)
    for number in range(3):
        machine.expect(BANNER)
        machine.expect("guest> ")
        if number < 2:
            machine.live()
        machine.type(f"{command}\n")
    machine.expect(BANNER)
    machine.expect("guest> ")
    assert machine.shell("cpus").startswith("cpus 2\n")
    assert machine.status == "running"


@pytest.mark.parametrize("way", ["i8042", "port92"])
def test_reset_from_real_mode(any_vm, tmp_path, way):
    """The guest resets at any moment of what it lives through."""
    code = guests.print_text("up\n") + RESETS[way] + guests.HALT
    machine = any_vm("-kernel", guests.flat(tmp_path, code))
    for _ in range(2):
        machine.expect("up\n")
        machine.live()
    machine.expect("up\n")
    machine.expect("up\n")
    assert machine.status == "running"


@pytest.mark.parametrize("command", ["reset", "triplefault"])
def test_no_reboot_ends_instead(any_vm, command):
    machine = any_vm("-no-reboot")
    machine.expect("guest> ")
    machine.live()
    machine.type(f"{command}\n")
    assert machine.wait_exit() == 0
    assert machine.serial.count(BANNER.encode()) == 1


def test_reset_loads_the_kernel_again(any_vm):
    machine = any_vm()
    machine.expect("guest> ")
    code = machine.hmp("xp /64xb 0x100000")
    machine.live()
    assert machine.hmp("xp /64xb 0x100000") == code
    assert machine.shell("echo x") == "x\n"
    machine.type("reset\n")
    machine.expect("guest> ")
    assert machine.hmp("xp /64xb 0x100000") == code
    assert int(machine.shell("uptime").split()[1]) < 30_000


def test_system_reset_while_running_and_paused(any_vm):
    machine = any_vm()
    machine.expect("guest> ")
    machine.live()
    assert machine.hmp("system_reset") == ""
    machine.expect(BANNER)
    machine.expect("guest> ")
    machine.hmp("stop")
    machine.hmp("system_reset")
    machine.live()
    assert machine.status == "paused"
    seen = len(machine.serial)
    machine.hmp("cont")
    machine.expect(BANNER)
    assert BANNER.encode() not in machine.serial[:seen][machine.seen :]


def test_poweroff_ends_with_0(any_vm):
    machine = any_vm()
    machine.expect("guest> ")
    machine.live()
    machine.type("poweroff\n")
    assert machine.wait_exit() == 0
    assert machine.stderr() == ""


@pytest.mark.parametrize("option", [["-no-shutdown"], ["-action", "shutdown=pause"]])
def test_no_shutdown_pauses(any_vm, option):
    machine = any_vm(*option, append="ticker passes=1 period=10")
    machine.expect("ticker PASS")
    machine.wait_status("paused (shutdown)")
    machine.live()
    assert machine.status == "paused (shutdown)"
    assert "Resetting the Virtual Machine is required" in machine.hmp("cont")
    machine.hmp("system_reset")
    machine.hmp("cont")
    machine.expect("ticker PASS")
    machine.wait_status("paused (shutdown)")
    assert machine.serial.count(b"tick 1\r") == 2


@pytest.mark.parametrize(("action", "exit_code"), [(None, 0), ("shutdown", 0), ("exit-failure", 1)])
def test_panic_that_ends(any_vm, action, exit_code):
    machine = any_vm(*PANIC, *(["-action", f"panic={action}"] if action else []))
    machine.expect("guest> ")
    machine.live()
    machine.type("panic\n")
    assert machine.wait_exit() == exit_code


def test_panic_that_pauses(any_vm):
    machine = any_vm(*PANIC, "-action", "panic=pause")
    machine.expect("guest> ")
    machine.type("panic\n")
    machine.wait_status("paused (guest-panicked)")
    machine.live()
    assert machine.status == "paused (guest-panicked)"


def test_panic_that_is_ignored(vm, tmp_path):
    code = guests.out8(0x505, 1) + guests.print_text("still here\n") + guests.HALT
    machine = vm(*PANIC, "-action", "panic=none", "-kernel", guests.flat(tmp_path, code))
    machine.expect("still here")
    assert machine.status == "running"


def test_exception_in_the_guest_is_a_panic(any_vm):
    machine = any_vm(*PANIC, "-action", "panic=exit-failure")
    machine.expect("guest> ")
    machine.live()
    machine.type("fault\n")
    machine.expect("exception 14 ")
    assert machine.wait_exit() == 1


@pytest.mark.parametrize("code", [0, 1, 0x10, 0x7F])
def test_debug_exit_gives_the_exit_code(vm, code):
    machine = vm("-device", "isa-debug-exit,iobase=0xf4", append=f"exit={code}")
    assert machine.wait_exit() == code << 1 | 1


def test_guest_s_verdict(any_vm):
    machine = any_vm("-device", "isa-debug-exit,iobase=0xf4")
    machine.expect("guest> ")
    machine.live()
    machine.type("exit 5\n")
    assert machine.wait_exit() == 5 << 1 | 1


def test_without_debug_exit_the_port_is_empty(vm):
    machine = vm(append="exit=3")
    assert machine.wait_exit() == 0


def test_internal_error_pauses(any_vm, tmp_path):
    code = guests.print_text("off\n") + guests.TO_UNMAPPED
    machine = any_vm("-kernel", guests.flat(tmp_path, code))
    machine.expect("off\n")
    machine.wait_status("paused (internal-error)")
    machine.live()
    assert machine.status == "paused (internal-error)"
    assert machine.hmp("cont") == "Error: Resetting the Virtual Machine is required\n"
    assert "KVM internal error, suberror 1 (emulation failure)" in machine.stderr()
    assert "CS =a000" in machine.hmp("info registers")
    machine.hmp("system_reset")
    machine.hmp("cont")
    machine.expect("off\n")
    machine.wait_status("paused (internal-error)")


def test_internal_error_that_ends(vm, tmp_path):
    machine = vm(
        *("-action", "internal-error=exit-failure"),
        *("-kernel", guests.flat(tmp_path, guests.TO_UNMAPPED)),
    )
    assert machine.wait_exit() == 1
    assert "vCPU 0: KVM internal error" in machine.stderr()
    assert "Traceback" not in machine.stderr()


def test_internal_error_of_one_of_two_vcpus_stops_both(any_vm, tmp_path):
    machine = any_vm("-kernel", guests.flat(tmp_path, guests.TO_UNMAPPED), smp=2)
    machine.wait_status("paused (internal-error)")
    machine.live()
    assert machine.status == "paused (internal-error)"
    assert machine.threads().count("vcpu-1") == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signals_end_it_in_order(any_vm, number):
    machine = any_vm(append="counter")
    machine.expect("counter ready")
    machine.live()
    machine.kill(number)
    assert machine.wait_exit() == 128 + number
    assert machine.stderr() == ""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signals_while_it_waits_for_a_client(vm, tmp_path, number):
    """Terminal, socket and name are given back before the main loop runs, too."""
    master, slave = pty.openpty()
    try:
        before = termios.tcgetattr(slave)
        machine = vm(
            *("-chardev", "stdio,id=tty", "-device", "isa-debugcon,chardev=tty"),
            *("-serial", "unix:late.sock,server=on,wait=on", "-name", "early"),
            serial=False,
            monitor=False,
            stdin=slave,
            XDG_RUNTIME_DIR=str(tmp_path),
        )
        wait_until(lambda: "waiting for a client" in machine.stderr(), "the wait")
        assert termios.tcgetattr(slave) != before
        machine.kill(number)
        assert machine.wait_exit() == 128 + number
        assert termios.tcgetattr(slave) == before
        assert "Traceback" not in machine.stderr()
        assert not (machine.folder / "late.sock").exists()
        assert not (tmp_path / "pyvmm" / "early").exists()
    finally:
        os.close(master)
        os.close(slave)


def test_quit(any_vm):
    machine = any_vm(append="piospin", smp=2)
    machine.expect("piospin 4096")
    machine.live()
    machine.hmp_send("quit")
    assert machine.wait_exit() == 0


def test_paused_at_start(any_vm):
    machine = any_vm("-S", append="ticker passes=2 period=10")
    machine.live()
    assert machine.status == "paused (prelaunch)"
    assert machine.serial == b""
    assert machine.hmp("cont") == ""
    machine.expect("ticker PASS")
    assert machine.wait_exit() == 0
    assert machine.serial.count(b"tick 1\r") == 1


def test_stop_and_cont(any_vm):
    machine = any_vm(append="counter", smp=2)
    machine.expect("counter ready")
    for number in range(50):
        assert machine.hmp("stop") == ""
        assert machine.status == "paused"
        count = machine.hmp("xp /gx 0x200000")
        if number % 25 == 0:
            machine.live()
            assert machine.status == "paused"
        assert machine.hmp("xp /gx 0x200000") == count
        assert machine.hmp("cont") == ""
        wait_until(lambda: machine.hmp("xp /gx 0x200000") > count, "a higher count")  # noqa: B023
    assert machine.serial.count(b"counter ready") == 1


@lives.LONG_STILL
def test_guest_learns_that_it_stood_still(any_vm, tmp_path):
    """PVCLOCK_GUEST_STOPPED, by which a guest's watchdogs forgive the time that they missed."""
    machine = any_vm("-kernel", guests.flat(tmp_path, guests.KVMCLOCK), smp=2)
    machine.expect("clock\n")
    machine.hmp("info registers")  # interrupts the vCPU, but does not stop it
    assert not guests.stopped_flag(machine)
    machine.live()
    wait_until(lambda: guests.stopped_flag(machine), "the flag")


def test_second_cpu_that_was_never_started(any_vm):
    # It waits for its start-up message for ever.
    machine = any_vm("-kernel", guests.image("real-pio.bin"), smp=2)
    machine.expect("real-pio 0+1")
    machine.live()
    machine.seen = len(machine.serial)
    machine.expect(r"real-pio \d+")
    assert "CPU#1" in machine.hmp("info registers -a")


def test_powerdown_reaches_the_guest(any_vm):
    # Nobody there listens for the button; it must not do harm.
    machine = any_vm()
    machine.expect("guest> ")
    machine.live()
    assert machine.hmp("system_powerdown") == ""
    assert machine.shell("echo on") == "on\n"


def test_end_of_the_guest_with_the_console_closed():
    done = run_cli("run", "-m", "16M", "-nodefaults", "-append", "ticker passes=1 period=1")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
