"""The human monitor over a real, running guest."""

import re

import pytest
from harness import guests, lives, wait_until


def start_counting(vm):
    machine = vm(append="counter", smp=2)
    machine.expect("counter ready")
    return machine


@pytest.fixture
def counting(vm):
    return start_counting(vm)


@pytest.fixture
def any_counting(any_vm):
    return start_counting(any_vm)


def test_registers_of_a_running_guest(any_counting):
    counting = any_counting
    counting.live()

    def rip():
        shown = counting.hmp("info registers")
        assert shown.splitlines()[1] == "CPU#0"
        assert "CPL=3" in shown
        assert re.search(r"^CS =\w{4} 0{16} ffffffff \w{8} DPL=3 CS64", shown, re.M)
        return re.search(r"^RIP=(\w{16})", shown, re.M)[1]

    assert int(rip(), 16) in range(0x100000, 0x200000)


def test_registers_of_all_cpus(counting):
    shown = counting.hmp("info registers -a")
    assert re.findall(r"^CPU#(\d)", shown, re.M) == ["0", "1"]
    assert re.findall(r"HLT=(\d)", shown) == ["0", "1"]


def test_registers_in_real_mode(any_vm):
    machine = any_vm("-kernel", guests.image("real-ticker.bin"))
    machine.expect("real-ticker 00000001")
    machine.live()
    machine.hmp("stop")
    shown = machine.hmp("info registers")
    # The others change while it prints.
    assert "EBX=11111111 " in shown
    assert "EDI=55555555 " in shown
    for name, value in [("ES", "2345"), ("FS", "3456"), ("GS", "4567")]:
        assert f"{name} ={value} 000{value}0 0000ffff" in shown


@lives.CONNECTED
def test_current_cpu(any_counting):
    counting = any_counting
    assert counting.hmp("info cpus").startswith("* CPU #0: thread_id=")
    assert counting.hmp("cpu 1") == ""
    counting.live()
    assert "* CPU #1:" in counting.hmp("info cpus")
    assert counting.hmp("info registers").splitlines()[1] == "CPU#1"


def test_virtual_memory_is_translated(any_counting):
    """The guest maps 1:1, and nothing behind its RAM."""
    before = any_counting.hmp("xp /4xw 0x100000")
    any_counting.live()
    assert any_counting.hmp("xp /4xw 0x100000") == before
    assert any_counting.hmp("x /4xw 0x100000").split(":")[1] == before.split(":")[1]
    assert "Cannot access memory" in any_counting.hmp("x /xw 0x7000deadbee8")


def test_ports(any_vm, tmp_path):
    machine = any_vm("-kernel", guests.flat(tmp_path, guests.SPIN))
    assert machine.hmp("o /b 0x3ff 0x5a") == ""
    machine.live()
    assert machine.hmp("i /b 0x3ff") == "portb[0x03ff] = 0x5a\n"
    # Nobody there: all ones.
    assert machine.hmp("i /b 0x1234") == "portb[0x1234] = 0xff\n"
    machine.hmp("o /b 0x3f8 0x41")
    machine.expect("A")


def test_port_of_the_reset_line(vm):
    machine = vm()
    machine.expect("guest> ")
    machine.hmp("o /b 0x64 0xfe")
    machine.expect("type help")


def test_registers_in_expressions(any_vm, tmp_path):
    # mov $0x1234, %ax; jmp .
    machine = any_vm("-kernel", guests.flat(tmp_path, b"\xb8\x34\x12" + guests.SPIN))
    wait_until(lambda: machine.hmp("print/x $rax & 0xffff") == "0x1234\n", "the instruction")
    machine.live()
    assert machine.hmp("print/x $rax & 0xffff") == "0x1234\n"


def test_what_there_is(any_counting):
    counting = any_counting
    before = [counting.hmp(f"info {what}") for what in ("mtree", "qtree", "chardev")]
    counting.live()
    assert [counting.hmp(f"info {what}") for what in ("mtree", "qtree", "chardev")] == before
    assert re.search("^serial: filename=.*unix:.*serial.sock", counting.hmp("info chardev"), re.M)
    tree = counting.hmp("info mtree")
    assert "0000000000000000-000000000009ffff (prio 0, ram): alias pc.ram" in tree
    assert "00000000000003f8-00000000000003ff" in tree
    assert 'dev: serial, id "' in counting.hmp("info qtree")
    assert "kvm support: enabled" in counting.hmp("info kvm")


WRONG = """frobnicate|info frobnicate|x|x /zz 0|xp /999999999xb 0|xp 18446744073709551616
print 1/0|print ((((|i /g 0x3f8|cpu -1|cpu 2|migrate|migrate_incoming file:x
migrate_set_parameter mode frob|migrate_set_parameter cpr-exec-command "unfinished
o|xp /xb 0x100000000000000000|help frobnicate"""


@pytest.mark.parametrize("command", re.split(r"[|\n]", WRONG))
def test_wrong_command_says_why(counting, command):
    assert counting.hmp(command).strip()
    assert counting.status == "running"
    assert counting.stderr() == ""


@pytest.mark.parametrize(
    "line", [b"\0\1\2", b"\xff\xfe", b"", b"   ", b"x" * 4000, b"print \xf0\x9f"]
)
def test_any_bytes_are_a_line(counting, line):
    counting.hmp_send(line)
    counting.hmp_reply()
    assert counting.status == "running"
    assert counting.stderr() == ""


def test_too_long_a_line(counting):
    assert "at most 4096 bytes" in counting.hmp("x" * 100_000)
    assert counting.status == "running"
