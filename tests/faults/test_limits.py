"""Numbers of things: machines and hosts at the edge of what a table or a limit allows."""

import pytest
from faults.tools import replaced, update
from harness import guests, wait_until

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
    assert update(machine, command) == ""
    # The VM, a descriptor for each vCPU, and the pipe that ends it.
    assert (machine.folder / "held").read_text() == str(1 + smp + 1)
    wait_until(lambda: not machine.children(), "the end of the holder")
    assert "Note" not in machine.hmp("info migrate")
    number = int(machine.expect(r"real-ticker (\w{8})")[1], 16)
    machine.expect(f"real-ticker {number + 1:08x}")
