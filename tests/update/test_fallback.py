"""Where the guest cannot run through an exec it stands for it, and who asks is told why."""

import re

import pytest
from faults.tools import (
    TICKER,
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
from harness import run_cli

import pyvmm

HOST = "from pyvmm.errors import HostError; raise HostError('none left')"
FALL_BACK = "from pyvmm.migration.running_exec import FallBack; raise FallBack('moved')"
#: Steps of the old image, what happens there, and what is told of it.
STEPS = {
    "no control pages": ("pyvmm.kvm.carrier:Control.make", HOST, "none left"),
    "no carrier": ("pyvmm.kvm.carrier:Carrier.start", HOST, "none left"),
    "the first vCPU moves": (
        "pyvmm.kvm.carrier:Carrier.hand_over",
        f"if arguments[1].index:\n {FALL_BACK}",
        "moved",
    ),
    "all of them have moved": ("pyvmm.machine.machine:Machine.drain", once(FALL_BACK), "moved"),
}
#: What this image's trial of the kernel says.
REFUSES = """\
import pyvmm.kvm.trial as trial
end = trial.Trial.end
def refuse(*arguments):
    return end(*arguments) or "another kernel"
trial.Trial.end = refuse
"""
SLOW = "import pyvmm.kvm.trial as trial; trial.Trial.move_ms = 31"
OLD_KERNEL = "on this kernel (before Linux 6.13) a vCPU takes 31 ms from one task to another"


def way(machine):
    """How the guest went through the last exec."""
    return re.search("Guest in the exec: \t(.*)\n", machine.hmp("info migrate"))[1]


def check_stands(machine, reason, command=None):
    """An update in which the guest stands, for that reason; then one in which it runs."""
    fds, threads = machine.footprint()
    assert update(machine, command) == ""
    assert way(machine) == f"stopped ({reason})"
    # The first thread's name tells how it was executed.
    now = machine.footprint()
    assert (now[0], len(now[1])) == (fds, len(threads))
    check_ticking(machine)
    (machine.folder / "armed").unlink(missing_ok=True)
    check_alive(machine)
    assert way(machine) == "running"
    assert machine.stderr() == ""


@pytest.fixture
def start(vm):
    """Starts a VM whose guest prints contiguous numbers; options as :class:`harness.Vm`'s."""

    def start(**arguments):
        machine = vm(append=TICKER, smp=2, **arguments)
        machine.expect(r"tick 2\r\n")
        return machine

    return start


@pytest.mark.parametrize("case", STEPS)
def test_old_image_cannot(start, case):
    step, fault, reason = STEPS[case]
    machine = start(program=armed(step, fault))
    assert update(machine) == ""
    assert way(machine) == "running"
    (machine.folder / "armed").touch()
    check_stands(machine, reason)


def test_paused_guest_cannot_either(start):
    machine = start(program=armed("pyvmm.kvm.carrier:Carrier.start", HOST))
    machine.hmp("stop")
    (machine.folder / "armed").touch()
    assert update(machine) == ""
    assert way(machine) == "stopped (none left)"
    assert machine.status == "paused"
    assert machine.hmp("cont") == ""
    check_ticking(machine)


@pytest.mark.parametrize(
    ("fault", "reason"),
    [(REFUSES, "another kernel"), (SLOW, OLD_KERNEL)],
    ids=["refuses", "slow"],
)
def test_kernel_does_not_do_it(start, fault, reason):
    machine = start(program=faulty("pyvmm:", fault))
    check_stands(machine, reason, [pyvmm_command(), "run", *options(machine)])


def test_kernel_is_tried_once(start):
    # The next image knows what the one before has found.
    machine = start()
    silent = replaced(machine, "pyvmm.kvm.trial:Trial.__init__", "raise OSError(1, 'tried again')")
    for command in (silent, [pyvmm_command(), "run", *options(machine)]):
        assert update(machine, command) == ""
        assert way(machine) == "running"
        check_ticking(machine)


def test_new_image_knows_another_carrier(start):
    machine = start()
    other = replaced(machine, "pyvmm:", "import pyvmm.kvm.carrier as c; c.VERSION = 9", probe=True)
    assert update(machine, other) == ""
    reason = f"the new version {pyvmm.__version__} cannot take over from this carrier"
    assert way(machine) == f"stopped ({reason})"
    check_ticking(machine)
    # The command that it has by now would say so again.
    assert update(machine, [pyvmm_command(), "run", *options(machine)]) == ""
    assert way(machine) == "running"
    check_ticking(machine)


def test_new_image_does_not_run_the_guest(start):
    machine = start()
    assert update(machine, [*machine.argv, "-S"]) == ""
    assert way(machine) == "stopped (-S: the guest is to stand in the new image)"
    assert machine.status == "paused"
    assert machine.hmp("cont") == ""
    check_ticking(machine)


def test_by_choice(start):
    """That is no fallback. The choice is of one image, as all of its parameters."""
    machine = start().plain()
    assert update(machine) == ""
    assert way(machine) == "stopped"
    check_alive(machine)
    assert way(machine) == "running"
    assert update(machine.plain(), [*machine.argv, "-S"]) == ""
    assert way(machine) == "stopped"


def test_choice_that_was_taken_back(start):
    machine = start().plain()
    assert machine.hmp("migrate_set_parameter cpr-exec-running on") == ""
    assert update(machine) == ""
    assert way(machine) == "running"


@pytest.mark.parametrize("setting", ["off", "on"])
def test_state_file_has_the_vcpus_if_the_guest_stood(vm, tmp_path, setting):
    """Another process can load it only then, and says so."""
    ram = f"memory-backend-file,id=ram0,size=64M,mem-path={tmp_path}/ram,share=on"
    state = f"file:{tmp_path}/state"
    common = {"memory": None, "append": TICKER}
    machine = vm("-object", ram, **common)
    machine.expect(r"tick 2\r\n")
    machine.hmp("stop")
    assert machine.hmp(f"migrate_set_parameter cpr-exec-running {setting}") == ""
    machine.set_update([*machine.argv, "-incoming", state])
    assert machine.hmp(f"migrate {state}") == ""
    assert machine.status == "paused"
    machine.hmp_quit()
    if setting == "on":
        words = ("-object", ram, "-append", TICKER, "-monitor", "none", "-incoming", state)
        done = run_cli("run", "-serial", "null", *words)
        assert done.returncode == 1
        assert "the vCPUs are not in it" in done.stderr
        assert done.stderr.count("\n") == 1
        return
    later = vm("-object", ram, "-incoming", state, **common)
    assert later.status == "paused"
    assert later.hmp("cont") == ""
    later.serial[:0] = machine.serial
    check_ticking(later)
