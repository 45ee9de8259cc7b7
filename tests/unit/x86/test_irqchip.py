"""When KVM is made to look for an interrupt that it forgot."""

from types import SimpleNamespace

import pytest

from pyvmm.core import runstate
from pyvmm.core.eventloop import Timer
from pyvmm.core.runstate import RunState
from pyvmm.x86.irqchip import PIC_WATCH_FIRST_S, PIC_WATCH_LAST_S, PicWatch

TIMER, KEYBOARD = 1 << 0, 1 << 1
MASKED = 1 << 16


class Loop:
    """A main loop whose timers come when a test wants them."""

    def __init__(self):
        self.timers = []

    def call_later(self, delay_s, callback):
        self.timers.append(Timer(delay_s, callback))
        return self.timers[-1]

    def fire(self):
        """Let the only timer come; its delay."""
        (timer,) = (timer for timer in self.timers if timer.callback)
        self.timers.clear()
        timer.callback()
        return timer.due

    @property
    def waits(self):
        return any(timer.callback for timer in self.timers)


class Vm:
    """Interrupt controllers after power-on."""

    def __init__(self):
        self.pic = SimpleNamespace(irr=0, imr=0, isr=0)
        self.ioapic = SimpleNamespace(redirtbl=[MASKED] * 24)

    def get_irqchip(self, chip):
        assert chip in ("KVM_IRQCHIP_PIC_MASTER", "KVM_IRQCHIP_IOAPIC")
        return SimpleNamespace(chip=self)


class Watched:
    def __init__(self):
        self.loop, self.vm = Loop(), Vm()
        self.runstate = RunState(runstate.RUNNING)
        self.rechecks = 0
        self.watch = PicWatch(self.loop, self.runstate, self.vm, self.recheck)
        self.watch.start()

    def recheck(self):
        self.rechecks += 1

    def look(self, irr, imr=0):
        """Requests and masks when the PIC is looked at; whether KVM was made to look too."""
        self.vm.pic.irr, self.vm.pic.imr = irr, imr
        before = self.rechecks
        self.loop.fire()
        return self.rechecks > before


@pytest.fixture
def guest():
    return Watched()


def test_request_that_stays(guest):
    assert [guest.look(TIMER) for _ in range(4)] == [False, True, True, True]


def test_request_that_is_taken_in_between(guest):
    looks = [guest.look(irr) for irr in (TIMER, 0, TIMER, KEYBOARD, TIMER, 0)]
    assert not any(looks)


def test_masked_request_is_none(guest):
    looks = [guest.look(TIMER, imr=TIMER), guest.look(TIMER, imr=TIMER), guest.look(TIMER)]
    assert not any(looks)


def test_looks_are_seldom_in_the_end(guest):
    delays = [guest.loop.fire() for _ in range(20)]
    assert delays == sorted(delays)
    assert (delays[0], delays[-1]) == (PIC_WATCH_FIRST_S, PIC_WATCH_LAST_S)


def test_guest_that_has_masked_the_pic_and_uses_nothing_yet(guest):
    """Linux does that for a while early in its boot, and unmasks the timer later."""
    assert not guest.look(TIMER, imr=0xFF)
    assert not guest.look(TIMER)
    assert guest.look(TIMER)


def test_guest_that_uses_the_ioapic_is_left_alone(guest):
    guest.vm.ioapic.redirtbl[16] = 0x31
    assert not guest.look(TIMER, imr=0xFE)
    assert not guest.look(TIMER, imr=0xFF)
    assert not guest.loop.waits


def test_paused_guest_is_left_alone_until_it_goes_on(guest):
    guest.look(TIMER)
    guest.runstate.set(runstate.PAUSED)
    assert not guest.look(TIMER)
    assert not guest.loop.waits
    guest.runstate.set(runstate.RUNNING)
    guest.watch.start()
    assert not guest.look(TIMER)
    assert guest.look(TIMER)


def test_start_after_start_keeps_one_timer(guest):
    """A reset stops and starts the vCPUs while the guest is said to run."""
    guest.look(TIMER)
    guest.watch.start()
    assert guest.loop.fire() == PIC_WATCH_FIRST_S
