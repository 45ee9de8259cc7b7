/* PCI: configuration space by ports or in memory (option pci=ecam), the scan, BARs, MSI-X. */
#ifndef PCI_H
#define PCI_H
#include "kernel.h"

#define PCI_ECAM 0xe0000000ul
#define PCI_LOW 0xc0100000ul      /* where this guest puts BARs that lie above 4 GiB */

enum { PCI_ID = 0, PCI_COMMAND = 4, PCI_STATUS = 6, PCI_CLASS = 8, PCI_HEADER = 0xe, PCI_BAR0 = 0x10,
       PCI_CAPABILITIES = 0x34, PCI_LINE = 0x3c, PCI_PIN = 0x3d };
enum { PCI_IO = 1, PCI_MEMORY = 2, PCI_MASTER = 4, PCI_NO_INTX = 0x400 };

u32 pci_read(u32 slot, u32 at, u32 size);               /* function 0; sizes 1, 2, 4 */
void pci_write(u32 slot, u32 at, u32 size, u32 value);
u32 pci_capability(u32 slot, u32 id, u32 after);        /* the next one behind that offset, or 0 */
u64 pci_bar(u32 slot, u32 index);                       /* its address, put below 4 GiB first */
u64 pci_bar_size(u32 slot, u32 index);
void pci_msix(u32 slot, u32 entry, u32 vector);         /* to CPU 0; switches messages on */
void pci_line(u32 slot, u32 vector);                    /* the same by the interrupt line */
#endif
