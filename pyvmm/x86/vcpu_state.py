"""The complete state of a vCPU: in which order it is read and written, and why.

Reading needs all vCPUs out of KVM_RUN with their pending accesses complete. The description
follows the kernel's own structures field by field, under a section name of its own: QEMU's
``cpu`` layout has no place for all of it. In memory a state is these structures themselves,
as the ioctls give and take them: the more vCPUs, the longer the pause of an update.
"""

from __future__ import annotations

import struct

from pyvmm._native import ffi, lib
from pyvmm.errors import KvmError, MigrationError
from pyvmm.kvm.vcpu import REG_GUEST_SSP
from pyvmm.vmstate.fields import (
    Array,
    Buffer,
    CStruct,
    Description,
    Record,
    Struct,
    StructArray,
    Table,
    each,
    u8,
    u16,
    u32,
    u64,
)
from pyvmm.x86 import msrs
from pyvmm.x86.cpu_limits import SHSTK

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from pyvmm.kvm.vcpu import Vcpu

#: One part in so many may two frequencies of a TSC differ, and still be the same: KVM's own limit.
TSC_TOLERANCE = 4000

CR0_PG, CR4_PAE, EFER_LMA = 1 << 31, 1 << 5, 1 << 10

MAX_MSRS = 4096
MAX_XSAVE = 1 << 20
MAX_CPUID = 256

#: The register of the LAPIC's page that has its number, in the uppermost byte of four.
LAPIC_ID = 0x20

# What a reset leaves as it is.
_STAYING = (msrs.TSC, msrs.DE_CFG)
# Of these a 0 is not written down.
_SPARSE = msrs.SPARSE - {msrs.MTRR_DEF_TYPE}

_REGS = Description(
    "kvm_regs",
    each(u64, "rax rbx rcx rdx rsi rdi rsp rbp r8 r9 r10 r11 r12 r13 r14 r15 rip rflags"),
)
_SEGMENT = Description(
    "kvm_segment",
    [
        *(u64("base"), u32("limit"), u16("selector")),
        *each(u8, "type present dpl db s l g avl unusable"),
    ],
)
_DTABLE = Description("kvm_dtable", [u64("base"), u16("limit")])
_SREGS = Description(
    "kvm_sregs",
    [Struct(name, _SEGMENT) for name in ("cs", "ds", "es", "fs", "gs", "ss", "tr", "ldt")]
    + [Struct(name, _DTABLE) for name in ("gdt", "idt")]
    + each(u64, "cr0 cr2 cr3 cr4 cr8 efer apic_base")
    + [Array("interrupt_bitmap", "uint64", 4)],
)
_DEBUGREGS = Description("kvm_debugregs", [Array("db", "uint64", 4), u64("dr6"), u64("dr7")])
_XCR = Description("kvm_xcr", [u32("xcr"), u64("value")])
_XCRS = Description(
    "kvm_xcrs", [u32("nr_xcrs"), u32("flags"), StructArray("xcrs", _XCR, "nr_xcrs", 16)]
)
_EVENTS = Description(
    "kvm_vcpu_events",
    [
        Struct(
            "exception",
            Description(
                "exception",
                [*each(u8, "injected nr has_error_code pending"), u32("error_code")],
            ),
        ),
        Struct("interrupt", Description("interrupt", each(u8, "injected nr soft shadow"))),
        Struct("nmi", Description("nmi", each(u8, "injected pending masked"))),
        *each(u32, "sipi_vector flags"),
        Struct("smi", Description("smi", each(u8, "smm pending smm_inside_nmi latched_init"))),
        Struct("triple_fault", Description("triple_fault", [u8("pending")])),
        u8("exception_has_payload"),
        u64("exception_payload"),
    ],
)
_MSR = Description("kvm_msr_entry", [u32("index"), u64("data")])
_CPUID = Description("kvm_cpuid_entry2", each(u32, "function index flags eax ebx ecx edx"))

# How the kernel lays them out (asm/kvm.h); x is reserved.
_LAYOUTS = {
    "kvm_regs": "18Q",
    "kvm_sregs": 8 * "QIH9Bx" + 2 * "QH6x" + "7Q4Q",
    "kvm_debugregs": "4Q2Q80x",
    "kvm_vcpu_events": "4BI4B3Bx2I4BB26xBQ",
}
# Of each entry of struct kvm_cpuid2, which begins with their number.
_CPUID_ENTRY, _CPUID_HEAD = "7I12x", 8
_CPUID_WORDS, _EBX, _ECX, _EDX = 7, 4, 5, 6


def _kernel(name: str, description: Description) -> CStruct:
    type_name = f"struct {description.name} *"
    layout = _LAYOUTS[description.name]
    return CStruct(name, description, layout, lambda: ffi.new(type_name), ffi.buffer)


def _check(state: Record) -> None:
    if state.mp_state > lib.KVM_MP_STATE_SIPI_RECEIVED:
        raise ValueError(f"mp_state {state.mp_state} does not exist")
    if len(_msrs(state)) != state.nmsrs:
        raise ValueError("an MSR is there twice")


VCPU = Description(
    "kvm-vcpu",
    [
        u32("mp_state"),
        _kernel("regs", _REGS),
        _kernel("sregs", _SREGS),
        u32("xsave_size"),
        Buffer("xsave", "xsave_size", MAX_XSAVE),
        Struct("xcrs", _XCRS),
        _kernel("debugregs", _DEBUGREGS),
        Buffer("lapic", 1024),
        u32("nmsrs"),
        # Index, value, index, value, ...
        Table("msrs", _MSR, "nmsrs", MAX_MSRS),
        _kernel("events", _EVENTS),
        u32("tsc_khz"),
        u8("has_tsc_offset"),
        u64("tsc_offset"),
        u32("nent"),
        # Of each leaf seven words.
        Table("cpuid", _CPUID, "nent", MAX_CPUID),
    ],
    subsections=[
        # The four that PAE paging without long mode reads when CR3 is loaded, and not again.
        Description(
            "kvm-vcpu/pdptrs",
            [Array("pdptrs", "uint64", 4)],
            needed=lambda state: hasattr(state, "pdptrs"),
        ),
        # The shadow stack pointer, of the privilege level that the vCPU is in.
        Description(
            "kvm-vcpu/ssp", [u64("ssp")], needed=lambda state: bool(getattr(state, "ssp", 0))
        ),
    ],
    check=_check,
)


def read(vcpu: Vcpu) -> Record:
    """Return the state of a stopped vCPU, as :data:`VCPU` describes it."""
    state = Record()
    # First: reading it delivers a pending INIT or SIPI, which changes CS, RIP and the LAPIC.
    state.mp_state = vcpu.get_mp_state()
    state.regs = vcpu.get_regs()
    state.sregs = sregs = vcpu.get_sregs()
    if sregs.cr0 & CR0_PG and sregs.cr4 & CR4_PAE and not sregs.efer & EFER_LMA:
        pdptrs = vcpu.get_pdptrs()
        if pdptrs is not None:
            state.pdptrs = pdptrs
    state.xsave = vcpu.get_xsave()
    state.xsave_size = len(state.xsave)
    state.xcrs = vcpu.get_xcrs()
    state.debugregs = vcpu.get_debugregs()
    state.lapic = vcpu.get_lapic()
    block = vcpu.state_msrs or msrs.present(vcpu)
    values = vcpu.get_msr_block(block)
    _set_msrs(state, [(i, data) for i, data in values if data or i not in _SPARSE])
    # Last of the registers: the calls above may move an event from one place to another.
    state.events = events = vcpu.get_vcpu_events()
    # What the flags say follows from the fields, and images that know less refuse them; these
    # take an exception that waits for one that is being delivered.
    events.flags &= ~vcpu.event_flags
    events.exception.injected |= events.exception.pending
    state.tsc_khz = vcpu.get_tsc_khz()
    offset = vcpu.get_tsc_offset()
    state.has_tsc_offset = offset is not None
    state.tsc_offset = offset or 0
    state.cpuid = cpuid = _cpuid(vcpu)
    state.nent = len(cpuid) // _CPUID_WORDS
    if _has_shadow_stack(cpuid):
        state.ssp = vcpu.get_one_reg(REG_GUEST_SSP)
    return state


def carried_msrs(vcpu: Vcpu, has_tsc_offset: bool) -> tuple[list[int], list[int]]:
    """Return the MSRs that are read of each vCPU: those that always are, and those of which a 0 is
    as good as nothing; without the TSC where its offset says more. The vCPU may be running."""
    block = vcpu.state_msrs
    assert block is not None
    indices = [index for index in block.indices if index != msrs.TSC or not has_tsc_offset]
    return (
        [index for index in indices if index not in _SPARSE],
        [index for index in indices if index in _SPARSE],
    )


def adopt_cpuid(vcpu: Vcpu, entries: memoryview) -> None:
    """Give a vCPU that has not run yet the CPUID of one that runs, as the kernel lays it out
    (``struct kvm_cpuid_entry2``)."""
    count = len(entries) // struct.calcsize(_CPUID_ENTRY)
    words = struct.unpack(count * _CPUID_ENTRY, entries)
    if not _is_same(words, _cpuid(vcpu)):
        vcpu.set_cpuid2(_cpuid2(words))


def power_on(vcpus: list[Vcpu]) -> list[Record]:
    """Return what a reset gives back to each of a machine's vCPUs, which have not run yet.

    That is all but CPUID and a register that is a part of it, which cannot change any more, and the
    TSC, which goes on.

    Only the first, which boots, and the second are read: the others are as the second but for
    their numbers, which are in their LAPICs.
    """
    states = [read(vcpu) for vcpu in vcpus[:2]]
    for state in states:
        state.cpuid = ()
        state.nent = 0
        state.has_tsc_offset = False
        kept = [(i, data) for i, data in _msrs(state).items() if i not in _STAYING]
        _set_msrs(state, kept)
    for vcpu in vcpus[2:]:
        state = Record(**states[1].__dict__)
        head, tail = state.lapic[:LAPIC_ID], state.lapic[LAPIC_ID + 4 :]
        state.lapic = head + (vcpu.index << 24).to_bytes(4, "little") + tail
        states.append(state)
    return states


def reset(vcpu: Vcpu, state: Any) -> None:
    """Put a stopped vCPU back to what :func:`power_on` has given.

    :raises MigrationError: naming the vCPU and what KVM refuses
    """
    # For an address of 0 KVM writes no time.
    vcpu.set_msrs(dict.fromkeys((*vcpu.get_msrs(msrs.UNLISTED), *msrs.WALL_CLOCK), 0))
    write(vcpu, state)


def write(vcpu: Vcpu, state: Any) -> None:
    """Give ``state`` to a vCPU that has not run yet, or that is reset.

    :raises MigrationError: naming the vCPU and what KVM refuses
    """
    try:
        _write(vcpu, state)
    except KvmError as error:
        raise MigrationError(f"vCPU {vcpu.index} does not take its state: {error}") from error


def _write(vcpu: Vcpu, state: Any) -> None:
    # It decides which bits MSRs and XSAVE may have, so it comes first; and only if it is
    # another one, since KVM takes half a millisecond for it.
    if state.cpuid and not _is_same(state.cpuid, _cpuid(vcpu)):
        vcpu.set_cpuid2(_cpuid2(state.cpuid))
    vcpu.set_regs(state.regs)
    # Before the LAPIC: APIC_BASE selects xAPIC or x2APIC.
    if hasattr(state, "pdptrs"):
        vcpu.set_sregs_and_pdptrs(state.sregs, state.pdptrs)
    else:
        vcpu.set_sregs(state.sregs)
    vcpu.set_xcrs(_xcrs(state.xcrs))
    # What may be in it follows from CPUID, which is set by now.
    vcpu.set_xsave(state.xsave)
    vcpu.set_debugregs(state.debugregs)
    vcpu.set_lapic(state.lapic)
    _write_msrs(vcpu, state)
    if hasattr(state, "ssp"):
        vcpu.set_one_reg(REG_GUEST_SSP, state.ssp)
    # After SREGS, which makes a CPU in its reset state runnable. After REGS, which drops
    # pending exceptions. Events are the last word on the interrupt being injected.
    vcpu.set_mp_state(state.mp_state)
    events = state.events
    events.flags |= lib.KVM_VCPUEVENT_VALID_NMI_PENDING | vcpu.event_flags
    if state.mp_state == lib.KVM_MP_STATE_SIPI_RECEIVED:
        events.flags |= lib.KVM_VCPUEVENT_VALID_SIPI_VECTOR
    else:
        events.flags &= ~lib.KVM_VCPUEVENT_VALID_SIPI_VECTOR
    vcpu.set_vcpu_events(events)


def set_tsc_frequency(vcpu: Vcpu, state: Record, can_scale: bool) -> None:
    """Give a vCPU the TSC frequency that a state of another host, or another boot of this one,
    tells. A small difference is of the measurement that each boot makes.

    :param can_scale: whether the host can scale TSCs
    :raises MigrationError: it cannot, and the frequencies differ
    """
    own = vcpu.get_tsc_khz()
    if abs(state.tsc_khz - own) * TSC_TOLERANCE <= own or not state.tsc_khz:
        return
    try:
        if not can_scale:
            raise MigrationError("it cannot be scaled here")
        vcpu.set_tsc_khz(state.tsc_khz)
    except (KvmError, MigrationError) as error:
        raise MigrationError(
            f"vCPU {vcpu.index}: its TSC counts {state.tsc_khz} kHz, this host's {own} kHz: {error}"
        ) from None


def move_tsc_offsets(vcpu: Vcpu, states: list[Record]) -> None:
    """Change the offsets in all vCPUs' states so that their TSCs go on from now: those that the
    states tell are from the TSC of a host that has been started again.

    :param vcpu: the first one, of which the first state is
    """
    now, offset = vcpu.get_msrs((msrs.TSC,)).get(msrs.TSC), vcpu.get_tsc_offset()
    first = states[0]
    then = _msrs(first).get(msrs.TSC)
    if now is None or then is None or offset is None or not first.has_tsc_offset:
        return  # TSCs are given as values
    # By how much the host's TSC, scaled, is behind what it was.
    moved = (then - first.tsc_offset) - (now - offset)
    for state in states:
        state.tsc_offset = (state.tsc_offset + moved) % (1 << 64)


def _write_msrs(vcpu: Vcpu, state: Any) -> None:
    # Older images saved more than that.
    values = {index: data for index, data in _msrs(state).items() if msrs.is_carried(index)}
    # KVM drops a deadline in silence unless the LAPIC is in deadline mode already, and
    # compares it with the TSC: both come first.
    deadline = values.pop(msrs.TSC_DEADLINE, 0)
    if state.has_tsc_offset:
        # The offset is exact; writing the TSC itself would stop it for the update's length
        # and have KVM guess whether the CPUs' TSCs were meant to be equal.
        values.pop(msrs.TSC, None)
        vcpu.set_tsc_offset(state.tsc_offset)
    refused = vcpu.set_msrs(values)
    if deadline:
        vcpu.set_msrs({msrs.TSC_DEADLINE: deadline})
    if refused:
        # Some MSRs are read-only: they are as they should be or the state is impossible here.
        present = vcpu.get_msrs(refused)
        for index in refused:
            if present.get(index) != values[index] and index not in msrs.LAST_BRANCHES:
                raise MigrationError(
                    f"vCPU {vcpu.index}: KVM refuses MSR {index:#x} = {values[index]:#x}"
                )


def _msrs(state: Any) -> dict[int, int]:
    return dict(zip(state.msrs[::2], state.msrs[1::2], strict=True))


def _set_msrs(state: Record, values: list[tuple[int, int]]) -> None:
    state.msrs = tuple([word for pair in values for word in pair])
    state.nmsrs = len(values)


def _xcrs(state: Any) -> Any:
    # Of the structure, which has room for 16, a state has those that there are.
    made = ffi.new("struct kvm_xcrs *")
    made.nr_xcrs, made.flags = state.nr_xcrs, state.flags
    for number in range(state.nr_xcrs):
        made.xcrs[number].xcr = state.xcrs[number].xcr
        made.xcrs[number].value = state.xcrs[number].value
    return made


def _cpuid(vcpu: Vcpu) -> tuple[int, ...]:
    found = vcpu.get_cpuid2()
    return struct.unpack_from(found.nent * _CPUID_ENTRY, ffi.buffer(found), _CPUID_HEAD)


def _cpuid2(words: tuple[int, ...]) -> Any:
    count = len(words) // _CPUID_WORDS
    made = ffi.new("struct kvm_cpuid2 *", {"nent": count, "entries": count})
    struct.pack_into(count * _CPUID_ENTRY, ffi.buffer(made), _CPUID_HEAD, *words)
    return made


def _has_shadow_stack(words: tuple[int, ...]) -> bool:
    for number, function in enumerate(words[::_CPUID_WORDS]):
        at = number * _CPUID_WORDS
        if function == 7 and words[at + 1] == 0:
            return bool(words[at + _ECX] & SHSTK)
    return False


# Of a leaf the bits that KVM itself changes while the guest runs: they follow CR4 and
# APIC_BASE. In leaf 0xd the size of the enabled XSAVE area follows XCR0.
_RUNTIME_BITS = {
    0x1: ((_ECX, 1 << 27 | 1 << 3), (_EDX, 1 << 9)),  # OSXSAVE, MONITOR; APIC
    0x7: ((_ECX, 1 << 4),),  # OSPKE
    0xD: ((_EBX, 0xFFFFFFFF),),
}


def _is_same(one: tuple[int, ...], other: tuple[int, ...]) -> bool:
    return one == other or _fixed(one) == _fixed(other)


def _fixed(words: tuple[int, ...]) -> list[int]:
    fixed = list(words)
    for number, function in enumerate(words[::_CPUID_WORDS]):
        if function in _RUNTIME_BITS:
            for register, bits in _RUNTIME_BITS[function]:
                fixed[number * _CPUID_WORDS + register] &= ~bits
    return fixed
