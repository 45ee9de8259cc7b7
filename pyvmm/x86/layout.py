"""Where everything is: guest-physical addresses, interrupt lines and I/O ports of the machine.

One PC: RAM split around the 32-bit hole, a ROM that ends at 4 GiB, the interrupt
controllers where KVM emulates them, and the ISA devices where drivers look for them. Constants
only; the machine's builder and the loaders read them.
"""

from __future__ import annotations

PAGE = 0x1000

# --- RAM (the split is QEMU's q35/microvm one; e820 types: ACPI 6.5, table 15.2) ---------------

BELOW_4G_END = 0xC000_0000
"""RAM below 4 GiB ends here at the latest: 3 GiB."""
ABOVE_4G_START = 0x1_0000_0000
"""RAM that does not fit below goes on here."""
VGA_START = 0xA_0000
"""Conventional memory ends here; up to 1 MiB there is no RAM, only ROM."""
OPTION_ROMS = 0xC_0000
"""From here to the ROM's mirror PCs have the ROMs of their cards. Kernels search all of it for
signatures, 16 bytes at a time, so there must be memory: each read elsewhere is an exit."""
HIGH_START = 0x10_0000
"""Extended memory: 1 MiB, where kernels are linked to run."""
MIN_RAM = 2 << 20
"""Less leaves nothing above 1 MiB for a kernel and its boot structures."""
MAX_RAM = (1 << 40) - (ABOVE_4G_START - BELOW_4G_END)
"""All of it lies within the 40 physical address bits that a processor has without better CPUID."""

# --- The first 640 KiB, in rising order ---------------------------------------------------------

BOOT_RECORD = 0x500
"""What to boot, left for the ROM (firmware/README.md); just above the BIOS data area."""
BOOT_RECORD_SIZE = 32
FLAT_START = 0x7C00
"""A flat image lies here, as a boot sector does, with its stack growing down from it."""
START_INFO = 0x6000
"""PVH start_info, its module list and memory map follow; the ROM leaves all this alone."""
MULTIBOOT_INFO = 0x6000
"""Multiboot information (only one protocol is in use at a time)."""
ZERO_PAGE = 0x6000
"""Linux's boot_params, one page, where the other protocols have theirs."""
BOOT_INFO_END = 0x7000
"""The structures of any protocol end here at the latest."""
TABLES_START = 0x9_8000
"""Usable conventional memory ends here (608 KiB): ACPI tables and the MP table up to the EBDA."""
EBDA_START = 0x9_FC00
"""Reserved up to VGA_START: what has to stay while a system runs, and what is searched here."""
MP_POINTER = EBDA_START + 0x10
"""MP floating pointer structure, 16 bytes."""
RSDP = EBDA_START + 0x20
"""ACPI's root pointer, 36 bytes."""
FACS = EBDA_START + 0x80
"""ACPI's firmware control structure, 64 bytes, aligned to its size."""
CMDLINE = 0x2_0000
"""The kernel command line, NUL-terminated."""
CMDLINE_SIZE = 0x1000
"""Room for it, NUL included; Linux itself keeps 2048 bytes."""
PAGE_TABLES = 0x2_1000
"""A PML4, a PDPT and four page directories for kernels that are entered in long mode."""
PAGE_TABLES_END = 0x2_7000
SETUP_DATA = 0x2_7000
"""What Linux's boot parameters point to: the random seed."""
SETUP_DATA_SIZE = 0x40

# --- ROM (SDM volume 3, 10.1.4: the first instruction is fetched at 0xfffffff0) ------------------

ROM_END = 0x1_0000_0000
"""The ROM ends where the 32-bit address space does, so its last paragraph is the reset vector."""
ROM_MIRROR_END = HIGH_START
"""Its last part is seen below 1 MiB too, where real mode reaches it."""
ROM_MAX = 256 << 10
ROM_MIRROR_MAX = 128 << 10

# --- virtio-mmio (addresses are those of QEMU's microvm) ---------------------------------------

VIRTIO_MMIO = 0xFEB0_0000
"""Registers of the first virtio device; the next ones follow, in the order of the options."""
VIRTIO_MMIO_SIZE = 0x200
VIRTIO_MMIO_SLOTS = 8
"""At most as many devices, each with an interrupt line of its own."""
IRQ_VIRTIO = 16
"""GSI of the first, an input of the IOAPIC that no ISA device has; edge triggered."""

# --- PCI (addresses are those of QEMU's microvm with pcie=on) ------------------------------------

PCI_LOW = (0xC000_0000, 0xE000_0000)
"""Where BARs may lie below 4 GiB: right behind the RAM."""
PCI_ECAM = 0xE000_0000
"""Configuration space in memory, 1 MiB for the one bus."""
PCI_HIGH_SIZE = 64 << 30
"""BARs of 64 bits may lie above all RAM, in so many bytes, but within 40 address bits."""
PCI_IO = (0xC000, 0x1_0000)
IRQ_PCI = (10, 11, 5, 7)
"""GSI of INTA by slot modulo 4, level triggered."""

# --- Processors and interrupt controllers (where KVM's in-kernel irqchip puts them) --------------

IOAPIC_BASE = 0xFEC0_0000
"""KVM's IOAPIC."""
IOAPIC_PINS = 24
LAPIC_BASE = 0xFEE0_0000
"""Local APIC at reset (SDM volume 3, 11.4.1)."""
RESERVED_START = IOAPIC_BASE
"""From here to 4 GiB nothing is RAM: APICs, KVM's own pages, ROM."""
IDENTITY_MAP = 0xFEFF_C000
"""One page for KVM_SET_IDENTITY_MAP_ADDR: page table of real mode without unrestricted guest."""
TSS = 0xFEFF_D000
"""Three pages for KVM_SET_TSS_ADDR: VMX needs a task state segment for virtual-8086 mode."""

# --- Interrupt lines (ISA) ----------------------------------------------------------------------

IRQ_TIMER = 0
IRQ_KEYBOARD = 1
IRQ_COM2 = 3
IRQ_COM1 = 4
IRQ_RTC = 8
IRQ_MOUSE = 12

# --- I/O ports: (first port, number of ports) ---------------------------------------------------

PIC_MASTER = (0x20, 2)  # in KVM
PIT = (0x40, 4)  # in KVM
I8042_DATA = (0x60, 1)
SPEAKER = (0x61, 1)  # in KVM, with the PIT (KVM_PIT_SPEAKER_DUMMY)
I8042_COMMAND = (0x64, 1)
CMOS = (0x70, 2)
CMOS_CENTURY = 0x32  # its index in the clock's RAM
POST_CODE = (0x80, 1)
PORT92 = (0x92, 1)
PIC_SLAVE = (0xA0, 2)  # in KVM
DEBUGCON = (0xE9, 1)
DEBUG_EXIT = (0xF4, 4)
COM2 = (0x2F8, 8)
COM1 = (0x3F8, 8)
COM_PORTS = ((COM1, IRQ_COM1), (COM2, IRQ_COM2))
"""Ports and interrupt line of each serial port."""
ELCR = (0x4D0, 2)  # in KVM
PVPANIC = (0x505, 1)
FW_CFG = (0x510, 12)
PCI_CONFIG = (0xCF8, 8)
PM1_CONTROL = (0x604, 2)
"""ACPI PM1a control (ACPI 6.5, 4.8.3.2.1) where QEMU's PC has it: SLP_EN with S5 powers off."""


def pci_high(ram_size: int) -> tuple[int, int]:
    """Return where BARs may lie above *ram_size* bytes of RAM: nowhere, if both are equal."""
    start = max(ABOVE_4G_START + max(0, ram_size - BELOW_4G_END), ABOVE_4G_START)
    start = -(-start // PCI_HIGH_SIZE) * PCI_HIGH_SIZE
    return start, max(start, min(start + PCI_HIGH_SIZE, 1 << 40))


def ram_ranges(size: int) -> list[tuple[int, int, int]]:
    """Return how *size* bytes of RAM are seen, as ``(gpa, length, offset in the RAM)``.

    The 384 KiB under 1 MiB are left out of the map, not moved: offset equals address below
    3 GiB, so one mapping of the RAM serves all. What is left out serves as empty option ROMs.
    """
    low = min(size, BELOW_4G_END)
    ranges = [
        (0, min(low, VGA_START), 0),
        (HIGH_START, low - HIGH_START, HIGH_START),
        (ABOVE_4G_START, size - low, low),
    ]
    return [entry for entry in ranges if entry[1] > 0]
