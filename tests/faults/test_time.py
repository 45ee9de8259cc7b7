"""The guest's clocks over a hundred updates: neither jumps, nor drifts."""

import pytest
from faults.tools import BACK, faulty, replaced, update
from harness.lives import LAST, LAST_PLAIN

# Written down by each image when the guest goes on there: per vCPU the distance of its TSC
# from the host's, and of kvmclock from the host's boot clock.
NOTE = """
import os, time
machine = arguments[0]
if not os.path.exists("times"):
    # Something that a new VM does not have by itself.
    for cpu in machine.cpus:
        cpu.vcpu.set_tsc_offset(-(10 ** 12) % (1 << 64))
vm = machine.platform.vm
rows = []
for _ in range(20):
    before = time.clock_gettime_ns(time.CLOCK_BOOTTIME)
    clock = vm.get_clock()
    after = time.clock_gettime_ns(time.CLOCK_BOOTTIME)
    rows.append((after - before, clock, before, after))
_, clock, before, after = min(rows)
offsets = [cpu.call(lambda vcpu: vcpu.get_tsc_offset()) for cpu in machine.cpus]
with open("times", "a") as file:
    print(*offsets, clock - (before + after) // 2, after - before, file=file)
"""
UPDATES = 100


@pytest.mark.slow
@pytest.mark.parametrize("is_plain", [False, True], ids=["running", "plain"])
def test_tsc_and_kvmclock_do_not_drift(vm, is_plain):
    first = "pyvmm.machine.machine:Machine.resume_cpus"
    later = first if is_plain else "pyvmm.machine.machine:Machine.go_on"
    notes = dict.fromkeys((first, later), NOTE)
    machine = vm(
        append="timers period=100",
        smp=2,
        program=faulty(*(word for pair in notes.items() for word in pair)),
    )
    machine.expect("timers ok 1 ")
    broken = replaced(machine, LAST_PLAIN if is_plain else LAST, "raise ValueError")
    for number in range(UPDATES):
        if is_plain:
            machine.plain()
        if number % 20 == 19:
            assert BACK in update(machine, broken)
        else:
            assert update(machine) == ""
    machine.seen = len(machine.serial)
    machine.expect("timers ok")
    assert b"FAIL" not in machine.serial
    lines = (machine.folder / "times").read_text().splitlines()
    times = [[int(word) for word in line.split()] for line in lines]
    assert len(times) == UPDATES + 1
    # A host whose guests see the bare TSC takes no other offset than 0.
    assert times[0][0] in (-(10**12) % (1 << 64), 0)
    assert {tuple(row[:2]) for row in times} == {tuple(times[0][:2])}
    # What took long to read is no measurement of the clock, but of the host's load.
    distances = [row[2] for row in times if row[3] < 20_000]
    assert len(distances) > UPDATES // 2
    assert max(distances) - min(distances) < 100_000
