"""CPU features by QEMU's names, and ``-cpu host,+NAME,-NAME,NAME=on|off``.

Imported by machines whose ``-cpu`` names features; all others show the guest what KVM offers.
"""

from __future__ import annotations

from pyvmm._util.keyval import did_you_mean, parse_bool, shorten
from pyvmm.errors import ConfigError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

#: Names of the bits of (leaf, subleaf, register), from bit 0 on; ``-`` for those without.
WORDS = {
    (0x1, 0, "edx"): "fpu vme de pse tsc msr pae mce cx8 apic - sep mtrr pge mca cmov pat pse36 pn"
    " clflush - ds acpi mmx fxsr sse sse2 ss ht tm ia64 pbe",
    (0x1, 0, "ecx"): "pni pclmulqdq dtes64 monitor ds-cpl vmx smx est tm2 ssse3 cid - fma cx16 xtpr"
    " pdcm - pcid dca sse4.1 sse4.2 x2apic movbe popcnt tsc-deadline aes xsave - avx f16c rdrand"
    " hypervisor",
    (0x6, 0, "eax"): "- - arat",
    (0x7, 0, "ebx"): "fsgsbase tsc-adjust sgx bmi1 hle avx2 fdp-excptn-only smep bmi2 erms invpcid"
    " rtm - zero-fcs-fds mpx - avx512f avx512dq rdseed adx smap avx512ifma pcommit clflushopt clwb"
    " intel-pt avx512pf avx512er avx512cd sha-ni avx512bw avx512vl",
    (0x7, 0, "ecx"): "- avx512vbmi umip pku - waitpkg avx512vbmi2 shstk gfni vaes vpclmulqdq"
    " avx512vnni avx512bitalg - avx512-vpopcntdq - la57 - - - - - rdpid - bus-lock-detect cldemote"
    " - movdiri movdir64b - sgxlc pks",
    (0x7, 0, "edx"): "- - avx512-4vnniw avx512-4fmaps fsrm - - - avx512-vp2intersect - md-clear - -"
    " - serialize - tsx-ldtrk - - arch-lbr ibt - amx-bf16 avx512-fp16 amx-tile amx-int8 spec-ctrl"
    " stibp flush-l1d arch-capabilities core-capability ssbd",
    (0x7, 1, "eax"): "sha512 sm3 sm4 - avx-vnni avx512-bf16 - cmpccxadd - - fzrm fsrs fsrc - - - -"
    " fred lkgs wrmsrns - amx-fp16 - avx-ifma - - lam",
    (0x7, 1, "edx"): "- - - - avx-vnni-int8 avx-ne-convert - - amx-complex - avx-vnni-int16 - - -"
    " prefetchiti - - - - avx10",
    (0x7, 2, "edx"): "intel-psfd ipred-ctrl rrsba-ctrl ddpd-u bhi-ctrl mcdt-no",
    (0xD, 1, "eax"): "xsaveopt xsavec xgetbv1 xsaves xfd",
    (0x40000001, 0, "eax"): "kvmclock kvm-nopiodelay kvm-mmu kvmclock kvm-asyncpf kvm-steal-time"
    " kvm-pv-eoi kvm-pv-unhalt - kvm-pv-tlb-flush kvm-asyncpf-vmexit kvm-pv-ipi kvm-poll-control"
    " kvm-pv-sched-yield kvm-asyncpf-int kvm-msi-ext-dest-id - - - - - - - - kvmclock-stable-bit",
    (0x40000001, 0, "edx"): "kvm-hint-dedicated",
    (0x80000001, 0, "edx"): "- - - - - - - - - - - syscall - - - - - - - - nx - mmxext - - fxsr-opt"
    " pdpe1gb rdtscp - lm 3dnowext 3dnow",
    (0x80000001, 0, "ecx"): "lahf-lm cmp-legacy svm extapic cr8legacy abm sse4a misalignsse"
    " 3dnowprefetch osvw ibs xop skinit wdt - lwp fma4 tce - nodeid-msr - tbm topoext perfctr-core"
    " perfctr-nb",
    (0x80000007, 0, "ebx"): "overflow-recov succor",
    (0x80000007, 0, "edx"): "- - - - - - - - invtsc",
    (0x80000008, 0, "ebx"): "clzero - xsaveerptr - - - - - - wbnoinvd - - ibpb - ibrs amd-stibp -"
    " stibp-always-on - - - - - - amd-ssbd virt-ssbd amd-no-ssb - amd-psfd",
    (0x8000000A, 0, "edx"): "npt lbrv svm-lock nrip-save tsc-scale vmcb-clean flushbyasid"
    " decodeassists - - pause-filter - pfthreshold avic - v-vmsave-vmload vgif - - - - - - - - vnmi"
    " - - svme-addr-chk",
    (0x80000021, 0, "eax"): "no-nested-data-bp - lfence-always-serializing - - - null-sel-clr-base"
    " - auto-ibrs - - - - - - - - - - - - - - - eraps - - sbpb ibpb-brtype srso-no"
    " srso-user-kernel-no",
    (0x80000022, 0, "eax"): "perfmon-v2",
}  # fmt: skip
_ALIASES = {"sse3": "pni", "sse4-1": "sse4.1", "sse4-2": "sse4.2", "xd": "nx", "ffxsr": "fxsr-opt",
            "i64": "lm", "pclmuldq": "pclmulqdq", "lahf": "lahf-lm"}  # fmt: skip
#: What KVM does not list, but a guest may be told: it asks nothing of the host.
HINTS = ("kvm-hint-dedicated",)
#: Not bits: all of KVM's leaves, and the performance monitoring leaves.
GROUPS = {"kvm": (0x40000000, 0x40000001, 0x40000010), "pmu": (0xA, 0x80000022)}

#: Features that make no sense without another: they go with it.
DEPENDENT = {
    "xsave": "xsaveopt xsavec xgetbv1 xsaves xfd avx mpx pku amx-tile shstk ibt",
    "xsaves": "shstk ibt",
    "avx": "fma f16c avx2 avx512f avx-vnni vaes vpclmulqdq xop fma4 avx-vnni-int8 avx-ne-convert"
    " avx-ifma avx-vnni-int16",
    "avx512f": "avx512dq avx512ifma avx512pf avx512er avx512cd avx512bw avx512vl avx512vbmi"
    " avx512vbmi2 avx512vnni avx512bitalg avx512-vpopcntdq avx512-4vnniw avx512-4fmaps"
    " avx512-vp2intersect avx512-bf16 avx512-fp16",
    "amx-tile": "amx-bf16 amx-int8 amx-fp16 amx-complex",
    "svm": "npt lbrv svm-lock nrip-save tsc-scale vmcb-clean flushbyasid decodeassists pause-filter"
    " pfthreshold avic v-vmsave-vmload vgif vnmi svme-addr-chk",
}  # fmt: skip
#: State components of XSAVE (SDM volume 1, 13.1) by the feature that has them.
COMPONENTS = {"avx": (2,), "mpx": (3, 4), "avx512f": (5, 6, 7), "pku": (9,), "amx-tile": (17, 18)}
#: Those that two features share: the registers of CET.
CET_COMPONENTS = 1 << 11 | 1 << 12


def parse(value: str, option: str) -> dict[str, bool]:
    """Return what ``-cpu host,...`` asks to change: features by name, in alphabetical order.

    :raises ConfigError: the model or a feature is unknown, or one is given twice
    """
    model, *items = value.split(",")
    if model not in ("host", "max"):
        raise ConfigError(f"{option}: {shorten(model)} is no CPU; give host or max")
    changes: dict[str, bool] = {}
    for item in items:
        name, equals, wanted = item.partition("=")
        is_on = True
        if equals:
            is_on = parse_bool(wanted, option, name)
        elif item[:1] in ("+", "-"):
            name, is_on = item[1:], item[0] == "+"
        name = name.replace("_", "-")
        name = _ALIASES.get(name, name)
        if name in ("check", "enforce") and is_on:
            continue  # it is so anyway
        if name not in GROUPS and not any(find(name)):
            mend = did_you_mean(name, known()) or "they are named as in QEMU"
            raise ConfigError(f"{option}: {shorten(name)} is no CPU feature; {mend}")
        if changes.setdefault(name, is_on) != is_on:
            raise ConfigError(f"{option}: {name} is wanted and not; leave one of them out")
    return dict(sorted(changes.items()))


def find(name: str) -> Iterator[tuple[int, int, str, int]]:
    """Return the bits that *name* stands for: leaf, subleaf, register, mask."""
    for (leaf, subleaf, register), names in WORDS.items():
        words = names.split()
        if name in words and name != "-":
            mask = sum(1 << bit for bit, word in enumerate(words) if word == name)
            yield leaf, subleaf, register, mask


def without_dependents(names: list[str]) -> list[str]:
    """Return *names* and all features that cannot be had without them."""
    gone = list(dict.fromkeys(names))
    for name in gone:  # grows as it is walked
        gone += [each for each in DEPENDENT.get(name, "").split() if each not in gone]
    return gone


def known() -> list[str]:
    """Return all features that can be named, in alphabetical order."""
    words = {word for names in WORDS.values() for word in names.split()} | set(GROUPS)
    return sorted(words - {"-"})
