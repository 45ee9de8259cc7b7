"""The files of kernel and initrd suffer harm while the guest runs, and it resets all the same."""

import os
import shutil

import pytest
from faults.tools import BACK, faulty, options, replaced, update
from harness import guests, pyvmm

FIRST, SECOND = b"first", b"another"


def _rename(path, data):
    (path.parent / "new").write_bytes(data)
    os.rename(path.parent / "new", path)


HARMS = {
    "removed": lambda path: path.unlink(),
    "replaced": lambda path: _rename(path, SECOND),
    "truncated": lambda path: os.truncate(path, 0),
    "written over": lambda path: path.write_bytes(SECOND * 1000),
    "a directory": lambda path: (path.unlink(), path.mkdir()),
    "folder removed": lambda path: shutil.rmtree(path.parent, ignore_errors=True),
}


@pytest.fixture
def boot(vm, tmp_path):
    """Starts the checker of Linux's boot protocol, with its files in a folder of their own."""
    folder = tmp_path / "files"
    folder.mkdir()

    def start(*more, **arguments):
        (folder / "kernel").write_bytes(guests.image("linux64.elf").read_bytes())
        (folder / "initrd").write_bytes(FIRST)
        files = ("-kernel", folder / "kernel", "-initrd", folder / "initrd")
        machine = vm(*files, *more, append="x", **arguments)
        guests.expect_verdict(machine, "ELF")
        machine.wait_status("running")
        return machine

    start.files = [folder / "kernel", folder / "initrd"]
    return start


def check_reset(machine):
    """It starts anew with what it was started with."""
    assert machine.hmp("system_reset") == ""
    text = guests.expect_verdict(machine, "ELF")
    assert f" {len(FIRST):#x} {guests.hash31(FIRST):#x}\r\n" in text
    assert machine.status == "running"


@pytest.mark.parametrize("harm", HARMS)
@pytest.mark.parametrize("history", ["fresh", "updated", "rolled back"])
def test_reset_after_harm(boot, harm, history):
    machine = boot()
    if history == "updated":
        # Before and after: what is kept goes through both.
        assert update(machine) == ""
    for path in boot.files:
        HARMS[harm](path)
    if history == "updated":
        assert update(machine) == ""
    elif history == "rolled back":
        fault = replaced(machine, "pyvmm.kvm.carrier:Takeover.take", "raise ValueError")
        assert BACK in update(machine, fault)
    check_reset(machine)
    check_reset(machine)
    assert "Traceback" not in machine.stderr()


def old_image():
    """The first words of an image that does not keep them, as versions before this had it."""
    return faulty("pyvmm.boot.files:BootFiles.keep", "raise ImportError('none')")


@pytest.mark.parametrize("present", [True, False])
def test_update_from_an_image_that_kept_nothing(boot, present):
    """They are opened once the guest runs; if they are not there, one line says so."""
    machine = boot(program=old_image())
    data = [path.read_bytes() for path in boot.files]
    if not present:
        for path in boot.files:
            path.unlink()
    assert update(machine, [pyvmm(), "run", *options(machine)]) == ""
    machine.wait_status("running")
    if present:
        for path in boot.files:
            path.unlink()
        check_reset(machine)
        return
    for path in boot.files:
        assert machine.stderr().count(f"{path}: No such file or directory") == 1
    assert "No such file or directory" in machine.hmp("system_reset")
    assert machine.status == "paused (internal-error)"
    for path, content in zip(boot.files, data, strict=True):
        path.write_bytes(content)
    machine.hmp("system_reset")
    machine.hmp("cont")
    guests.expect_verdict(machine, "ELF")
    for path in boot.files:
        path.unlink()
    check_reset(machine)


def test_file_that_changes_while_the_guest_is_started(boot):
    """It is not what was loaded: said once, and the file itself is kept."""
    fault = "import os; os.utime(arguments[2].path, ns=(0, 0)) if arguments[1] == '-initrd' else 0"
    machine = boot(program=faulty("pyvmm.boot.files:BootFiles._copy", fault))
    assert machine.stderr().count("initrd: it changed as soon as the guest was started") == 1
    for path in boot.files:
        path.unlink()
    assert update(machine, [pyvmm(), "run", *options(machine)]) == ""
    check_reset(machine)


def test_no_memory_for_a_copy(boot):
    fault = "raise OSError(12, 'Cannot allocate memory')"
    machine = boot(program=faulty("pyvmm.boot.files:BootFiles._copy", fault))
    assert machine.stderr().count("Cannot allocate memory (a reset loads what") == 2
    for path in boot.files:
        path.unlink()
    check_reset(machine)
    assert update(machine, [pyvmm(), "run", *options(machine)]) == ""
    check_reset(machine)


RESET_FAILS = faulty("pyvmm.boot.loader:_load_linux", "import os\nif os.path.exists('fail'): 1 / 0")


@pytest.mark.parametrize("paused", [False, True])
@pytest.mark.parametrize("action", ["pause", "exit-failure"])
def test_reset_that_fails_is_an_internal_error(boot, action, paused):
    """By an operator, of a guest that runs or stands: half of the old guest is not to go on."""
    machine = boot("-action", f"internal-error={action}", program=RESET_FAILS)
    (machine.folder / "fail").touch()
    if paused:
        machine.hmp("stop")
    machine.hmp_send("system_reset")
    if action == "exit-failure":
        assert machine.wait_exit() == 1
        assert "reset: ZeroDivisionError" in machine.stderr()
        return
    assert "ZeroDivisionError" in machine.hmp_reply()
    assert machine.status == "paused (internal-error)"
    assert "Resetting the Virtual Machine is required" in machine.hmp("cont")
    (machine.folder / "fail").unlink()
    machine.hmp("system_reset")
    machine.hmp("cont")
    guests.expect_verdict(machine, "ELF")


@pytest.mark.parametrize("action", ["pause", "exit-failure"])
def test_reset_of_the_guest_that_fails_is_an_internal_error(vm, tmp_path, action):
    """The guest resets itself, with a kernel of an image that kept none."""
    code = "import os\nif os.path.exists('fail'): raise OSError(5, 'Input/output error')"
    machine = vm(
        *("-action", f"internal-error={action}"),
        program=faulty("pyvmm.boot.files:BootFiles.open", code),
    )
    machine.expect("guest> ")
    (machine.folder / "fail").touch()
    machine.type("reset\n")
    if action == "exit-failure":
        assert machine.wait_exit() == 1
    else:
        machine.wait_status("paused (internal-error)")
    assert machine.stderr().count("reset: ") == 1
    assert "Traceback" not in machine.stderr()
