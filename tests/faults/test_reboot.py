"""A state that outlives the host: RAM in a file, and the host is started again before somebody
goes on with it."""

import time

import pytest
from faults.tools import faulty
from harness import lives

from pyvmm.vmstate.cursor import Cursor
from pyvmm.x86 import irqchip

APPEND = "timers period=50 rounds=0"
# Written down right before the guest goes on: kvmclock, in ns.
NOTE = """
with open("clocks", "a") as file:
    print(arguments[0].platform.vm.get_clock(), file=file)
"""
PROGRAM = faulty("pyvmm.machine.machine:Machine.resume_cpus", NOTE)


def saved_clock(path):
    """The record of kvmclock in a state."""
    data = path.read_bytes()
    # Behind its name, instance and version.
    at = data.index(b"\x08kvmclock") + 9 + 8
    return irqchip.KVMCLOCK.load(Cursor(data, at), irqchip.KVMCLOCK.version)


def change_state(path, change_id, change_boottime):
    data = bytearray(path.read_bytes())
    # Its name, instance and version, then size, run state and two flags.
    at = data.index(b"\x0bglobalstate") + 12 + 8 + 4 + 32 + 2
    assert any(data[at : at + 16])
    data[at : at + 16] = change_id(data[at : at + 16])
    at = data.index(b"\x11kvmclock/boottime") + 18 + 4
    boottime = int.from_bytes(data[at : at + 8], "big")
    data[at : at + 8] = change_boottime(boottime).to_bytes(8, "big")
    path.write_bytes(data)


def another_boot(path):
    """Of another boot of the host, which was not as old as this one is."""
    change_state(path, lambda id: bytes(byte ^ 1 for byte in id), lambda boottime: boottime // 2)


def longer_boot(path):
    """By an older image, which does not say of which boot it is; this one is younger."""
    change_state(path, lambda id: bytes(16), lambda boottime: boottime + 10**15)


def same_boot(path):
    """Somebody goes on later, that is all."""


@pytest.mark.parametrize("change", [another_boot, longer_boot, same_boot])
def test_state_is_loaded_later(vm, tmp_path, change):
    ram = f"memory-backend-file,id=ram0,size=64M,mem-path={tmp_path}/ram,share=on"
    machine = vm("-object", ram, memory=None, append=APPEND, program=PROGRAM)
    machine.expect("timers ok")
    state = lives.save(machine)
    change(state)
    saved = saved_clock(state)
    before = time.clock_gettime_ns(time.CLOCK_BOOTTIME)
    clocks = machine.folder / "clocks"
    clocks.unlink()
    machine.restart("-incoming", f"file:{state}")
    machine.seen = len(machine.serial)
    machine.expect("timers ok")
    machine.expect("timers ok")
    assert b"FAIL" not in machine.serial
    assert machine.stderr() == ""
    clock = int(clocks.read_text().split()[0])
    # What the guest finds: on the same boot its clock went on while nobody ran it.
    expected = saved.clock + (before - saved.boottime if change is same_boot else 0)
    assert expected <= clock < expected + (20 * 10**9 if change is same_boot else 10**9)
