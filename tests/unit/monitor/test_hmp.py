"""What the human monitor prints, byte for byte."""

from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pyvmm import __version__
from pyvmm.chardev.config import parse_chardev
from pyvmm.core.runstate import INTERNAL_ERROR, POSTMIGRATE
from pyvmm.monitor.hmp.commands import COMMANDS, INFO
from pyvmm.monitor.hmp.interpreter import Interpreter
from pyvmm.testing.fake_machine import segment


def test_status(run, machine):
    assert run("info status") == "VM status: running\n"
    assert run("stop") == ""
    assert run("info status") == "VM status: paused\n"
    machine.runstate.set(POSTMIGRATE)
    assert run("info status") == "VM status: paused (postmigrate)\n"
    assert run("cont") == ""
    assert run("info status") == "VM status: running\n"
    assert machine.acts == ["stop", "cont"]


def test_short_names(run, machine):
    assert run("s") == run("c") == ""
    assert machine.acts == ["stop", "cont"]


def test_cont_is_refused_with_the_reason(run, machine):
    machine.runstate.set(INTERNAL_ERROR)
    assert run("c") == "Error: Resetting the Virtual Machine is required\n"


def test_reset_and_power_button(run, machine):
    assert run("system_reset") == run("system_powerdown") == ""
    assert machine.acts == ["reset host-qmp-system-reset", "powerdown"]


def test_quit_shows_no_prompt_any_more(context, machine):
    texts = []
    Interpreter(context).execute("q", texts.append)
    assert machine.acts == ["quit 0 host-qmp-quit"]
    assert texts == []


def test_cpus_and_the_current_one(run):
    assert run("info cpus") == (
        "* CPU #0: thread_id=31290 model=host\n  CPU #1: thread_id=31291 model=host\n"
    )
    assert run("cpu 1") == ""
    assert run("info cpus") == (
        "  CPU #0: thread_id=31290 model=host\n* CPU #1: thread_id=31291 model=host\n"
    )
    assert run("cpu 2") == "Error: invalid CPU index\n"
    assert run("cpu -1") == "Error: invalid CPU index\n"


def test_small_queries(run, machine):
    assert run("info version") == f"{__version__}\n"
    assert run("info kvm") == "kvm support: enabled\n"
    assert run("info name") == "\n"
    machine.config.name = "vm1"
    assert run("info name") == "vm1\n"


def test_chardevs(run, machine):
    machine.chardevs.create(parse_chardev("null,id=serial0"))
    assert run("info chardev") == "serial0: filename=null\n"


def test_memdev(run):
    assert run("info memdev").splitlines()[:3] == [
        "memory backend: ram0",
        "  size:  1048576",
        "  merge: true",
    ]
    assert "  share: true\n" in run("info memdev")
    assert "  collapse: off\n" in run("info memdev")


def test_huge_pages(run, machine):
    told = {"state": "waiting", "huge": 64 << 20, "longest-ms": 0.7, "reason": "none is free"}
    machine.upkeep = SimpleNamespace(describe=lambda backend: told)
    line = "  collapse: waiting; 64 MiB in huge pages; 0.7 ms for one at most; none is free\n"
    assert line in run("info memdev")


def test_trees(run):
    tree = run("info mtree")
    assert tree.startswith(
        "address-space: I/O\n"
        "  0000000000000000-000000000000ffff (prio 0, i/o): io\n"
        "    00000000000003f8-00000000000003ff (prio 0, i/o): serial\n"
        "\n"
        "address-space: memory\n"
        "  0000000000000000-ffffffffffffffff (prio 0, i/o): system\n"
        "    0000000000000000-00000000000fffff (prio 0, ram):"
        " alias ram0 @ram0 0000000000000000-00000000000fffff\n"
    )
    assert tree.endswith("  0000000000000000-00000000000fffff (prio 0, ram): ram0\n\n")
    assert run("info qtree") == (
        "bus: main-system-bus\n"
        "  type System\n"
        '  dev: isa-serial, id ""\n'
        '    chardev = "serial0"\n'
        "    iobase = 1016 (0x3f8)\n"
        "    wakeup = false\n"
    )


def test_memory_dumps(run, machine):
    machine.memory.write(0x1000, b"Ab\n\xff'\\" + bytes(10) + bytes(range(16)))
    assert run("xp /4wx 0x1000") == ("00001000: 0xff0a6241 0x00005c27 0x00000000 0x00000000\n")
    assert run("x /2gx 0x1000") == ("0000000000001000: 0x00005c27ff0a6241 0x0000000000000000\n")
    assert run("xp /10bx 0x1010") == (
        "00001010: 0x00 0x01 0x02 0x03 0x04 0x05 0x06 0x07\n00001018: 0x08 0x09\n"
    )
    assert run("xp /6c 0x1000") == ("00001000: 'A' 'b' '\\n' '\\xff' '\\'' '\\\\'\n")
    assert run("xp /2hd 0x1002") == "00001002:  -246 23591\n"
    assert run("xp/1bo 0x1000") == "00001000: 0101\n"


def test_the_format_of_dumps_is_remembered(run):
    assert run("xp 0") == "00000000: 0x00000000\n"
    run("xp /1bd 0")
    assert run("xp 0") == "00000000:   0\n"


def test_virtual_addresses_are_the_current_cpus(run, machine):
    machine.memory.write(0x5FFE, b"\x01\x02")
    machine.memory.write(0x9000, b"\x03\x04")
    machine.cpus[1].vcpu.pages = {0xFFFFFFFF80000000: 0x5000, 0xFFFFFFFF80001000: 0x9000}
    run("cpu 1")
    assert run("x /1wx 0xffffffff80000ffe") == "ffffffff80000ffe: 0x04030201\n"
    assert run("x /1wx 0x1000") == "Error: Cannot access memory\n"
    assert run("x /2wx 0xffffffff80001ffc") == (
        "ffffffff80001ffc: 0x00000000\nCannot access memory\n"
    )


def test_dumps_are_bounded(run):
    assert run("xp /4wx 0x100000") == "Error: Cannot access memory\n"
    assert run("xp /1wx -4") == "Error: Cannot access memory\n"
    assert run("xp /999999999gx 0").startswith("Error: 7999999992 bytes at once are not possible")
    assert run("xp /0wx 0") == ""


def test_no_disassembly(run):
    assert run("x /2i 0") == (
        "Error: Disassembly is not available: pyvmm contains no disassembler\n"
    )


def test_print(run, machine):
    machine.cpus[0].vcpu.regs.rax = 0xFFFFFFFF12345678
    machine.cpus[0].vcpu.sregs.fs.base = 0x5000
    assert run("print 1+2") == "3\n"
    assert run("p/x 0x10+1") == "0x11\n"
    assert run("p /x $rax") == "0xffffffff12345678\n"
    assert run("p /x $eax") == "0x12345678\n"
    assert run("p $fs.base") == "20480\n"
    assert run("p /x $cs") == "0x8\n"
    assert run("p /c 'A'") == "'A'\n"
    assert run("p /o 8") == "010\n"
    assert run("p /u 0-1") == "18446744073709551615\n"
    assert run("p $xsave") == ('unknown register\nTry "help p" for more information\n')
    assert run("p") == 'unexpected end of expression\nTry "help p" for more information\n'


def test_ports(run, machine):
    machine.port_recorder.values[5] = 0x60
    assert run("i /b 0x3fd") == "portb[0x03fd] = 0x60\n"
    assert run("i /h 0x80") == "portw[0x0080] = 0xffff\n"
    assert run("o /b 0x3f8 0x141") == ""
    assert machine.port_recorder.writes == [(0, 1, 0x41)]
    assert run("i /b 0x3fc .3") == "portb[0x03fd] = 0x60\n"
    assert machine.port_recorder.writes[-1] == (4, 1, 3)
    assert run("o /w 0xffff 1") == "Error: No port access of 4 bytes at 0xffff is possible\n"


def test_ports_are_accessed_in_the_size_of_the_last_dump(run, machine):
    machine.port_recorder.values = {0: 0x44, 1: 0x33, 2: 0x22, 3: 0x11}
    assert run("i 0x3f8") == "portl[0x03f8] = 0x11223344\n"
    run("xp /1hx 0")
    assert run("i 0x3f8") == "portw[0x03f8] = 0x3344\n"
    run("o /b 0x3f8 1")
    assert run("xp /1x 0").endswith(": 0x00\n")
    run("xp /1gx 0")
    assert run("i 0x3f8") == "portb[0x03f8] = 0x44\n"


def test_the_index_of_a_port_stands_behind_a_dot(run, machine):
    assert "extraneous" in run("i /b 0x3f8 1")
    assert machine.port_recorder.writes == []
    run("i /b 0x3f8 . 1+1")
    assert machine.port_recorder.writes == [(0, 1, 2)]
    assert "unexpected end" in run("i /b 0x3f8 .")


def test_ramblock(run):
    head, line = run("info ramblock").splitlines()
    assert head == (
        "              Block Name    PSize              Offset               Used"
        "              Total                HVA  RO"
    )
    name, psize, unit, offset, used, total, hva, access = line.split()
    assert (name, psize, unit, access) == ("ram0", "4", "KiB", "rw")
    assert (int(offset, 0), int(used, 0), int(total, 0)) == (0, 1 << 20, 1 << 20)
    assert f"{int(hva, 0):x}-" in Path("/proc/self/maps").read_text()
    assert len(line) == len(head)


def test_registers_in_32_bit_code(run, machine):
    vcpu = machine.cpus[0].vcpu
    vcpu.regs.rip, vcpu.regs.rflags, vcpu.mp_state = 0xF6197, 0x246, 3
    lines = run("info registers").splitlines()
    assert lines[:8] == [
        "",
        "CPU#0",
        "EAX=00000000 EBX=00000000 ECX=00000000 EDX=00000000",
        "ESI=00000000 EDI=00000000 EBP=00000000 ESP=00000000",
        "EIP=000f6197 EFL=00000246 [---Z-P-] CPL=0 II=0 A20=1 SMM=0 HLT=1",
        "ES =0010 00000000 ffffffff 00c09300 DPL=0 DS   [-WA]",
        "CS =0008 00000000 ffffffff 00c09b00 DPL=0 CS32 [-RA]",
        "SS =0010 00000000 ffffffff 00c09300 DPL=0 DS   [-WA]",
    ]
    assert "LDT=0000 00000000 0000ffff 00008200 DPL=0 LDT" in lines
    assert "TR =0000 00000000 0000ffff 00008b00 DPL=0 TSS32-busy" in lines
    assert "GDT=     00001000 00000027" in lines
    assert "CR0=00000011 CR2=00000000 CR3=00000000 CR4=00000000" in lines
    assert "DR6=00000000ffff0ff0 DR7=0000000000000400" in lines
    assert "EFER=0000000000000000" in lines
    assert "FCW=037f FSW=0000 [ST=0] FTW=00 MXCSR=00001f80" in lines
    assert "FPR6=0000000000000000 0000 FPR7=0000000000000000 0000" in lines
    assert lines[-1].startswith("XMM06=")


def test_registers_in_64_bit_code(run, machine):
    vcpu = machine.cpus[1].vcpu
    vcpu.sregs.efer = 0x500
    vcpu.sregs.cs = segment(11, l=1, g=1, dpl=3, selector=0x33)
    vcpu.sregs.ss = segment(3, dpl=3, selector=0x2B)
    vcpu.regs.r8 = 0x1122334455667788
    vcpu.xsave[160 + 15 * 16 : 176 + 15 * 16] = bytes(range(16))
    lines = run("info registers 1").splitlines()
    assert lines[1] == "CPU#1"
    assert (
        lines[4] == "R8 =1122334455667788 R9 =" + "0" * 16 + " R10=" + "0" * 16 + " R11=" + "0" * 16
    )
    assert lines[6].startswith("RIP=0000000000000000 RFL=00000002 [-------] CPL=3 ")
    assert lines[8] == "CS =0033 0000000000000000 ffffffff 00a0fb00 DPL=3 CS64 [-RA]"
    assert lines[-1].endswith("XMM15=0f0e0d0c0b0a0908 0706050403020100")


def test_registers_of_all_or_of_nobody(run):
    text = run("info registers -a")
    assert text.count("CPU#") == 2
    assert run("info registers 9") == "CPU#9 not available\n"


def test_migrate_and_wait(context):
    texts = []
    Interpreter(context).execute("migrate file:a", texts.append)
    assert context.migration.started == [("file:a", False)]
    assert texts == []
    context.migration.finish(None)
    context.migration.finish("twice")
    assert texts == [""]


def test_migrate_and_wait_tells_the_error(context):
    texts = []
    Interpreter(context).execute("migrate file:a", texts.append)
    context.migration.finish("execve /no/such failed: No such file or directory")
    assert texts == ["Error: execve /no/such failed: No such file or directory\n"]


def test_migrate_detached(run, context):
    assert run("migrate -d file:a") == ""
    assert context.migration.started == [("file:a", True)]


@pytest.mark.parametrize("line", ["migrate file:a", "migrate -d file:a"])
def test_migrate_refused(run, context, line):
    context.migration.refuse = "cpr-exec mode requires setting cpr-exec-command"
    assert run(line) == "Error: cpr-exec mode requires setting cpr-exec-command\n"


def test_migrate_settings(run, context):
    assert run("migrate_set_parameter mode cpr-exec") == ""
    assert run("migrate_set_parameter cpr-exec-command pyvmm run  -incoming file:a") == ""
    shown = run("info migrate_parameters").splitlines()
    assert shown[:2] == ["announce-initial: 50 ms", "announce-max: 550 ms"]
    assert "tls-creds: ''" in shown
    assert "cpu-throttle-tailslow: off" in shown
    assert "mode: cpr-exec" in shown
    assert "cpr-exec-command: pyvmm run -incoming file:a" in shown
    assert run("migrate_set_parameter mode foo") == (
        "Error: Parameter 'mode' does not accept value 'foo'\n"
    )
    assert run("migrate_set_parameter bogus 1") == "Error: invalid parameter value: bogus\n"
    assert run("migrate_set_capability events on") == ""
    assert run("migrate_set_capability bogus on") == "Error: invalid parameter value: bogus\n"
    assert run("info migrate_capabilities").splitlines()[:4] == [
        "xbzrle: off",
        "rdma-pin-all: off",
        "auto-converge: off",
        "events: on",
    ]
    assert run("migrate_cancel") == run("migrate_incoming file:a") == ""
    assert context.migration.acts == ["cancel", "incoming file:a"]


def test_info_migrate(run, context):
    assert run("info migrate") == ""
    context.migration.data = {"status": "completed"}
    assert run("info migrate") == "Status: \t\tcompleted\n"
    context.migration.data = {
        "status": "failed",
        "error-desc": "execvp /x failed",
        "total-time": 22,
        "setup-time": 3,
        "downtime": 21,
        "blocked-reasons": ["no"],
    }
    assert run("info migrate") == (
        "Outgoing migration blocked:\n  no\n"
        "Status: \t\tfailed (execvp /x failed)\n"
        "Time (ms): \t\ttotal=22, setup=3, down=21\n"
    )
    assert "Globals:\n  store-global-state: on\n" in run("info migrate -a")


def test_errors(run):
    assert run("bogus") == "unknown command: 'bogus'\n"
    assert run("info bogus") == "unknown command: 'info bogus'\n"
    assert run("migrate") == 'migrate: string expected\nTry "help migrate" for more information\n'
    assert run("info status now") == (
        "info status: extraneous characters at the end of line\n"
        'Try "help info status" for more information\n'
    )
    assert run("") == run("  ") == run("# a remark") == ""


def test_help(run):
    every = run("help")
    assert len(every.splitlines()) == len(set(COMMANDS.values()))
    assert run("?") == every
    assert run("help migrate").startswith("migrate [-d] [-r] uri -- ")
    assert run("help c") == run("help cont") == "cont|c -- let the paused guest run\n"
    assert run("info") == run("help info")
    assert len(run("info").splitlines()) == len(INFO)
    assert run("help info status").startswith("info status -- ")
    assert run("help bogus") == "unknown command: 'bogus'\n"
    assert run("help info bogus") == "unknown command: 'info bogus'\n"


def test_a_bug_in_a_command_stays_in_it(run, machine, capsys):
    machine.stop = lambda: 1 / 0
    assert run("stop").startswith("Error: internal error (ZeroDivisionError)")
    assert "ZeroDivisionError" in capsys.readouterr().err
    assert run("info status") == "VM status: running\n"


def test_human_monitor_command(context):
    def run(line, **options):
        return context.execute("human-monitor-command", {"command-line": line, **options})

    assert run("info cpus", **{"cpu-index": 1}).endswith(
        "\r\n* CPU #1: thread_id=31291 model=host\r\n"
    )
    assert run("cpu 1") == ""
    assert context.cpu_index == 0
    assert run("migrate file:a") == ""
    assert context.migration.started == [("file:a", True)]
    assert run("q") == ""


WORDS = st.sampled_from([*COMMANDS, *INFO, "info", "-d", "-a", "/4wx", "0x10", "$rax", "file:a"])


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.one_of(WORDS, st.text(max_size=10)), max_size=5))
def test_any_line_is_answered(context, words):
    texts = []
    line = " ".join(words)
    Interpreter(context, can_wait=False).execute(line, texts.append)
    assert len(texts) == 1
    assert "internal error" not in texts[0]
