"""What keeps a machine from being updated is said beforehand, and a host that has run out of
something costs the update, not the guest."""

import resource
import sys

import pytest
from harness import run_cli, wait_until

PRIVATE = "it is private to this process; share=on is required"
RAMS = [
    ("-machine", "anon-alloc=mmap"),
    ("-object", "memory-backend-ram,id=ram0,size=64M"),
    ("-object", "memory-backend-memfd,id=ram0,size=64M,share=off"),
]
SECCOMP_VM = """\
import ctypes, struct, sys
ACTION = int(sys.argv.pop(1), 0)

def statement(code, k, yes=0, no=0):
    return struct.pack("HBBI", code, yes, no, k)

EXECVE, EXECVEAT = 59, 322
program = b"".join(
    (
        statement(0x20, 0),  # load the number of the system call
        statement(0x15, EXECVE, yes=1),
        statement(0x15, EXECVEAT, no=1),
        statement(0x06, ACTION),
        statement(0x06, 0x7FFF0000),  # allow
    )
)
buffer = ctypes.create_string_buffer(program)
fprog = struct.pack("HxxxxxxP", len(program) // 8, ctypes.addressof(buffer))
libc = ctypes.CDLL(None, use_errno=True)
assert libc.prctl(38, 1, 0, 0, 0) == 0  # PR_SET_NO_NEW_PRIVS
assert libc.prctl(22, 2, ctypes.create_string_buffer(fprog)) == 0  # PR_SET_SECCOMP, filter
from pyvmm.cli import main
sys.exit(main())
"""
DENY, KILL = 0x00050001, 0x80000000  # SECCOMP_RET_ERRNO | EPERM, SECCOMP_RET_KILL_PROCESS


def ticking(vm, *options, **arguments):
    machine = vm(*options, append="ticker period=20 timer=pit", **arguments)
    machine.expect("tick")
    assert machine.status == "running"  # the monitor is there, and pyvmm has started
    return machine


def runs_on(machine):
    """The guest was not lost, nor a line of it."""
    assert machine.status == "running"
    machine.seen = len(machine.serial)
    machine.expect("tick")
    assert b"FAIL" not in machine.serial


# --- blockers ----------------------------------------------------------------------------------


@pytest.mark.parametrize("options", RAMS)
def test_private_memory_blocks(vm, options):
    machine = ticking(vm, *options)
    lines = machine.hmp("info migrate").splitlines()
    assert lines[0] == "Outgoing migration blocked:"
    assert lines[1].startswith("  Memory region ")
    assert PRIVATE in lines[1]
    machine.set_update()
    for command in ("migrate file:vm.state", "update"):
        reply = machine.hmp(command)
        assert reply == f"Error: {lines[1].strip()}\n"
    runs_on(machine)


@pytest.mark.parametrize("options", RAMS)
def test_only_migratable_refuses_to_start(options):
    result = run_cli("run", "-m", "64M", *options, "-only-migratable", "-monitor", "none")
    assert result.returncode == 2
    assert result.stderr.startswith("pyvmm: -only-migratable: Memory region ")
    assert PRIVATE in result.stderr
    assert result.stderr.count("\n") == 1


def test_only_migratable_with_shared_memory(vm):
    machine = ticking(vm, "-only-migratable")
    assert "only-migratable: on" in machine.hmp("info migrate -a")
    machine.update()
    runs_on(machine)


# --- seccomp -----------------------------------------------------------------------------------


@pytest.mark.parametrize("action", [DENY, KILL])
def test_denied_execve_is_seen_before_the_stop(vm, tmp_path, action):
    script = tmp_path / "vm.py"
    script.write_text(SECCOMP_VM)
    machine = ticking(vm, program=[sys.executable, str(script), str(action), "run"])
    reply = machine.hmp("update")
    if action == DENY:
        assert "Operation not permitted" in reply
        assert "seccomp" in reply
    else:
        assert "killed by signal 31" in reply
    info = machine.hmp("info migrate")
    assert "stop" not in info
    assert machine.hmp("info status") == "VM status: running\n"
    runs_on(machine)
    assert machine.children() == []


# --- out of something --------------------------------------------------------------------------


def limit(machine, what, soft):
    hard = resource.prlimit(machine.pid, what)[1]
    resource.prlimit(machine.pid, what, (soft, hard))


def test_out_of_descriptors(vm):
    machine = ticking(vm, "-qmp", "unix:qmp,server=on,wait=off", smp=2)
    whole = resource.prlimit(machine.pid, resource.RLIMIT_NOFILE)[0]
    descriptors, _ = machine.footprint()
    used = len(descriptors)
    results = []
    for spare in range(24):
        limit(machine, resource.RLIMIT_NOFILE, used + spare)
        results.append(machine.hmp("update"))
        limit(machine, resource.RLIMIT_NOFILE, whole)
        runs_on(machine)
        assert machine.footprint()[0] == descriptors
    assert results[0].startswith("Error: Too many open files")
    assert results[-1] == ""
    assert machine.hmp("update") == ""
    assert "completed" in machine.hmp("info migrate")
    runs_on(machine)


@pytest.mark.parametrize("uri", ["memfd:", "file:vm.state"])
def test_out_of_file_size(vm, uri):
    # Byte code that is cut short by the limit would stay, and harm everybody.
    machine = ticking(vm, PYTHONDONTWRITEBYTECODE="1")
    machine.set_update(uri=uri)
    footprint = machine.footprint()
    # From nothing at all, by way of too little for the preflight's answer, the state, and what
    # goes beside it, to enough.
    results = []
    for size in (0, 1000, 2000, 4000, 6000, 10_000, 14_000, 18_000, 1 << 20):
        limit(machine, resource.RLIMIT_FSIZE, size)
        results.append(machine.hmp(f"migrate {uri}"))
        limit(machine, resource.RLIMIT_FSIZE, resource.RLIM_INFINITY)
        runs_on(machine)
        assert machine.footprint() == footprint
        machine.set_update(uri=uri)
    assert all(result.startswith("Error: ") for result in results[:2])
    assert results[-1] == ""
    assert machine.hmp(f"migrate {uri}") == ""
    wait_until(lambda: "completed" in machine.hmp("info migrate"), "a good update")
    runs_on(machine)
