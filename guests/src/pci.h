/* PCI for drivers: functions of bus 0, by number: slot << 3 | function. */
#ifndef PCI_H
#define PCI_H
#include "kernel.h"

#define PCI_ECAM 0xe0000000ul     /* all registers, in memory */
#define PCI_PLACES 0xd0000000ul   /* BARs are put from here on: a part of the 32-bit window */
#define PCI_FUNCTIONS 256

enum { P_ID = 0, P_COMMAND = 4, P_STATUS = 6, P_CLASS = 8, P_HEADER = 0xe, P_BAR = 0x10,
       P_CAPABILITIES = 0x34, P_LINE = 0x3c };
enum { P_IO = 1, P_MEMORY = 2, P_MASTER = 4, P_LINE_OFF = 1 << 10 };
enum { PCAP_VENDOR = 9, PCAP_MSIX = 0x11 };

u32 pci_read(u32 function, u32 at, u32 width);    /* by ports, or with pci=ecam in memory */
void pci_write(u32 function, u32 at, u32 width, u32 value);
bool pci_exists(u32 function);
u32 pci_capability(u32 function, u32 id, u32 after);  /* the next one's offset, or 0; after 0: the first */
u64 pci_bar_size(u32 function, u32 index);        /* 0: there is none */
u64 pci_bar(u32 function, u32 index);             /* give it a place and enable it; where it is then */
u32 pci_msix(u32 function, u64 *table);           /* enable it, all masked; number of entries, or 0 */
void msix_set(u64 table, u32 entry, u32 vector);  /* to CPU 0 */
#endif
