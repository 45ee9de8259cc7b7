"""After the exec, until the guest runs: whatever goes wrong, the old image is back and goes on."""

import os
import select
import shutil
import signal
import socket
import stat
import sys
from pathlib import Path

import pytest
from faults.tools import (
    BACK,
    QMP,
    Qmp,
    armed,
    check_alive,
    check_ticking,
    faulty,
    once,
    options,
    replaced,
    update,
)
from harness import pyvmm as pyvmm_command
from harness import wait_until
from harness.lives import LAST

import pyvmm

#: Where the host may refuse what only a guest needs that runs through the exec.
SPARED = ["pyvmm.kvm.carrier:Control.make", "pyvmm.kvm.carrier:Carrier.start"]
#: Those of the plain way alone.
PLAIN = [
    "pyvmm.x86.vcpu_state:write",
    "pyvmm.x86.irqchip:load_pic",
    "pyvmm.x86.irqchip:load_ioapic",
    "pyvmm.x86.irqchip:load_pit",
    "pyvmm.x86.irqchip:load_clock",
    "pyvmm.devices.acpi_pm:AcpiPm.load",
    "pyvmm.wayback:close",
]
LOADED = [
    "pyvmm.devices.serial:Serial.load",
    "pyvmm.devices.rtc:Rtc.load",
    "pyvmm.devices.i8042:I8042.load",
    "pyvmm.devices.i8042:Port92.load",
    "pyvmm.devices.acpi_pm:AcpiPm.load",
]
STEPS = [
    "pyvmm.cli:serve",
    "pyvmm.machine.options:parse",
    "pyvmm.core.eventloop:EventLoop.__init__",
    "pyvmm.cpr.handover:Handover.__init__",
    "pyvmm.machine.builder:build",
    "pyvmm.machine.builder:open_system",
    "pyvmm.machine.builder:make_memory",
    "pyvmm.memory.backend:RamBackend.__init__",
    "pyvmm.x86.platform:Platform.__init__",
    "pyvmm.kvm.vm:Vm.set_user_memory_region",
    "pyvmm.kvm.vm:Vm.create_vcpu",
    "pyvmm.chardev.factory:ChardevSet.create",
    "pyvmm.chardev.factory:ChardevSet.claim",
    "pyvmm.chardev.factory:ChardevSet.load_state",
    "pyvmm.machine.builder:add_devices",
    "pyvmm.cli:handle_signals",
    "pyvmm.migration.manager:Migration.__init__",
    "pyvmm.machine.machine:Machine.start",
    "pyvmm.machine.cpu:Cpu.start",
    "pyvmm.migration.manager:Migration.begin",
    "pyvmm.migration.channel:MemoryChannel.read",
    "pyvmm.migration.savevm:read",
    "pyvmm.migration.savevm:apply",
    "pyvmm.kvm.carrier:Control.adopt",
    *LOADED,
    "pyvmm.machine.machine:Machine.await_cpus",
    "pyvmm.kvm.carrier:Takeover.take",
]


def held(machine):
    """Descriptors and number of threads; the first thread's name tells how it was executed."""
    fds, threads = machine.footprint()
    return fds, len(threads)


def check_back(machine, command, why):
    """The update with ``command`` comes back, with ``why``, and the guest runs on."""
    assert update(machine, command) == f"Error: {why} {BACK}\n"
    assert f"{why} {BACK}" in machine.hmp("info migrate")
    assert machine.cmdline[1:3] != command[1:3]
    check_alive(machine)


@pytest.mark.parametrize("step", STEPS)
def test_exception(ticker, step):
    machine = ticker()
    check_back(
        machine, replaced(machine, step, "raise ValueError('injected')"), "ValueError: injected"
    )


@pytest.mark.parametrize("step", PLAIN)
def test_exception_with_the_guest_standing(ticker, step):
    machine = ticker().plain()
    check_back(
        machine, replaced(machine, step, "raise ValueError('injected')"), "ValueError: injected"
    )


@pytest.mark.parametrize("step", ["pyvmm.cli:serve", "pyvmm.devices.rtc:Rtc.load"])
@pytest.mark.parametrize(
    ("fault", "why"),
    [
        ("raise SystemExit(3)", "SystemExit: 3"),
        ("raise KeyboardInterrupt", "KeyboardInterrupt: "),
        ("raise MemoryError", "MemoryError: "),
        ("raise GeneratorExit", "GeneratorExit: "),
        ("raise RecursionError('deep')", "RecursionError: deep"),
        ("import no_such_module", "ModuleNotFoundError: No module named 'no_such_module'"),
        ("from pyvmm.errors import ConfigError as E; raise E('-m: odd')", "-m: odd"),
        ("raise ValueError('\\udcff\\0\\n' + 9 * 'x')", None),
    ],
)
def test_kind_of_exception(ticker, step, fault, why):
    machine = ticker()
    command = replaced(machine, step, fault)
    if why is None:
        assert BACK in update(machine, command)
        check_alive(machine)
    else:
        check_back(machine, command, why)


@pytest.mark.parametrize(
    ("fault", "why"),
    [
        ("import pyvmm.cpr.state as s; s.VERSION = 2", "CPR state: version 1 is not supported"),
        (
            "import pyvmm.cpr.state as s; s.VALUES_VERSION = 2",
            "CPR state: host-side values of another version",
        ),
        (
            "import pyvmm.cpr.state as s; r = s.decode; s.decode = lambda d: r(b'spoilt' + d[6:])",
            "CPR state: bad magic",
        ),
        (
            "import os; os.environ['PYVMM_CPR_EXEC_STATE'] = '-1'",
            "CPR state: PYVMM_CPR_EXEC_STATE='-1' is no descriptor",
        ),
    ],
    ids=["version", "version of the values", "contents", "descriptor"],
)
def test_cpr_state_that_the_new_image_cannot_read(ticker, fault, why):
    machine = ticker()
    check_back(machine, replaced(machine, "pyvmm:", fault), why)


@pytest.mark.parametrize(
    ("code", "why"),
    [
        ("raise SystemExit(3)", "the new image ended before it took over"),
        ("raise KeyboardInterrupt", "KeyboardInterrupt: "),
        ("import no_such_module", "ModuleNotFoundError: No module named 'no_such_module'"),
    ],
)
def test_end_before_the_command_line_is_looked_at(ticker, code, why):
    # Not below a handler of ours: while the program is being imported.
    machine = ticker()
    check_back(machine, replaced(machine, "pyvmm:", code), why)


def test_state_file(ticker):
    # Not only the state in memory is there for the old image, too.
    machine = ticker()
    command = replaced(machine, LOADED[0], "raise ValueError('injected')")
    machine.set_update([*command, "-incoming", "file:vm.state"])
    assert BACK in machine.hmp("migrate file:vm.state")
    check_alive(machine)


NO_THREAD = (
    "the host allows no further thread; raise its limit (ulimit -u, the control group's pids.max) "
    "or free memory"
)
DEBUGCON = ("-device", "isa-debugcon,chardev=side")
SIDE = "socket,id=side,path=side.sock,server=on,wait=off"


@pytest.mark.parametrize(
    ("other", "why"),
    [
        ("file,id=side,path=log", "is no file"),
        ("pty,id=side", "is no pseudo terminal"),
        ("socket,id=side,host=127.0.0.1,port=0,server=on,wait=off", "is a socket of another kind"),
    ],
)
def test_connection_that_the_new_command_has_no_use_for(ticker, other, why):
    # A new image that refuses what it is given must not have closed it. Its preflight, which
    # would refuse that already, is made to say otherwise.
    shape = "type(arguments[0]).shape = lambda self: 'unix socket'"
    fault = ("pyvmm.chardev.config:ChardevConfig.shape", shape)
    machine = ticker("-chardev", SIDE, *DEBUGCON)
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(machine.folder / "side.sock"))
        wait_until(lambda: "disconnected:unix:side" not in machine.hmp("info chardev"), "a client")
        command = replaced(machine, *fault, probe=True)
        command = [other if word == SIDE else word for word in command]
        reply = update(machine, command)
        assert why in reply
        assert BACK in reply
        assert "unix:side.sock,server=on\n" in machine.hmp("info chardev")
        check_alive(machine)
        assert not select.select([client], [], [], 0)[0]  # no end of file


def test_rollback_of_a_change_of_address(ticker):
    machine = ticker("-chardev", SIDE, *DEBUGCON)
    command = replaced(machine, LOADED[0], "raise ValueError('injected')")
    command = [word.replace("side.sock", "other.sock") for word in command]
    check_back(machine, command, "ValueError: injected")
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(machine.folder / "side.sock"))
        wait_until(lambda: "disconnected:unix:side" not in machine.hmp("info chardev"), "a client")


def test_two_vcpus(ticker):
    machine = ticker(smp=2).plain()
    fault = "if arguments[0].index: raise ValueError('second')"
    check_back(machine, replaced(machine, PLAIN[0], fault), "ValueError: second")


@pytest.mark.parametrize("threads", [0, 1, 2])
def test_host_that_allows_no_further_thread(ticker, tmp_path, threads):
    # Of a disk, of the first vCPU, of the second: all are started before there is no way back.
    (tmp_path / "disk").write_bytes(bytes(1 << 20))
    drive = f"if=none,id=d0,file={tmp_path}/disk,format=raw"
    machine = ticker("-drive", drive, "-device", "virtio-blk-device,drive=d0", smp=2)
    fault = (
        "import _thread as t\n"
        f"t.left = getattr(t, 'left', {threads}) - 1\n"
        'if t.left < 0: raise RuntimeError("can\'t start new thread")'
    )
    check_back(machine, replaced(machine, "_thread:start_new_thread", fault), NO_THREAD)


def test_last_moment_in_a_thread(ticker):
    # All is loaded and the vCPUs' threads are there: exec must end them without harm.
    machine = ticker(smp=2)
    command = replaced(machine, LAST, "raise ValueError('late')")
    for _ in range(5):
        assert "ValueError: late" in update(machine, command)
    check_alive(machine)


@pytest.mark.parametrize(
    "change",
    [
        "words[words.index('64M')] = '65M'",
        "words[words.index('64M')] = '63M'",
        "words += ['-smp', '2']",
        "words += ['-serial', 'null']",
        "words += ['-help']",
        "words += ['-no-such-option']",
        "words[words.index('-incoming') + 1] = 'file:no.such.state'",
        "words[words.index('-incoming') + 1] = 'memfd:x'",
    ],
)
def test_command_that_is_another_after_the_preflight(ticker, change):
    machine = ticker()
    assert BACK in update(
        machine, replaced(machine, "pyvmm:", f"import sys; words = sys.argv; {change}")
    )
    check_alive(machine)


@pytest.mark.parametrize(
    "fault",
    [
        "import signal; signal.pause()",
        "while True: pass",
        "import _thread as t; l = t.allocate_lock(); l.acquire(); l.acquire()",
    ],
    ids=["waits", "spins", "deadlock"],
)
@pytest.mark.parametrize("step", ["pyvmm.cli:serve", LOADED[0]])
def test_hang(ticker, fault, step):
    check_late(ticker, step, fault)


def test_hang_that_swallows_the_alarm(ticker):
    fault = "import signal\ntry: signal.pause()\nexcept Exception: signal.pause()"
    check_late(ticker, LOADED[0], fault)


def check_late(ticker, step, fault):
    """The deadline passes, and the guest is back. It is long enough for a loaded host to get to
    where the new image handles it, and a good update has all its time."""
    quick = (
        "import os, pyvmm.migration.rollback as r\n"
        "r.DEADLINE_S = 3.0 if os.path.exists('impatient') else 10.0"
    )
    machine = ticker(program=faulty("pyvmm.migration.rollback:arm", quick))
    (machine.folder / "impatient").touch()
    assert f"did not take over within 10 s {BACK}" in update(
        machine, replaced(machine, step, fault)
    )
    (machine.folder / "impatient").unlink()
    check_alive(machine)


def test_events(ticker):
    machine = ticker(*QMP)
    with Qmp(machine.folder / "qmp.sock") as qmp:
        qmp.execute(
            "migrate-set-capabilities", capabilities=[{"capability": "events", "state": True}]
        )
        assert BACK in update(machine, replaced(machine, LOADED[0], "raise ValueError('seen')"))
        info = qmp.execute("query-migrate")
        assert (info["status"], info["error-desc"]) == ("failed", f"ValueError: seen {BACK}")
        stops = [event for event in qmp.events if event in ("STOP", "RESUME")]
        assert stops == ["STOP", "RESUME"]
    check_alive(machine)


def test_many_times(ticker):
    # Nothing is left behind by a state that was half loaded.
    machine = ticker(smp=2)
    good, footprint = update(machine), held(machine)
    environment = os.path.getsize(f"/proc/{machine.pid}/environ"), len(machine.cmdline)
    assert good == ""
    for step in ("pyvmm.machine.builder:add_devices", *LOADED[::3]):
        for _ in range(3):
            assert BACK in update(machine, replaced(machine, step, "raise ValueError"))
        assert held(machine) == footprint
    assert update(machine) == ""
    assert held(machine) == footprint
    assert (os.path.getsize(f"/proc/{machine.pid}/environ"), len(machine.cmdline)) == environment
    check_alive(machine)


# ---- between the preflight and the exec: the old image is still there ----------------------

PROGRAM = f"""#!{sys.executable}
import os, shutil, stat, sys
from pyvmm import cli
if cli.PROBE in os.environ:
    path = os.path.abspath(__file__)
    {{}}
sys.exit(cli.main())
"""


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ("os.unlink(path)", "No such file or directory"),
        ("os.chmod(path, 0o600)", "Permission denied"),
        ("os.unlink(path); os.mkdir(path)", "Permission denied"),
        ("open(path, 'w').write('#!/no/such/python')", "No such file or directory"),
        ("open(path, 'w').write('text')", "Exec format error"),
        ("open(path, 'w').close()", "Exec format error"),
        ("open(path, 'wb').write(open(sys.executable, 'rb').read(64))", "Exec format error"),
    ],
)
def test_program_that_is_another_after_the_preflight(ticker, change, why):
    machine = ticker()
    path = machine.folder / "program"
    path.write_text(PROGRAM.format(change))
    path.chmod(stat.S_IRWXU)
    reply = update(machine, [str(path), *machine.argv[1:]])
    assert reply == f"Error: execve {path} failed: {why}\n"
    assert f"failed (execve {path} failed: {why})" in machine.hmp("info migrate")
    check_alive(machine)


@pytest.mark.parametrize(
    "step",
    [
        "pyvmm.migration.rollback:prepare",
        "pyvmm.kvm.carrier:Control.make",
        "pyvmm.kvm.carrier:Carrier.start",
        "pyvmm.migration.running_exec:RunningExec.stop_guest",
        "pyvmm.machine.machine:Machine.drain",
        "pyvmm.migration.savevm:save",
        "pyvmm.devices.serial:Serial.save",
        "pyvmm.migration.channel:MemoryChannel.write",
        "pyvmm.migration.rollback:arm",
        "pyvmm.cpr.state:write",
        "pyvmm.cpr.handover:Handover.set_inheritable",
    ],
)
@pytest.mark.parametrize(
    "error", ["ValueError('injected')", "OSError(28, 'No space left on device')"]
)
def test_exception_before_the_exec(ticker, step, error):
    guarded = f"import os\nif os.path.exists('armed'):\n os.unlink('armed')\n raise {error}"
    machine = ticker(program=faulty(step, guarded))
    check_alive(machine)
    footprint = machine.footprint()
    (machine.folder / "armed").touch()
    reply = update(machine)
    why = error.split("'")[1]
    if error.startswith("OSError") and step in SPARED:
        # What the host refuses there the guest need not have: it stands instead.
        assert reply == ""
        assert f"Guest in the exec: \tstopped ([Errno 28] {why})" in machine.hmp("info migrate")
    else:
        assert why in reply
    assert machine.status == "running"
    assert machine.footprint() == footprint
    check_alive(machine)
    assert machine.footprint() == footprint


@pytest.mark.parametrize(
    "step",
    [
        "pyvmm.machine.machine:Machine.pause_cpus",
        "pyvmm.x86.vcpu_state:read",
        "pyvmm.migration.cpr_exec:CprExec.hold_memory",
        "pyvmm.cpr.state:write",
    ],
)
def test_exception_before_the_exec_with_the_guest_standing(ticker, step):
    machine = ticker(program=armed(step, once("raise ValueError('injected')")))
    check_alive(machine)
    footprint = machine.footprint()
    (machine.folder / "armed").touch()
    assert update(machine.plain()) == "Error: ValueError: injected\n"
    assert machine.status == "running"
    assert machine.footprint() == footprint
    check_alive(machine)
    assert machine.footprint() == footprint


def copy_package(folder):
    """A folder with a checkout's package and what it boots."""
    root = Path(pyvmm.__file__).parents[1]
    for part in ("pyvmm", "guests/build", "firmware/build"):
        shutil.copytree(root / part, folder / "site" / part)
    return folder / "site"


def test_package_that_goes_while_the_guest_runs_already(ticker):
    # Too late for a way back: the guest runs on, without what could not be imported.
    machine = ticker()
    gone = "import sys; sys.modules['pyvmm.migration.preflight'] = None"
    assert update(machine, replaced(machine, "pyvmm.monitor.front:Front.open", gone)) == ""
    check_ticking(machine)
    assert "there can be no update" in machine.stderr()
    assert "Error: The preflight cannot be made" in update(machine)
    check_ticking(machine)


def test_without_a_holder_for_the_old_memory(ticker):
    # Where no further process is allowed an update takes longer, that is all.
    fault = (
        "from pyvmm.errors import HostError; raise HostError('Resource temporarily unavailable')"
    )
    machine = ticker(program=faulty("pyvmm._native:hold_memory", fault)).plain()
    footprint = machine.footprint()
    check_alive(machine)
    assert machine.footprint() == footprint
    note = "the old memory was taken apart in the pause (Resource temporarily unavailable)"
    assert f"Note: \t\t\t{note}\n" in machine.hmp("info migrate")
    assert machine.stderr().count(f"update: {note}") == 1
    machine.plain()
    assert update(machine, [pyvmm_command(), "run", *options(machine)]) == ""
    assert note in machine.hmp("info migrate")
    machine.plain()
    assert update(machine) == ""
    assert "Note" not in machine.hmp("info migrate")


def test_package_replaced_under_a_running_vmm(vm, tmp_path):
    # All that the old image does until it has gone, it has imported before.
    copy = copy_package(tmp_path)
    program = [sys.executable, "-c", "from pyvmm import cli; raise SystemExit(cli.main())", "run"]
    machine = vm(append="ticker period=20", program=program, PYTHONPATH=str(copy))
    machine.expect(r"tick 2\r\n")
    assert machine.status == "running"  # the monitor is there, so is all that comes with it
    os.rename(copy / "pyvmm", copy / "away")
    (copy / "pyvmm").mkdir()
    (copy / "pyvmm" / "__init__.py").write_text("raise ImportError('half installed')")
    assert "half installed" in update(machine)
    assert "CPU#0" in machine.hmp("info registers")
    shutil.rmtree(copy / "pyvmm")
    command = ["/usr/bin/env", "-u", "PYTHONPATH", pyvmm_command(), "run", *options(machine)]
    assert update(machine, command) == ""
    check_alive(machine)


@pytest.mark.parametrize(
    "module",
    [
        "cli.py",
        "errors.py",
        "cpr/__init__.py",
        "cpr/state.py",
        "_native/__init__.py",
        "core/eventloop.py",
        "machine/options.py",
        "machine/builder.py",
        "migration/manager.py",
        "migration/incoming.py",
        "migration/channel.py",
        "devices/rtc.py",
    ],
)
def test_package_broken_after_the_preflight(vm, tmp_path, module):
    """What the new image imports is broken between probe and exec; the old one has its own."""
    machine, reply = update_to_broken(vm, tmp_path, module)
    assert reply == f"Error: ZeroDivisionError: division by zero {BACK}\n"
    check_alive(machine)


@pytest.mark.parametrize("module", ["outgoing", "holder", "cpr_exec", "rollback", "uri"])
def test_package_broken_where_only_the_next_update_needs_it(vm, tmp_path, module):
    """It is not imported in the pause. The guest runs on, and the operator knows."""
    machine, reply = update_to_broken(vm, tmp_path, f"migration/{module}.py")
    assert reply == ""
    check_ticking(machine)
    told = "there can be no update: ZeroDivisionError"
    wait_until(lambda: told in machine.stderr(), "the word to the operator")
    assert "division by zero" in update(machine)
    check_ticking(machine)


def update_to_broken(vm, tmp_path, module):
    """A machine that was updated to a copy of the package that breaks between probe and exec, and
    what was said of that."""
    copy = copy_package(tmp_path)
    machine = vm(append="ticker period=20")
    machine.expect(r"tick 2\r\n")
    fault = (
        f"import sys; sys.path.insert(0, {str(copy)!r}); import os\n"
        "from pyvmm import cli\n"
        "code = cli.main(sys.argv[2:])\n"
        f"if cli.PROBE in os.environ: open({str(copy / 'pyvmm' / module)!r}, 'w').write('1 / 0')\n"
        "sys.exit(code)"
    )
    launcher = machine.folder / "launcher.py"
    launcher.write_text(fault.replace("sys.argv[2:]", "sys.argv[1:]"))
    command = [sys.executable, "-B", str(launcher), "run", *machine.argv[2:]]
    return machine, update(machine, command)


@pytest.mark.parametrize("end", ["quit", "signal"])
def test_end_of_an_image_that_waits_for_its_uri(ticker, end):
    # Who ends it does not want the old image back.
    machine = ticker()
    machine.set_update([*machine.argv, "-incoming", "defer"])
    machine.hmp_send("migrate memfd:")
    wait_until(lambda: machine.cmdline[-1] == "defer", "the new image")
    machine.hmp_reply()
    if end == "quit":
        assert machine.hmp_quit() == 0
    else:
        machine.kill()
        assert machine.wait_exit() == 128 + signal.SIGTERM
    assert "way back" not in machine.stderr()


def test_way_back_of_an_image_that_waits_for_its_uri(ticker):
    # Whatever was inherited is open by then, also what it had no use for any more.
    machine = ticker("-chardev", SIDE, *DEBUGCON)
    command = replaced(machine, "pyvmm.migration.savevm:read", "raise SystemExit(3)")
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(machine.folder / "side.sock"))
        wait_until(lambda: "disconnected:unix:side" not in machine.hmp("info chardev"), "a client")
        machine.set_update([*command, "-incoming", "defer"])
        machine.hmp_send("migrate memfd:")
        wait_until(lambda: machine.cmdline[-1] == "defer", "the new image")
        machine.hmp_reply()
    wait_until(lambda: "disconnected:unix:side" in machine.hmp("info chardev"), "the client's end")
    machine.hmp_send("migrate_incoming memfd:")
    assert f"SystemExit: 3 {BACK}" in machine.hmp_reply()
    check_alive(machine)
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(machine.folder / "side.sock"))
        wait_until(lambda: "disconnected:unix:side" not in machine.hmp("info chardev"), "a client")


def test_incoming_that_waits_for_its_uri(ticker):
    # Also for a state in memory, which must not be closed as something that nobody wants.
    machine = ticker()
    with_defer = [*machine.argv, "-incoming", "defer"]
    machine.set_update(with_defer)
    machine.hmp_send("migrate memfd:")
    wait_until(lambda: machine.cmdline[-1] == "defer", "the new image")
    machine.hmp_reply()
    assert machine.status == "paused (inmigrate)"
    assert machine.hmp("migrate_incoming memfd:") == ""
    check_alive(machine)
