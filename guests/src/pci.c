/* PCI: configuration accesses, BARs, MSI-X; and the program pci-scan, which prints what there is and sees
 * that ports and memory lead to the same registers. */
#include "pci.h"

#define ADDRESS 0xcf8
#define DATA 0xcfc

static u32 port_read(u32 function, u32 at, u32 width)
{
    u16 port = (u16)(DATA + (at & 3));
    outl(ADDRESS, 1u << 31 | function << 8 | (at & 0xfc));
    return width == 1 ? inb(port) : width == 2 ? inw(port) : inl(port);
}

static void port_write(u32 function, u32 at, u32 width, u32 value)
{
    u16 port = (u16)(DATA + (at & 3));
    outl(ADDRESS, 1u << 31 | function << 8 | (at & 0xfc));
    if (width == 1)
        outb(port, (u8)value);
    else if (width == 2)
        outw(port, (u16)value);
    else
        outl(port, value);
}

static u32 ecam_read(u32 function, u32 at, u32 width)
{
    u64 where = PCI_ECAM + (function << 12) + at;
    return width == 1 ? mmio_read8(where) : width == 2 ? mmio_read16(where) : mmio_read(where);
}

static void ecam_write(u32 function, u32 at, u32 width, u32 value)
{
    u64 where = PCI_ECAM + (function << 12) + at;
    if (width == 1)
        mmio_write8(where, (u8)value);
    else if (width == 2)
        mmio_write16(where, (u16)value);
    else
        mmio_write(where, value);
}

static bool by_ecam(void)
{
    static u32 answer;
    const char *value;
    if (!answer)
        answer = (value = opt("pci")) && !strcmp(value, "ecam") ? 2 : 1;
    return answer == 2;
}

u32 pci_read(u32 function, u32 at, u32 width)
{
    return (by_ecam() ? ecam_read : port_read)(function, at, width);
}

void pci_write(u32 function, u32 at, u32 width, u32 value)
{
    (by_ecam() ? ecam_write : port_write)(function, at, width, value);
}

bool pci_exists(u32 function)
{
    if (function & 7 && !(pci_read(function & ~7u, P_HEADER, 1) & 0x80))
        return 0;
    return (u16)pci_read(function, P_ID, 2) != 0xffff;
}

u32 pci_capability(u32 function, u32 id, u32 after)
{
    u32 at = pci_read(function, after ? after + 1 : P_CAPABILITIES, 1);
    for (u32 count = 0; at; count++, at = pci_read(function, at + 1, 1)) {
        if (count == 48 || at < 0x40 || at & 3)
            fail("function %x: capability at 0x%x", function, at);
        if (pci_read(function, at, 1) == id)
            return at;
    }
    return 0;
}

u64 pci_bar_size(u32 function, u32 index)
{
    u32 at = P_BAR + 4 * index, command = pci_read(function, P_COMMAND, 2);
    u32 low = pci_read(function, at, 4), high = 0, flags = low & 1 ? 3 : 15;
    bool wide = (low & 7) == 4;
    /* Not decoded while it is all ones. */
    pci_write(function, P_COMMAND, 2, command & ~(u32)(P_IO | P_MEMORY));
    pci_write(function, at, 4, 0xffffffff);
    u64 mask = pci_read(function, at, 4) & ~flags;
    if (wide) {
        high = pci_read(function, at + 4, 4);
        pci_write(function, at + 4, 4, 0xffffffff);
        mask |= (u64)pci_read(function, at + 4, 4) << 32;
        pci_write(function, at + 4, 4, high);
    } else if (mask) {
        mask |= 0xfffffffful << 32;
    }
    pci_write(function, at, 4, low);
    pci_write(function, P_COMMAND, 2, command);
    return -mask;
}

u64 pci_bar(u32 function, u32 index)
{
    static u64 next = PCI_PLACES;
    static u64 places[PCI_FUNCTIONS][6];
    u32 at = P_BAR + 4 * index;
    u64 size = pci_bar_size(function, index), *place = &places[function][index];
    if (*place)
        return *place;
    if (!size)
        fail("function %x has no BAR %u", function, index);
    *place = next = (next + size - 1) & -size;
    next += size;
    pci_write(function, at, 4, (u32)*place);
    if ((pci_read(function, at, 4) & 6) == 4)
        pci_write(function, at + 4, 4, 0);
    if ((pci_read(function, at, 4) & ~15u) != *place)
        fail("function %x BAR %u is not at 0x%lx", function, index, *place);
    pci_write(function, P_COMMAND, 2, pci_read(function, P_COMMAND, 2) | P_MEMORY | P_MASTER);
    return *place;
}

u32 pci_msix(u32 function, u64 *table)
{
    u32 at = pci_capability(function, PCAP_MSIX, 0);
    if (!at)
        return 0;
    u32 where = pci_read(function, at + 4, 4), count = (pci_read(function, at + 2, 2) & 0x7ff) + 1;
    *table = pci_bar(function, where & 7) + (where & ~7u);
    pci_write(function, at + 2, 2, 1u << 15);
    return count;
}

void msix_set(u64 table, u32 entry, u32 vector)
{
    table += entry * 16;
    mmio_write(table, 0xfee00000u | (u32)percpu[0].apic_id << 12);
    mmio_write(table + 4, 0);
    mmio_write(table + 8, vector);
    mmio_write(table + 12, 0);
}

void pci(void)
{
    u32 count = 0;
    for (u32 function = 0; function < PCI_FUNCTIONS; function++) {
        if (!pci_exists(function))
            continue;
        count++;
        for (u32 at = 0; at < 256; at += 4)
            if (port_read(function, at, 4) != ecam_read(function, at, 4))
                fail("function %x register 0x%x: ports 0x%x memory 0x%x", function, at,
                     port_read(function, at, 4), ecam_read(function, at, 4));
        u32 id = pci_read(function, P_ID, 4);
        print("pci %x.%x id %x:%x class %x line %u\n", function >> 3, function & 7, id & 0xffff, id >> 16,
              pci_read(function, P_CLASS, 4) >> 8, pci_read(function, P_LINE, 1));
        for (u32 index = 0; index < 6; index++) {
            u32 low = pci_read(function, P_BAR + 4 * index, 4);
            u64 size = pci_bar_size(function, index);
            if (size)
                print("  bar %u %s 0x%lx\n", index, low & 1 ? "io" : (low & 6) == 4 ? "mem64" : "mem32", size);
            if (!(low & 1) && (low & 6) == 4)
                index++;
        }
        for (u32 at = pci_read(function, P_CAPABILITIES, 1); at; at = pci_read(function, at + 1, 1))
            print("  capability 0x%x at 0x%x\n", pci_read(function, at, 1), at);
    }
    print("pci %u functions\n", count);
}
