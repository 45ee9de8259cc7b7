"""What the kernel's buffers in a vCPU's state hold: registers, by their names in the SDM."""

from __future__ import annotations

from typing import Any

from construct import (
    Array,
    Bytes,
    ConstructError,
    Int8ul,
    Int16ul,
    Int32ul,
    Int64ul,
    Padded,
    Padding,
    Pointer,
    Struct,
)

# SDM volume 1, 13.4: the legacy region (the layout of FXSAVE) and the header behind it.
XSAVE = Struct(
    "fcw" / Int16ul,
    "fsw" / Int16ul,
    "ftw" / Int8ul,
    Padding(1),
    "fop" / Int16ul,
    "fip" / Int64ul,
    "fdp" / Int64ul,
    "mxcsr" / Int32ul,
    "mxcsr_mask" / Int32ul,
    "st" / Array(8, Padded(16, Bytes(10))),
    "xmm" / Array(16, Bytes(16)),
    "xstate_bv" / Pointer(512, Int64ul),
    "xcomp_bv" / Pointer(520, Int64ul),
)
_BITMAP = Array(8, Padded(16, Int32ul))
# SDM volume 3, 11.4.1: the registers of the local APIC.
LAPIC = Struct(
    **{
        name: Pointer(at, Int32ul)
        for name, at in (
            ("id", 0x20), ("version", 0x30), ("tpr", 0x80), ("ppr", 0xA0), ("ldr", 0xD0),
            ("dfr", 0xE0), ("svr", 0xF0), ("esr", 0x280), ("icr_low", 0x300),
            ("icr_high", 0x310), ("lvt_timer", 0x320), ("lvt_thermal", 0x330),
            ("lvt_pmc", 0x340), ("lvt_lint0", 0x350), ("lvt_lint1", 0x360),
            ("lvt_error", 0x370), ("timer_initial", 0x380), ("timer_current", 0x390),
            ("timer_divide", 0x3E0),
        )
    },
    isr=Pointer(0x100, _BITMAP),
    tmr=Pointer(0x180, _BITMAP),
    irr=Pointer(0x200, _BITMAP),
)  # fmt: skip

MSR_NAMES = {
    0x10: "IA32_TSC",
    0x1B: "IA32_APIC_BASE",
    0x34: "MSR_SMI_COUNT",
    0x3A: "IA32_FEATURE_CONTROL",
    0x3B: "IA32_TSC_ADJUST",
    0x48: "IA32_SPEC_CTRL",
    0x8B: "IA32_BIOS_SIGN_ID",
    0xC1: "IA32_PMC0",
    0xCD: "MSR_FSB_FREQ",
    0xCE: "MSR_PLATFORM_INFO",
    0xFE: "IA32_MTRRCAP",
    0x10A: "IA32_ARCH_CAPABILITIES",
    0x122: "IA32_TSX_CTRL",
    0x140: "MSR_MISC_FEATURE_ENABLES",
    0x174: "IA32_SYSENTER_CS",
    0x175: "IA32_SYSENTER_ESP",
    0x176: "IA32_SYSENTER_EIP",
    0x179: "IA32_MCG_CAP",
    0x17A: "IA32_MCG_STATUS",
    0x17B: "IA32_MCG_CTL",
    0x1A0: "IA32_MISC_ENABLE",
    0x1C4: "IA32_XFD",
    0x1C5: "IA32_XFD_ERR",
    0x1D9: "IA32_DEBUGCTL",
    0x1DB: "MSR_LASTBRANCHFROMIP",
    0x1DC: "MSR_LASTBRANCHTOIP",
    0x1DD: "MSR_LASTINTFROMIP",
    0x1DE: "MSR_LASTINTTOIP",
    0x1FC: "MSR_POWER_CTL",
    0x277: "IA32_PAT",
    0x2FF: "IA32_MTRR_DEF_TYPE",
    0x345: "IA32_PERF_CAPABILITIES",
    0x38D: "IA32_FIXED_CTR_CTRL",
    0x38E: "IA32_PERF_GLOBAL_STATUS",
    0x38F: "IA32_PERF_GLOBAL_CTRL",
    0x6A0: "IA32_U_CET",
    0x6A2: "IA32_S_CET",
    0x6A4: "IA32_PL0_SSP",
    0x6A5: "IA32_PL1_SSP",
    0x6A6: "IA32_PL2_SSP",
    0x6A7: "IA32_PL3_SSP",
    0x6A8: "IA32_INTERRUPT_SSP_TABLE_ADDR",
    0x6E0: "IA32_TSC_DEADLINE",
    0xDA0: "IA32_XSS",
    0xC0000080: "IA32_EFER",
    0xC0000081: "IA32_STAR",
    0xC0000082: "IA32_LSTAR",
    0xC0000083: "IA32_CSTAR",
    0xC0000084: "IA32_FMASK",
    0xC0000100: "IA32_FS_BASE",
    0xC0000101: "IA32_GS_BASE",
    0xC0000102: "IA32_KERNEL_GS_BASE",
    0xC0000103: "IA32_TSC_AUX",
    0xC001001F: "MSR_AMD64_NB_CFG",
    0xC0010015: "MSR_K7_HWCR",
    0xC0010114: "MSR_VM_CR",
    0xC0010117: "MSR_VM_HSAVE_PA",
    0xC001011F: "MSR_AMD64_VIRT_SPEC_CTRL",
    0xC0010140: "MSR_AMD64_OSVW_ID_LENGTH",
    0xC0010141: "MSR_AMD64_OSVW_STATUS",
    0xC0011029: "MSR_AMD64_DE_CFG",
    0x4B564D00: "KVM_WALL_CLOCK_NEW",
    0x4B564D01: "KVM_SYSTEM_TIME_NEW",
    0x4B564D02: "KVM_ASYNC_PF_EN",
    0x4B564D03: "KVM_STEAL_TIME",
    0x4B564D04: "KVM_PV_EOI_EN",
    0x4B564D05: "KVM_POLL_CONTROL",
    0x4B564D06: "KVM_ASYNC_PF_INT",
    0x4B564D07: "KVM_ASYNC_PF_ACK",
    0x4B564D08: "KVM_MIGRATION_CONTROL",
    0x11: "KVM_WALL_CLOCK",
    0x12: "KVM_SYSTEM_TIME",
    0x40000000: "HV_X64_GUEST_OS_ID",
    0x40000001: "HV_X64_HYPERCALL",
    0x40000002: "HV_X64_VP_INDEX",
    0x40000003: "HV_X64_RESET",
    0x40000020: "HV_X64_TIME_REF_COUNT",
    0x40000021: "HV_X64_REFERENCE_TSC",
}
for _bank in range(32):
    for _at, _kind in enumerate(("CTL", "STATUS", "ADDR", "MISC")):
        MSR_NAMES[0x400 + 4 * _bank + _at] = f"IA32_MC{_bank}_{_kind}"
for _pair in range(10):
    MSR_NAMES[0x200 + 2 * _pair] = f"IA32_MTRR_PHYSBASE{_pair}"
    MSR_NAMES[0x201 + 2 * _pair] = f"IA32_MTRR_PHYSMASK{_pair}"


def msr_name(index: int) -> str:
    """Return what the SDM, the APM or KVM's documentation calls an MSR; its number if none names
    it."""
    return MSR_NAMES.get(index, f"{index:#x}")


def xsave(raw: bytes) -> dict[str, Any]:
    """Return the registers in an XSAVE area; empty if it is too small for one."""
    found = _parse(XSAVE, raw)
    for name in ("st", "xmm"):
        for number, value in enumerate(found.pop(name, ())):
            found[f"{name}{number}"] = int.from_bytes(value, "little")
    return found


def lapic(raw: bytes) -> dict[str, Any]:
    """Return the registers of a local APIC; its bitmaps as lists of vectors."""
    found = _parse(LAPIC, raw)
    for name in ("isr", "tmr", "irr"):
        if name in found:
            bits = sum(word << 32 * number for number, word in enumerate(found[name]))
            found[name] = [vector for vector in range(256) if bits >> vector & 1]
    return found


def _parse(layout: Any, raw: bytes) -> dict[str, Any]:
    try:
        return {name: value for name, value in layout.parse(raw).items() if name != "_io"}
    except ConstructError:
        return {}
