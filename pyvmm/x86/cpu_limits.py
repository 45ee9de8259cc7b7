"""What a guest's CPUs may have: only what a vCPU's state has room for. What KVM offers besides is
not shown to the guest, or an update would lose it.

Registers that XSAVE saves come as components, and those that are not known here are not offered,
whatever they are: a later KVM may offer some that need more than XSAVE to be carried. Of the
other features those are named that have a state of their own which no image carries.
docs/cpu-state.md has the whole table.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from pyvmm.kvm.system import System

    Entries = dict[tuple[int, int], Any]

XSAVE = 0xD

#: Components of XCR0 (SDM volume 1, 13.1) that KVM_GET_XSAVE2 gives whole: x87, SSE, AVX, the two
#: of MPX, the three of AVX-512, PKRU, the two of AMX.
COMPONENTS = 0b1111_1111 | 1 << 9 | 1 << 17 | 1 << 18
#: Those of IA32_XSS, which is a guest's own affair: the registers are MSRs, those of processor
#: trace and of CET.
SUPERVISOR_COMPONENTS = 1 << 8 | 1 << 11 | 1 << 12

SHSTK = 1 << 7  # in leaf 7 ECX
IBT = 1 << 20  # in leaf 7 EDX
MSR_U_CET = 0x6A0

#: (leaf, subleaf) -> registers and bits: state that is in no vCPU's state.
UNCARRIED = {
    # VMX: the guest's own guests.
    (0x1, 0): (("ecx", 1 << 5),),
    (0x7, 0): (
        # SGX: enclaves, whose memory nobody else can read.
        ("ebx", 1 << 2),
        # ENQCMD: IA32_PASID. SGX launch control. PKS: IA32_PKRS.
        ("ecx", 1 << 29 | 1 << 30 | 1 << 31),
        # SGX-KEYS; user interrupts, whose registers and posted descriptors KVM would have to
        # know; architectural last branch records.
        ("edx", 1 << 1 | 1 << 5 | 1 << 19),
    ),
    # FRED: its events are more than kvm_vcpu_events tells. HRESET: the history it resets.
    # In EDX: user MSRs; APX, the registers r16 to r31.
    (0x7, 1): (("eax", 1 << 17 | 1 << 22), ("edx", 1 << 15 | 1 << 21)),
    # SVM: the guest's own guests. IBS and LWP: sampling.
    (0x80000001, 0): (("ecx", 1 << 2 | 1 << 10 | 1 << 15),),
}
#: Leaves that describe them: SGX, last branch records, APX.
UNCARRIED_LEAVES = (0x12, 0x1C, 0x29)

#: Component -> the features that make no sense without it, and leaves that describe them. KVM
#: offers AMX also to a process that has not asked the kernel for the permission to use it, which
#: is what the components tell.
NEEDED = {
    9: (((0x7, 0, "ecx", 1 << 3),), ()),
    18: (
        (
            (0x7, 0, "edx", 1 << 22 | 1 << 24 | 1 << 25),
            (0x7, 1, "eax", 1 << 21),
            (0x7, 1, "edx", 1 << 8),
        ),
        (0x1D, 0x1E),
    ),
}


def limit(entries: Entries, system: System) -> set[tuple[int, int]]:
    """Take away what is not carried.

    :param entries: CPUID by leaf and subleaf; changed
    :returns: the leaves and subleaves to be removed
    """
    for key, changes in UNCARRIED.items():
        if key in entries:
            for register, bits in changes:
                _clear(entries[key], register, bits)
    features = entries.get((0x7, 0))
    if features is not None and (features.ecx & SHSTK or features.edx & IBT):
        listed = MSR_U_CET in system.msr_indices
        # The shadow stack's pointer is no MSR, and KVM_GET_ONE_REG the only way to it.
        if not (listed and system.check_extension("KVM_CAP_ONE_REG")):
            _clear(features, "ecx", SHSTK)
        if not listed:
            _clear(features, "edx", IBT)
    removed = limit_components(entries, COMPONENTS, SUPERVISOR_COMPONENTS)
    leaves = set(UNCARRIED_LEAVES)
    for component, (needing, described) in NEEDED.items():
        if (XSAVE, 0) in entries and not entries[XSAVE, 0].eax >> component & 1:
            leaves.update(described)
            for leaf, subleaf, register, bits in needing:
                if (leaf, subleaf) in entries:
                    _clear(entries[leaf, subleaf], register, bits)
    return removed | {key for key in entries if key[0] in leaves}


def limit_components(entries: Entries, user: int, supervisor: int) -> set[tuple[int, int]]:
    """Offer no other components of XSAVE than those in the two masks; return the keys of the
    subleaves of leaf 0xd to be removed."""
    if (XSAVE, 0) not in entries:
        return set()
    main = entries[XSAVE, 0]
    # EDX:EAX are the components that XCR0 may have, of subleaf 1 EDX:ECX those of IA32_XSS.
    user_left = (main.edx << 32 | main.eax) & user
    supervisor_left = 0
    if (XSAVE, 1) in entries:
        second = entries[XSAVE, 1]
        supervisor_left = (second.edx << 32 | second.ecx) & supervisor
        second.ecx, second.edx = supervisor_left & 0xFFFFFFFF, supervisor_left >> 32
    if user_left != main.edx << 32 | main.eax:
        main.eax, main.edx = user_left & 0xFFFFFFFF, user_left >> 32
        # ECX is the size of them all: the subleaf of each has its size and offset.
        left = [
            entries[XSAVE, bit]
            for bit in range(2, 64)
            if user_left >> bit & 1 and (XSAVE, bit) in entries
        ]
        main.ecx = max([576, *(each.eax + each.ebx for each in left)])
    left_over = user_left | supervisor_left
    return {
        key for key in entries if key[0] == XSAVE and key[1] > 1 and not left_over >> key[1] & 1
    }


def _clear(entry: Any, register: str, bits: int) -> None:
    setattr(entry, register, getattr(entry, register) & ~bits)
