"""The interrupt controllers and the timer that KVM emulates, and the guest's clock; and help for
interrupts that KVM forgets.

Their state goes under QEMU's section and field names, since it maps one to one. What the PIT
counts once goes on where it is when it is loaded; a count that repeats starts anew: KVM offers no
way to go on in the middle of one.
"""

from __future__ import annotations

import time

from pyvmm._native import ffi, lib
from pyvmm.vmstate.fields import (
    Array,
    Description,
    Record,
    StructArray,
    each,
    i32,
    i64,
    u8,
    u16,
    u32,
    u64,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from pyvmm.core.eventloop import EventLoop, Timer
    from pyvmm.core.runstate import RunState
    from pyvmm.kvm.vm import Vm

# Which inputs of each PIC may be level-triggered: not the timer, keyboard, cascade, RTC and
# FPU lines. QEMU's description has no field for it, because it never changes.
ELCR_MASK = {"KVM_IRQCHIP_PIC_MASTER": 0xF8, "KVM_IRQCHIP_PIC_SLAVE": 0xDE}

PIT_GSI = 0

# How close kvmclock comes to where it was, and how often that is tried.
CLOCK_PRECISION_NS = 200
CLOCK_TRIES = 5
MAX_CLOCK_NS = 1 << 62  # 146 years; of two the sum and the difference are numbers of 64 bits

# How long after the guest's start the PIC is looked at first, and how seldom in the end.
PIC_WATCH_FIRST_S = 0.1
PIC_WATCH_LAST_S = 1.0

ALL_INPUTS = 0xFF
IOAPIC_MASKED = 1 << 16

_PIC_NAMES = (
    "last_irr irr imr isr priority_add irq_base read_reg_select poll special_mask init_state "
    "auto_eoi rotate_on_auto_eoi special_fully_nested_mode init4"
)
I8259 = Description("i8259", each(u8, f"{_PIC_NAMES} single_mode elcr"))
IOAPIC = Description(
    "ioapic",
    [u8("id"), u8("ioregsel"), u64("base_address"), u32("irr"), Array("ioredtbl", "uint64", 24)],
    version=3,
)
_PIT_BYTES = (
    "count_latched status_latched status read_state write_state write_latch rw_mode mode bcd gate"
)
_PIT_CHANNEL = Description(
    "pit channel",
    [
        i32("count"),
        u16("latched_count"),
        *each(u8, _PIT_BYTES),
        i64("count_load_time"),
        i64("next_transition_time"),
    ],
)


def _check_pit(state: Record) -> None:
    for number, channel in enumerate(state.channels):
        # A count of 0 means 0x10000 to the counter, and KVM would divide by it.
        if not 0 <= channel.count <= 0x10000:
            raise ValueError(f"channel {number} cannot count {channel.count}")
        # KVM's power-on mode is 0xff: none was chosen yet.
        if (channel.mode > 7 and channel.mode != 0xFF) or channel.rw_mode > 4:
            raise ValueError(f"channel {number} has no mode {channel.mode}/{channel.rw_mode}")


I8254 = Description(
    "i8254",
    [
        u32("irq_disabled"),
        StructArray("channels", _PIT_CHANNEL, 3),
        i64("next_transition_time"),
    ],
    version=3,
    check=_check_pit,
)


def _check_clock(state: Record) -> None:
    for name in ("clock", "boottime"):
        if getattr(state, name, 0) > MAX_CLOCK_NS:
            raise ValueError(f"{name} {getattr(state, name)} is later than any clock shows")


KVMCLOCK = Description(
    "kvmclock",
    [u64("clock")],
    check=_check_clock,
    subsections=[
        # Linux's CLOCK_BOOTTIME when the clock was read, ns: the guest's clock goes on with
        # it through an update on the same host.
        Description(
            "kvmclock/boottime",
            [u64("boottime")],
            needed=lambda state: state.boottime,
            check=_check_clock,
        ),
    ],
)


def save_pic(vm: Vm, chip: str) -> Record:
    """Return the state of one PIC, as :data:`I8259` describes it."""
    pic = vm.get_irqchip(chip).chip.pic
    return Record(
        elcr=pic.elcr, single_mode=0, **{name: getattr(pic, name) for name in _PIC_NAMES.split()}
    )


def load_pic(vm: Vm, chip: str, state: Record) -> None:
    """Give a PIC its state."""
    raw = _chip(chip)
    for name in (*_PIC_NAMES.split(), "elcr"):
        setattr(raw.chip.pic, name, getattr(state, name))
    raw.chip.pic.elcr_mask = ELCR_MASK[chip]
    vm.set_irqchip(raw)


def save_ioapic(vm: Vm) -> Record:
    """Return the state of the IOAPIC, as :data:`IOAPIC` describes it."""
    ioapic = vm.get_irqchip("KVM_IRQCHIP_IOAPIC").chip.ioapic
    return Record(
        id=ioapic.id & 0xFF,
        ioregsel=ioapic.ioregsel & 0xFF,
        base_address=ioapic.base_address,
        irr=ioapic.irr,
        ioredtbl=list(ioapic.redirtbl),
    )


def load_ioapic(vm: Vm, state: Record) -> None:
    """Give the IOAPIC its state."""
    raw = _chip("KVM_IRQCHIP_IOAPIC")
    ioapic = raw.chip.ioapic
    ioapic.id = state.id
    ioapic.ioregsel = state.ioregsel
    ioapic.base_address = state.base_address
    ioapic.irr = state.irr
    ioapic.redirtbl = state.ioredtbl
    vm.set_irqchip(raw)


def save_pit(vm: Vm) -> Record:
    """Return the state of the PIT, as :data:`I8254` describes it."""
    pit = vm.get_pit2()
    channels = [
        Record(
            next_transition_time=0,
            **{
                name: getattr(channel, name)
                for name in ("count", "latched_count", "count_load_time", *_PIT_BYTES.split())
            },
        )
        for channel in pit.channels
    ]
    # The one flag that KVM has: the HPET, which pyvmm lacks, took the PIT's interrupt over.
    return Record(irq_disabled=pit.flags, channels=channels, next_transition_time=0)


def load_pit(vm: Vm, state: Record) -> None:
    """Give the PIT its state, after the PICs and the IOAPIC got theirs."""
    # KVM pulses the PIT's line on a thread of its own, so the state of PIC and IOAPIC may have
    # been read while it was high. The next pulse would then be no edge, nobody would handle and
    # acknowledge it, and KVM, which waits for that, would never pulse again.
    vm.irq_line(PIT_GSI, False)
    pit = ffi.new("struct kvm_pit_state2 *")
    pit.flags = state.irq_disabled
    for raw, channel in zip(pit.channels, state.channels, strict=True):
        for name in ("count", "latched_count", "count_load_time", *_PIT_BYTES.split()):
            setattr(raw, name, getattr(channel, name))
    lib.pyvmm_age_pit(pit)
    vm.set_pit2(pit)


def save_clock(vm: Vm) -> Record:
    """Return kvmclock, and what the host's boot clock said when kvmclock was read."""
    clock, boottime = _read_clocks(vm)
    return Record(clock=clock, boottime=boottime)


def load_clock(vm: Vm, state: Record) -> None:
    """Let kvmclock go on: at its distance from the host's boot clock, if the state tells;
    else from where it was.

    Between reading the one clock and setting the other some time passes, so the result is
    measured and set again: or each update would shift the guest's clock by microseconds.
    """
    saved = getattr(state, "boottime", 0)
    if not 0 < saved <= time.clock_gettime_ns(time.CLOCK_BOOTTIME):
        vm.set_clock(state.clock)
        return
    distance = state.clock - saved
    correction = 0
    for _ in range(CLOCK_TRIES):
        wanted = time.clock_gettime_ns(time.CLOCK_BOOTTIME) + distance - correction
        vm.set_clock(max(wanted, 0))
        clock, boottime = _read_clocks(vm)
        error = clock - boottime - distance
        if abs(error) < CLOCK_PRECISION_NS:
            break
        correction += error


def is_ahead(state: Record) -> bool:
    """Return whether the state's boot clock is one that this boot of the host has not reached."""
    return bool(getattr(state, "boottime", 0) > time.clock_gettime_ns(time.CLOCK_BOOTTIME))


def forget_boottime(state: Record) -> None:
    """Let kvmclock go on from where it was: the boot clock is another one."""
    state.boottime = 0


def _read_clocks(vm: Vm) -> tuple[int, int]:
    # Both at the same moment: of a few tries the one that took the least time.
    best = (1 << 63, 0, 0)
    for _ in range(3):
        before = time.clock_gettime_ns(time.CLOCK_BOOTTIME)
        clock = vm.get_clock()
        after = time.clock_gettime_ns(time.CLOCK_BOOTTIME)
        best = min(best, (after - before, clock, (before + after) // 2))
    return best[1], best[2]


def _chip(name: str) -> Any:
    raw = ffi.new("struct pyvmm_irqchip *")
    raw.chip_id = getattr(lib, name)
    return raw


class PicWatch:
    """Looks for requests of the PIC that KVM forgot, and has KVM look too. Main loop.

    KVM looks for an interrupt to deliver when the PIC's output rises, but only if a local APIC
    lets it through at that moment: its LINT0 is open, as ExtINT. When the guest opens LINT0
    after that, KVM does not look again (seen with Linux 6.1; later ones have the same code).
    The output is up and stays up, so no other request raises it either, and the PIT waits to
    be acknowledged: a guest that has no other clock stands still for good. Linux opens LINT0
    with the PIT running where it finds neither ACPI's tables nor an MP table.

    Nothing tells of that moment, so the PIC is looked at now and then, until the guest has
    turned to the IOAPIC.

    :param loop: has the timers
    :param runstate: a guest that does not run is not looked after
    :param vm: whose PIC it is
    :param recheck: has KVM look for an interrupt for the bootstrap processor, to which the
        PIC is connected
    """

    def __init__(
        self, loop: EventLoop, runstate: RunState, vm: Vm, recheck: Callable[[], None]
    ) -> None:
        self._loop = loop
        self._runstate = runstate
        self._vm = vm
        self._recheck = recheck
        self._timer: Timer | None = None
        self._delay = 0.0
        self._seen = 0

    def start(self) -> None:
        """The guest begins to run, or goes on."""
        if self._timer is not None:
            self._timer.cancel()
        self._seen = 0
        self._delay = PIC_WATCH_FIRST_S
        self._timer = self._loop.call_later(self._delay, self._look)

    def stop(self) -> None:
        """The VM is about to go."""
        if self._timer is not None:
            self._timer.cancel()

    def _look(self) -> None:
        self._timer = None
        if not self._runstate.running:
            return
        pic = self._vm.get_irqchip("KVM_IRQCHIP_PIC_MASTER").chip.pic
        if pic.imr == ALL_INPUTS and self._uses_ioapic():
            return
        # A processor takes a request at once, or soon; KVM may look once too often.
        requests = pic.irr & ~pic.imr
        if requests & self._seen:
            self._recheck()
        self._seen = requests
        self._delay = min(2 * self._delay, PIC_WATCH_LAST_S)
        self._timer = self._loop.call_later(self._delay, self._look)

    def _uses_ioapic(self) -> bool:
        ioapic = self._vm.get_irqchip("KVM_IRQCHIP_IOAPIC").chip.ioapic
        return any(not entry & IOAPIC_MASKED for entry in ioapic.redirtbl)
