"""The new image is attacked at its system calls, one after the other, until it has the guest: which
counts on in the old image.

PYVMM_RESCUE_STEPS says at how many of the calls, spread over all of them; 0: at each.
"""

import os
import signal

import pytest
from faults.attack import Attacker, kill_carrier, send, stick
from faults.rescue import (
    NAMED,
    QUICK,
    check_told_lost,
    check_whole,
    own_words,
    ram_inode,
)
from faults.tools import BACK, TICKER, check_ticking, faulty, send_update
from harness import Vm, wait_until
from harness import pyvmm as pyvmm_command

pytestmark = [pytest.mark.usefixtures("orphans"), pytest.mark.slow, pytest.mark.timeout(600)]

STEPS = int(os.environ.get("PYVMM_RESCUE_STEPS", "40"))
#: Of these the last, where the guest changes hands.
LAST = 12


def spread(count, number=STEPS, last=LAST):
    """So many of ``count`` calls, the first and the last ones among them."""
    if not number or number >= count:
        return [*range(count)]
    stride = (count - last) / (number - last)
    return [*(int(at * stride) for at in range(number - last)), *range(count - last, count)]


class Victim:
    """A VM under attack, whose guest counts; it is started again when it is lost."""

    def __init__(self, folder, smp=1, program=()):
        self._folder = folder
        self._smp = smp
        self._program = program or (pyvmm_command(), "run")
        self._number = 0
        self.machine = None

    def __enter__(self):
        self._number += 1
        folder = self._folder / str(self._number)
        folder.mkdir()
        self.attacker = Attacker(folder)
        program = self.attacker.program(*self._program)
        self.machine = Vm(folder, *NAMED, append=TICKER, smp=self._smp, program=program)
        self.machine.start().expect(r"tick 2\r\n")
        return self

    def __exit__(self, *_):
        # In this order: whoever still runs waits for answers.
        self.machine.close()
        self.attacker.close()

    def start_again(self):
        """Start another VM, since this one is lost."""
        self.__exit__()
        self.__enter__()

    def count(self):
        """How many calls a new image makes until the guest is its own."""
        self.attacker.attack(self.machine.pid)
        send_update(self.machine)
        assert self.machine.hmp_reply() == ""
        self.attacker.end()
        assert self.attacker.taken
        return len(self.attacker.calls)

    def update(self, at, harm):
        """Do harm to an update at a call; the call, or None if there are not as many this time."""
        self.attacker.attack(self.machine.pid, at, harm)
        send_update(self.machine)
        wait_until(lambda: self.attacker.failed or self.attacker.taken, f"call {at}")
        self.attacker.end()
        return self.attacker.failed

    def check_back(self, at, harm):
        """The guest counts on after harm at a call, and misses nothing. Whether there was harm."""
        machine, words = self.machine, own_words(self.machine)
        call = self.update(at, harm)
        print(f"{at}: {call}")
        if call:
            machine.follow()
            assert BACK in machine.hmp_reply()
            assert own_words(machine) == words
        else:
            assert machine.hmp_reply() == ""
        check_ticking(machine)
        return bool(call)


@pytest.mark.parametrize("part", range(2))
@pytest.mark.parametrize("smp", [1, 4])
def test_killed(tmp_path, smp, part):
    with Victim(tmp_path, smp) as victim:
        victim.count()
        count = victim.count()
        chosen = spread(count)[part::2]
        done = [victim.check_back(at, send(signal.SIGKILL)) for at in chosen]
        print(f"{sum(done)} of {len(chosen)} at {count} calls")
        assert sum(done) > len(chosen) / 2
        check_whole(victim.machine)


@pytest.mark.parametrize(
    "harm",
    [send(signal.SIGSEGV), send(signal.SIGSTOP), stick],
    ids=["segfault", "stop", "stick"],
)
def test_harmed(tmp_path, harm):
    with Victim(tmp_path, program=faulty(*QUICK)) as victim:
        count = victim.count()
        done = [victim.check_back(at, harm) for at in spread(count, 8, 4)]
        # The last calls may come when the guest is the new image's already.
        assert sum(done) >= 4
        check_whole(victim.machine)


def test_carrier_killed(tmp_path):
    """The guest is lost, and the VMM says so; or the new image has it already, by a hair."""
    lost = kept = 0
    with Victim(tmp_path, smp=2) as victim:
        for at in spread(victim.count(), 30, 24):
            machine, inode = victim.machine, ram_inode(victim.machine)
            call = victim.update(at, kill_carrier)
            wait_until(lambda machine=machine: machine.replied or machine.has_ended, "the end")
            print(f"{at}: {call} {machine.has_ended=}")
            if machine.has_ended:
                lost += 1
                check_told_lost(machine, inode)
                victim.start_again()
            else:
                kept += 1
                assert machine.hmp_reply() == ""
                check_ticking(machine)
        check_whole(victim.machine)
    print(f"{lost} lost, {kept} kept")
    assert lost > 5


@pytest.mark.parametrize("count", [5, 40, 500])
def test_spread(count):
    chosen = spread(count, 40, 12)
    assert chosen == sorted({*chosen})
    assert len(chosen) == min(count, 40)
    assert (chosen[0], chosen[-1]) == (0, count - 1)
