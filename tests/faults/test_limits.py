"""Numbers of things: machines and hosts at the edge of what a table or a limit allows."""

import pytest
from faults.tools import TICKER, check_ticking, replaced, update
from harness import guests, wait_until

from pyvmm.cpr.handover import OWN, Handover
from pyvmm.errors import MigrationError
from pyvmm.migration import preflight

# In the new image, before it loads: which children it has, and what of them is open.
SPY = """
import os
tasks = [f'/proc/self/task/{tid}/children' for tid in os.listdir('/proc/self/task')]
pids = [pid for task in tasks for pid in open(task).read().split()]
counts = [len(os.listdir(f'/proc/{pid}/fd')) for pid in pids]
open('held', 'w').write(' '.join(map(str, counts)))
"""


@pytest.mark.parametrize("smp", [1, 62, 63, 64, 100])
def test_holder_of_many_vcpus(vm, smp):
    """The old VM outlives the exec in one task with its descriptors, and then goes."""
    # One vCPU counts, the others wait to be started.
    machine = vm("-kernel", guests.image("real-ticker.bin"), smp=smp)
    machine.expect("real-ticker 00000002")
    command = replaced(machine, "pyvmm.migration.savevm:apply", SPY)
    assert update(machine.plain(), command) == ""
    # The VM, a descriptor for each vCPU, and the pipe that ends it.
    assert (machine.folder / "held").read_text() == str(1 + smp + 1)
    wait_until(lambda: not machine.children(), "the end of the holder")
    assert "Note" not in machine.hmp("info migrate")
    number = int(machine.expect(r"real-ticker (\w{8})")[1], 16)
    machine.expect(f"real-ticker {number + 1:08x}")


@pytest.mark.parametrize("smp", [1, 62, 255])
def test_carrier_of_many_vcpus(vm, smp):
    """They run through the exec in tasks of one process, and then it goes."""
    machine = vm("-kernel", guests.image("real-ticker.bin"), smp=smp)
    machine.expect("real-ticker 00000002")
    before = machine.footprint()
    for _ in range(2):
        assert update(machine) == ""
        assert "Guest in the exec: \trunning\n" in machine.hmp("info migrate")
        wait_until(lambda: not machine.children(), "the end of the carrier")
        assert machine.footprint() == before
    number = int(machine.expect(r"real-ticker (\w{8})")[1], 16)
    machine.expect(f"real-ticker {number + 1:08x}")


def test_more_blocks_of_memory_than_a_state_names(vm):
    """Found out before the guest stops, and told by what tells all that is in the way."""
    options = ("-object", "memory-backend-memfd,id=m{},size=4K")
    machine = vm(*(word.format(n) for n in range(255) for word in options), append=TICKER)
    machine.expect(r"tick 2\r\n")
    reason = "257 blocks of memory, of which a state names 256; leave out an -object"
    assert reason in machine.hmp("info migrate")
    assert reason in update(machine)
    check_ticking(machine)


@pytest.mark.parametrize(
    ("keys", "why"),
    [
        ([("a", n) for n in range(4097)], "a list does not end where it should"),
        ([("a" * 256, 0)], "a name of 257 bytes"),
        ([("ä", 0)], "malformed"),
    ],
    ids=["number", "length", "letters"],
)
def test_descriptors_that_cannot_be_handed_over(keys, why):
    handover = Handover()
    for number, (name, index) in enumerate(keys):
        handover.parcel(OWN, name).keep(10 + number, index)
    with pytest.raises(MigrationError, match=why):
        preflight.check_descriptors(handover)
