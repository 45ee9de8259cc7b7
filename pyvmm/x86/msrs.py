"""Which model-specific registers are a vCPU's state. docs/cpu-state.md tells of each what KVM
does when it is written.

KVM_GET_MSR_INDEX_LIST is a list for any VMM: it has registers that do something when they are
written back, and those of interfaces that are not offered here; and it lacks some that a guest
can write.
"""

from __future__ import annotations

from pyvmm.kvm.vcpu import MsrBlock

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

    from pyvmm.kvm.vcpu import Vcpu

TSC = 0x10
PERF_CAPABILITIES = 0x345
TSC_DEADLINE = 0x6E0
MTRR_DEF_TYPE = 0x2FF
DE_CFG = 0xC0011029

#: A write makes KVM store the time at that address, once. By the time of an update the guest
#: may have put something else there.
WALL_CLOCK = (0x11, 0x4B564D00)
#: Acknowledges an interrupt, and holds nothing.
ASYNC_PF_ACK = 0x4B564D07
#: Hyper-V's, which KVM lists for all VMs: CPUID does not offer them, so no guest can write them.
#: Some make KVM write to guest memory.
HYPER_V = range(0x40000000, 0x40001000)
#: What VMX can do: a part of CPUID, and VMX is not offered.
VMX_FEATURES = range(0x480, 0x4C0)

#: What a guest can write and KVM keeps, without listing it everywhere (SDM volume 4, table 2-2,
#: and the APM's volume 2, appendix A): variable and fixed MTRRs and their default type; control,
#: status, address and further data of all machine-check banks; DEBUGCTL; and of AMD VM_CR,
#: OSVW and DE_CFG.
UNLISTED = (
    *(MTRR_DEF_TYPE, *range(0x200, 0x210), 0x250, 0x258, 0x259, *range(0x268, 0x270)),
    *range(0x400, 0x480),
    *(0x1D9, 0xC0010114, 0xC0010140, 0xC0010141, DE_CFG),
)
#: Of these most are 0, as in a new vCPU but for the default type: only others are written down.
SPARSE = frozenset(UNLISTED)
#: The last branches taken, which some kernels let nobody write: a loss that no program can tell
#: from another branch.
LAST_BRANCHES = range(0x1DB, 0x1DF)
#: PERF_CAPABILITIES: the format of branch records, which are in no state.
LBR_FORMAT = 0x3F
MTRR_ENABLE = 1 << 11
MTRR_WRITE_BACK = 6


def is_carried(index: int) -> bool:
    """Return whether a register is written back."""
    return not (
        index in WALL_CLOCK or index == ASYNC_PF_ACK or index in HYPER_V or index in VMX_FEATURES
    )


def carried(listed: Iterable[int]) -> list[int]:
    """Return what to read of a vCPU: of the registers that KVM lists those that are written back,
    and the unlisted ones."""
    return list(dict.fromkeys((*filter(is_carried, listed), *UNLISTED)))


def present(vcpu: Vcpu) -> MsrBlock:
    """Return those registers of :func:`carried` that a vCPU, whose CPUID is set, has."""
    return MsrBlock(list(vcpu.get_msrs(carried(vcpu.listed_msrs))))


def at_power_on(vcpu: Vcpu) -> dict[int, int]:
    """Return the values in which a vCPU, whose CPUID is set, differs from what KVM makes it."""
    # What firmware leaves: memory is cacheable wherever no range says otherwise.
    values = {MTRR_DEF_TYPE: MTRR_ENABLE | MTRR_WRITE_BACK}
    performance = vcpu.get_msrs((PERF_CAPABILITIES,)).get(PERF_CAPABILITIES, 0)
    if performance & LBR_FORMAT:
        # Branch records are in no state, so none are offered.
        values[PERF_CAPABILITIES] = performance & ~LBR_FORMAT
    return values
