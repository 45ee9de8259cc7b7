/* PCI; see pci.h. */
#include "pci.h"

static bool by_ecam(void)
{
    const char *how = opt("pci");
    return how && !strcmp(how, "ecam");
}

static u64 ecam(u32 slot, u32 at) { return PCI_ECAM + (slot << 15) + at; }
static u16 port(u32 slot, u32 at)
{
    outl(0xcf8, 1u << 31 | slot << 11 | (at & 0xfc));
    return (u16)(0xcfc + (at & 3));
}

u32 pci_read(u32 slot, u32 at, u32 size)
{
    if (by_ecam())
        return size == 1 ? mmio_read8(ecam(slot, at)) : size == 2 ? mmio_read16(ecam(slot, at)) : mmio_read(ecam(slot, at));
    u16 data = port(slot, at);
    return size == 1 ? inb(data) : size == 2 ? inw(data) : inl(data);
}

void pci_write(u32 slot, u32 at, u32 size, u32 value)
{
    if (by_ecam()) {
        if (size == 1)
            mmio_write8(ecam(slot, at), (u8)value);
        else if (size == 2)
            mmio_write16(ecam(slot, at), (u16)value);
        else
            mmio_write(ecam(slot, at), value);
        return;
    }
    u16 data = port(slot, at);
    if (size == 1)
        outb(data, (u8)value);
    else if (size == 2)
        outw(data, (u16)value);
    else
        outl(data, value);
}

u32 pci_capability(u32 slot, u32 id, u32 after)
{
    u32 at = after ? pci_read(slot, after + 1, 1) : pci_read(slot, PCI_CAPABILITIES, 1);
    for (u32 n = 0; at && n < 48; n++) {
        if (pci_read(slot, at, 1) == id)
            return at;
        at = pci_read(slot, at + 1, 1);
    }
    return 0;
}

u64 pci_bar_size(u32 slot, u32 index)
{
    u32 at = PCI_BAR0 + 4 * index, command = pci_read(slot, PCI_COMMAND, 2);
    u32 old = pci_read(slot, at, 4), high = 0;
    bool wide = (old & 7) == 4;
    pci_write(slot, PCI_COMMAND, 2, command & ~(PCI_IO | PCI_MEMORY));
    pci_write(slot, at, 4, ~0u);
    u64 bits = pci_read(slot, at, 4) & (old & 1 ? ~3u : ~15u);
    pci_write(slot, at, 4, old);
    if (wide) {
        high = pci_read(slot, at + 4, 4);
        pci_write(slot, at + 4, 4, ~0u);
        bits |= (u64)pci_read(slot, at + 4, 4) << 32;
        pci_write(slot, at + 4, 4, high);
    } else {
        bits |= ~0ul << 32;
    }
    pci_write(slot, PCI_COMMAND, 2, command);
    return -bits;
}

u64 pci_bar(u32 slot, u32 index)
{
    static u64 next = PCI_LOW;
    u32 at = PCI_BAR0 + 4 * index, old = pci_read(slot, at, 4);
    if ((old & 7) == 4 && pci_read(slot, at + 4, 4)) {
        u64 size = pci_bar_size(slot, index);
        next = (next + size - 1) & ~(size - 1);
        pci_write(slot, at, 4, (u32)next);
        pci_write(slot, at + 4, 4, 0);
        next += size;
    }
    pci_write(slot, PCI_COMMAND, 2, pci_read(slot, PCI_COMMAND, 2) | PCI_IO | PCI_MEMORY | PCI_MASTER);
    return pci_read(slot, at, 4) & (old & 1 ? ~3u : ~15u);
}

void pci_msix(u32 slot, u32 entry, u32 vector)
{
    u32 at = pci_capability(slot, 0x11, 0);
    if (!at || entry > (pci_read(slot, at + 2, 2) & 0x7ff))
        fail("PCI slot %u has no MSI-X entry %u", slot, entry);
    u32 table = pci_read(slot, at + 4, 4);
    u64 row = pci_bar(slot, table & 7) + (table & ~7u) + 16 * entry;
    mmio_write(row, (u32)LAPIC | (u32)percpu[0].apic_id << 12);
    mmio_write(row + 4, 0);
    mmio_write(row + 8, vector);
    mmio_write(row + 12, 0);
    pci_write(slot, at + 2, 2, 1u << 15);
}

void pci_line(u32 slot, u32 vector)
{
    if (!pci_read(slot, PCI_PIN, 1))
        fail("PCI slot %u has no interrupt pin", slot);
    level_irq_enable(pci_read(slot, PCI_LINE, 1), vector);
}
