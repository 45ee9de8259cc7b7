"""What the guest's CPUID says: all that KVM can offer on this host but what a state has no room
for and what ``-cpu`` takes away, how the CPUs lie together, and which of them this is.

SDM volume 2, CPUID; AMD's leaves are in APM volume 3, appendix E; KVM's own leaves in
Documentation/virt/kvm/x86/cpuid.rst.
"""

from __future__ import annotations

from pyvmm.errors import ConfigError
from pyvmm.x86 import cpu_limits

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from typing import Any

    from pyvmm.kvm.system import System

VENDOR = 0x0
FEATURES = 0x1
CACHES = 0x4
TOPOLOGY = (0xB, 0x1F)
KVM_BASE = 0x40000000
KVM_TIMING = 0x40000010
AMD_FEATURES = 0x80000001
AMD_SIZES = 0x80000008
AMD_CACHES = 0x8000001D
AMD_TOPOLOGY = 0x8000001E

ECX_TSC_DEADLINE = 1 << 24
ECX_HYPERVISOR = 1 << 31
EDX_HTT = 1 << 28
AMD_CMP_LEGACY = 1 << 1
#: Bits of leaf 1 EDX that AMD repeats in leaf 0x80000001.
AMD_REPEATED = 0x0183F3FF
_AMD_VENDORS = (b"Auth", b"Hygo")

_SUBLEAVES_COUNT = 1  # KVM_CPUID_FLAG_SIGNIFCANT_INDEX
_APIC_BUS_KHZ = 1_000_000  # of KVM's LAPIC timer


class Topology:
    """How the CPUs lie together: threads in cores in sockets. APIC ids are 0, 1, 2, ... all
    the same, so numbers of threads (of cores in several sockets) must be powers of two.

    :raises ValueError: they are not
    """

    __slots__ = ("cores", "sockets", "threads")

    def __init__(self, sockets: int, cores: int, threads: int) -> None:
        self.sockets = sockets
        self.cores = cores
        self.threads = threads
        for what, count, several in (
            ("threads", threads, sockets * cores > 1),
            ("cores", cores, sockets > 1),
        ):
            if several and count & count - 1:
                raise ValueError(f"{what}={count} is no power of two")

    @property
    def per_socket(self) -> int:
        """CPUs in a socket."""
        return self.cores * self.threads

    @property
    def count(self) -> int:
        """CPUs in all."""
        return self.sockets * self.per_socket

    @property
    def thread_bits(self) -> int:
        """Width of the APIC id's part that tells a core's threads apart."""
        return (self.threads - 1).bit_length()

    @property
    def socket_shift(self) -> int:
        """Width of the APIC id's part that tells a socket's CPUs apart."""
        return (self.cores - 1).bit_length() + self.thread_bits

    def __str__(self) -> str:
        if self.sockets == self.threads == 1:
            return str(self.count)
        return f"{self.count},sockets={self.sockets},cores={self.cores},threads={self.threads}"


def host_cpuid(
    system: System, topology: Topology, changes: Mapping[str, bool], tsc_khz: int = 0
) -> Any:
    """Return what all vCPUs have in common: a ``struct kvm_cpuid2``.

    :param changes: features that ``-cpu`` wants or does not want
    :param tsc_khz: frequency of the TSC, if it is known
    :raises ConfigError: a feature that is wanted cannot be had
    """
    cpuid = system.get_supported_cpuid()
    # The in-kernel LAPIC has the deadline timer, but KVM leaves it to the caller to say so.
    deadline = bool(system.check_extension("KVM_CAP_TSC_DEADLINE_TIMER"))
    entries = _by_leaf(cpuid)
    entries[FEATURES, 0].ecx |= ECX_HYPERVISOR | (ECX_TSC_DEADLINE if deadline else 0)
    if tsc_khz and (KVM_BASE, 0) in entries:
        entries[KVM_BASE, 0].eax = KVM_TIMING  # the last leaf
    unwanted = cpu_limits.limit(entries, system)
    if unwanted:
        _remove(cpuid, lambda entry: (entry.function, entry.index) in unwanted)
    if tsc_khz:
        _append(cpuid, KVM_TIMING, eax=tsc_khz, ebx=_APIC_BUS_KHZ)
    if changes:
        _change(cpuid, changes)
    _set_topology(cpuid, topology)
    return cpuid


def identity(cpuid: Any, topology: Topology) -> Callable[[int], None]:
    """Return a function that makes ``cpuid`` that of one vCPU. Call it for one vCPU after the
    other, with the vCPU's number, which is its APIC id too."""
    leaves = (FEATURES, *TOPOLOGY, AMD_TOPOLOGY)
    places = [at for at in range(cpuid.nent) if cpuid.entries[at].function in leaves]

    def set_identity(index: int) -> None:
        for at in places:
            entry = cpuid.entries[at]
            if entry.function == FEATURES:
                entry.ebx = entry.ebx & 0x00FF_FFFF | (index & 0xFF) << 24
            elif entry.function in TOPOLOGY:
                entry.edx = index
            else:
                core = (index & (1 << topology.socket_shift) - 1) >> topology.thread_bits
                socket = index >> topology.socket_shift
                entry.eax = index
                entry.ebx = topology.threads - 1 << 8 | core
                entry.ecx = topology.sockets - 1 << 8 & 0x700 | socket & 0xFF

    return set_identity


def _set_topology(cpuid: Any, topology: Topology) -> None:
    # KVM shows the host's numbers in some of these leaves, or nothing.
    count, last = topology.per_socket, 0
    is_amd = False
    for entry in _entries(cpuid):
        if entry.function == VENDOR:
            last = entry.eax
            is_amd = entry.ebx.to_bytes(4, "little") in _AMD_VENDORS
        elif entry.function == FEATURES:
            entry.ebx = entry.ebx & 0xFF00_FFFF | min(count, 255) << 16
            entry.edx = entry.edx | EDX_HTT if count > 1 else entry.edx & ~EDX_HTT
        elif entry.function in (CACHES, AMD_CACHES) and entry.eax & 0x1F:
            # Ids of the CPUs that share it, less one: a core's for levels 1 and 2.
            level = entry.eax >> 5 & 7
            sharing = topology.thread_bits if level < 3 else topology.socket_shift
            entry.eax = entry.eax & 0x3FFF | (1 << sharing) - 1 << 14
            if entry.function == CACHES:
                cores = 1 << topology.socket_shift - topology.thread_bits
                entry.eax |= min(cores - 1, 63) << 26
        elif entry.function == AMD_FEATURES and is_amd:
            legacy = AMD_CMP_LEGACY if count > 1 else 0
            entry.ecx = entry.ecx & ~AMD_CMP_LEGACY | legacy
        elif entry.function == AMD_SIZES and is_amd:
            entry.ecx = topology.socket_shift << 12 | count - 1
    _remove(cpuid, lambda entry: entry.function in TOPOLOGY)
    for leaf in TOPOLOGY:
        if leaf <= last:
            # ECX: type of the level (1 threads, 2 cores, 0 none) and its number.
            bits = (topology.thread_bits, topology.socket_shift)
            _append(cpuid, leaf, 0, eax=bits[0], ebx=topology.threads, ecx=0x100)
            _append(cpuid, leaf, 1, eax=bits[1], ebx=count, ecx=0x201)
            _append(cpuid, leaf, 2, ecx=2)


def _change(cpuid: Any, changes: Mapping[str, bool]) -> None:
    from pyvmm.x86 import cpu_features as names

    entries = _by_leaf(cpuid)
    lacking = []
    for name, wanted in changes.items():
        for leaf, subleaf, register, mask in names.find(name) if wanted else ():
            entry = entries.get((leaf, subleaf))
            if entry is not None and name in names.HINTS:
                setattr(entry, register, getattr(entry, register) | mask)
            elif entry is None or not getattr(entry, register) & mask:
                lacking.append(name)
    if lacking:
        raise ConfigError(f"-cpu: {', '.join(lacking)} cannot be had on this host; leave it out")
    unwanted = names.without_dependents([name for name in changes if not changes[name]])
    for name in unwanted:
        for leaf, subleaf, register, mask in names.find(name):
            if (leaf, subleaf) in entries:
                entry = entries[leaf, subleaf]
                setattr(entry, register, getattr(entry, register) & ~mask)
    if AMD_FEATURES in (leaf for leaf, _ in entries):
        # AMD says these once more; elsewhere they are 0 there.
        repeated = entries[AMD_FEATURES, 0]
        repeated.edx &= ~AMD_REPEATED | entries[FEATURES, 0].edx
    hidden = [leaf for name in unwanted for leaf in names.GROUPS.get(name, ())]
    gone = sum(1 << bit for name in unwanted for bit in names.COMPONENTS.get(name, ()))
    if {"shstk", "ibt"} <= set(unwanted):
        gone |= names.CET_COMPONENTS
    if "xsave" in unwanted:
        hidden.append(cpu_limits.XSAVE)
    subleaves = cpu_limits.limit_components(entries, ~gone, ~gone) if gone else set()
    _remove(
        cpuid,
        lambda entry: entry.function in hidden or (entry.function, entry.index) in subleaves,
    )


def _append(cpuid: Any, function: int, index: int | None = None, **registers: int) -> None:
    entry = cpuid.entries[cpuid.nent]
    entry.function = function
    entry.index = index or 0
    entry.flags = 0 if index is None else _SUBLEAVES_COUNT
    for register in ("eax", "ebx", "ecx", "edx"):
        setattr(entry, register, registers.get(register, 0))
    cpuid.nent += 1


def _remove(cpuid: Any, unwanted: Any) -> None:
    kept = 0
    for at in range(cpuid.nent):
        if not unwanted(cpuid.entries[at]):
            if kept != at:
                cpuid.entries[kept] = cpuid.entries[at]
            kept += 1
    cpuid.nent = kept


def _by_leaf(cpuid: Any) -> dict[tuple[int, int], Any]:
    return {(entry.function, entry.index): entry for entry in _entries(cpuid)}


def _entries(cpuid: Any) -> Iterator[Any]:
    return (cpuid.entries[i] for i in range(cpuid.nent))
