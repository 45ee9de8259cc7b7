"""A hundred updates in a row under each kind of guest: it must notice nothing, and pyvmm must
not grow. The guests check themselves and say FAIL. ``PYVMM_SOAK_UPDATES=1000``: as many of each."""

import os
import re

import pytest
from harness import guests

UPDATES = int(os.environ.get("PYVMM_SOAK_UPDATES", "100"))
MEMORY_TOLERANCE_KIB = 512


def numbers(machine, name):
    """The numbers of the guest's progress lines; real-mode images write them in hex."""
    base = 16 if name in guests.REAL else 10
    # Complete lines only: of the last one the guest may be in the middle.
    text = machine.serial[: machine.serial.rfind(b"\n") + 1].decode()
    found = re.findall(rf"^{name}(?: pass)? ([0-9a-f]+)(?: ok| tsc=.*)?\r?\n", text, re.M)
    return [int(number, base) for number in found]


def soak(machine, name, updates=UPDATES):
    """Update again and again; compare what pyvmm holds after the first and the last."""
    machine.expect(rf"{name}(?: pass)? [0-9a-f]+\b.*\n")
    fds, threads = machine.footprint()
    machine.update()
    assert machine.footprint() == (fds, threads)
    before = machine.memory_kib("Anonymous")
    for number in range(1, updates):
        machine.update()
        assert b"FAIL" not in machine.serial
        if number % 20 == 0:
            machine.expect(rf"{name}(?: pass)? [0-9a-f]+\b.*\n")
    assert machine.footprint() == (fds, threads)
    assert abs(machine.memory_kib("Anonymous") - before) <= MEMORY_TOLERANCE_KIB
    machine.seen = len(machine.serial)
    machine.expect(rf"{name}(?: pass)? [0-9a-f]+\b.*\n")
    assert b"FAIL" not in machine.serial
    assert machine.status == "running"
    assert machine.stderr() == ""
    shown = numbers(machine, name)
    if name == "torture":  # counts what the slowest CPU did, which may be two rounds at once
        assert shown == sorted(set(shown))
    else:
        step = shown[0]
        assert shown == list(range(step, shown[-1] + step, step))


@pytest.mark.slow
@pytest.mark.parametrize("smp", [1, 2])
@pytest.mark.parametrize("program", ["memhash mb=16", "torture"])
def test_long_mode(vm, program, smp):
    soak(vm(append=program, smp=smp), program.split()[0])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("program", "updates"),
    [
        ("halt period=50", UPDATES),
        ("halt period=50 timer=pit irq=ioapic", 20),
        ("timers period=100", 20),
    ],
)
def test_halted(vm, program, updates):
    soak(vm(append=program), program.split()[0].replace("timers", "timers ok"), updates)


@pytest.mark.slow
@pytest.mark.parametrize("smp", [1, 2])
def test_port_io(vm, smp):
    soak(vm(append="piospin", smp=smp), "piospin")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "updates"),
    [("real-ticker", UPDATES), ("real-halt", 20), ("real-pio", 20), ("real-rtc", 20)],
)
def test_real_mode(vm, name, updates):
    soak(vm("-kernel", guests.image(f"{name}.bin")), name, updates)


@pytest.mark.slow
@pytest.mark.parametrize("program", ["timers period=100", "pingpong"])
def test_two_vcpus_wake_each_other(vm, program):
    name = program.split()[0].replace("timers", "timers ok")
    soak(vm(append=program, smp=2), name, updates=20)
