"""The carrier is killed: before the exec the old image has the guest again, after it the guest is
lost, which is told at once."""

import pytest
from faults.rescue import (
    GUESTS,
    KILL_CARRIER,
    NAMED,
    STEPS,
    check_told_lost,
    check_whole,
    ram_inode,
)
from faults.tools import armed, check_ticking, once, replaced, send_update, update

pytestmark = pytest.mark.usefixtures("orphans")


@pytest.mark.parametrize("step", STEPS)
def test_carrier_is_killed(ticker, step):
    machine = ticker(*NAMED)
    inode = ram_inode(machine)
    send_update(machine, replaced(machine, step, KILL_CARRIER))
    check_told_lost(machine, inode)


def test_carrier_is_killed_while_the_new_image_hangs(impatient):
    """Its alarm leads to the old image, which finds no guest."""
    machine, _ = impatient()
    inode = ram_inode(machine)
    fault = f"{KILL_CARRIER}\nimport time; time.sleep(600)"
    send_update(machine, replaced(machine, "pyvmm.machine.builder:add_devices", fault))
    assert machine.wait_exit() == 1
    check_told_lost(machine, inode)


@pytest.mark.parametrize(
    "step",
    ["pyvmm.migration.savevm:save", "pyvmm.migration.channel:MemoryChannel.write"],
)
@pytest.mark.parametrize("smp", [1, 8])
def test_carrier_is_killed_before_the_exec(ticker, step, smp):
    """The guest is the old image's again, whose update fails. Nobody waits for those vCPUs."""
    machine = ticker(*NAMED, smp=smp, program=armed(step, once(KILL_CARRIER)))
    (machine.folder / "armed").touch()
    pid = machine.pid
    reply = update(machine)
    assert reply.startswith("Error: "), reply
    assert "carrier" in reply
    assert machine.pid == pid
    check_whole(machine)


@pytest.mark.parametrize("guest", ["ports", "pingpong"])
def test_carrier_is_killed_with_accesses_under_way(vm, guest):
    append, smp, *line = GUESTS[guest]
    step = "pyvmm.migration.savevm:save"
    program = armed(step, once(KILL_CARRIER))
    machine = vm(*NAMED, append=append, smp=smp, program=program)
    check_ticking(machine, *line)
    (machine.folder / "armed").touch()
    assert "carrier" in update(machine)
    check_whole(machine, *line)
