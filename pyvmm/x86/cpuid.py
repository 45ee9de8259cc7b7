"""What the guest's CPUID says: all that KVM can offer on this host but virtualization of its
own, plus who the CPU is.

SDM volume 2, CPUID; KVM's own leaves are in Documentation/virt/kvm/x86/cpuid.rst.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from pyvmm.kvm.system import System

LEAF_FEATURES = 0x1
LEAF_AMD_FEATURES = 0x8000_0001
LEAF_TOPOLOGY = (0xB, 0x1F)
ECX_VMX = 1 << 5
ECX_SVM = 1 << 2
ECX_TSC_DEADLINE = 1 << 24
ECX_HYPERVISOR = 1 << 31
EDX_HTT = 1 << 28


def host_cpuid(system: System) -> Any:
    """All that this host offers, the same for every vCPU: a ``struct kvm_cpuid2``."""
    cpuid = system.get_supported_cpuid()
    # The in-kernel LAPIC has the deadline timer, but KVM leaves it to the caller to say so.
    deadline = bool(system.check_extension("KVM_CAP_TSC_DEADLINE_TIMER"))
    for entry in _entries(cpuid):
        if entry.function == LEAF_FEATURES:
            entry.ecx |= ECX_HYPERVISOR | (ECX_TSC_DEADLINE if deadline else 0)
            # What a guest's own guests are in the middle of is no part of the state: an update
            # would lose them.
            entry.ecx &= ~ECX_VMX
        elif entry.function == LEAF_AMD_FEATURES:
            entry.ecx &= ~ECX_SVM
    return cpuid


def set_identity(cpuid: Any, index: int, count: int) -> None:
    """Make ``cpuid`` that of vCPU ``index`` of ``count``: APIC id and number of CPUs.

    Each vCPU is a core of its own in one package.
    """
    for entry in _entries(cpuid):
        if entry.function == LEAF_FEATURES:
            # EBX: initial APIC id in bits 31-24, logical processors in bits 23-16.
            entry.ebx = (entry.ebx & 0xFFFF) | (index & 0xFF) << 24 | min(count, 255) << 16
            entry.edx = entry.edx | EDX_HTT if count > 1 else entry.edx & ~EDX_HTT
        elif entry.function in LEAF_TOPOLOGY:
            # EDX: x2APIC id, the same in every subleaf.
            entry.edx = index


def _entries(cpuid: Any) -> Any:
    return (cpuid.entries[i] for i in range(cpuid.nent))
