/* virtio 1.3 for drivers: devices on virtio-mmio and on PCI, split virtqueues, with event-idx and indirect
 * descriptors where they are offered. One CPU a queue at a time. */
#ifndef VIRTIO_H
#define VIRTIO_H
#include "kernel.h"

#define VIRTIO_MMIO 0xfeb00000ul  /* slots of 0x200 bytes, interrupts from IOAPIC pin 16 on */
#define VIRTIO_SLOTS 8
#define VQ_MAX 256                /* entries of a queue, at most */

enum { V_MAGIC = 0, V_VERSION = 4, V_DEVICE = 8, V_FEATURES = 0x10, V_FEATURES_SEL = 0x14,
       V_ACCEPT = 0x20, V_ACCEPT_SEL = 0x24, V_QUEUE_SEL = 0x30, V_SIZE_MAX = 0x34, V_SIZE = 0x38,
       V_READY = 0x44, V_NOTIFY = 0x50, V_ISR = 0x60, V_ACK = 0x64, V_STATUS = 0x70,
       V_DESC = 0x80, V_AVAIL = 0x90, V_USED = 0xa0, V_GENERATION = 0xfc, V_CONFIG = 0x100 };
enum { S_ACKNOWLEDGE = 1, S_DRIVER = 2, S_DRIVER_OK = 4, S_FEATURES_OK = 8, S_NEEDS_RESET = 64 };
#define VF_INDIRECT (1ul << 28)
#define VF_EVENT_IDX (1ul << 29)
#define VF_VERSION_1 (1ul << 32)

struct vdesc { u64 addr; u32 len; u16 flags, next; };
enum { VD_NEXT = 1, VD_WRITE = 2, VD_INDIRECT = 4 };

struct vq;
struct vdev;

/* The registers of one bus. */
struct vface {
    u32 (*status)(struct vdev *d);
    void (*set_status)(struct vdev *d, u32 value);
    u32 (*features)(struct vdev *d, u32 word);
    void (*accept)(struct vdev *d, u32 word, u32 bits);
    u32 (*queue_max)(struct vdev *d, u32 index);
    bool (*queue_set)(struct vq *q);  /* size and places; whether it is ready then */
    void (*notify)(struct vq *q);
    u32 (*config)(struct vdev *d, u32 offset);
    void (*ack)(struct vdev *d);
    void (*irq_enable)(struct vdev *d);
};

struct vdev {
    const struct vface *face;
    u64 base, features;
    u32 slot;                        /* of virtio_events */
    u32 pci, notify_step;            /* on PCI: the slot there, and where the rest is */
    u64 notify, config, isr;         /* isr: 0 if interrupts are messages */
};

/* A buffer of a request: len bytes at addr, which the device fills if write is set. */
struct vbuf { void *addr; u32 len; bool write; };

struct vq {
    struct vdesc desc[VQ_MAX] __attribute__((aligned(16)));
    struct { u16 flags, idx, ring[VQ_MAX], used_event; } avail;
    struct { u16 flags, idx; struct { u32 id, len; } ring[VQ_MAX]; u16 avail_event; } used __attribute__((aligned(4)));
    struct vdesc table[VQ_MAX][4] __attribute__((aligned(16)));  /* indirect: one for each head */
    void *token[VQ_MAX];           /* what vq_add was given, by head */
    u16 free[VQ_MAX], free_count;  /* a stack of descriptors */
    u16 count[VQ_MAX];             /* descriptors of a request, by head */
    u16 used_idx, kicked;
    u32 index, size;
    u64 notify;
    struct vdev *dev;
};

bool virtio_find(struct vdev *d, u32 type, u32 nth);      /* the nth device of the type, from 0; on
                                                             virtio-mmio, else on PCI */
bool virtio_pci_find(struct vdev *d, u32 type, u32 nth);
void virtio_negotiate(struct vdev *d, u64 features);      /* reset; take those that are offered */
void *ram_alloc(u64 size);                                /* zeroed, page-aligned */
struct vq *vq_new(struct vdev *d, u32 index, u32 size);   /* size 0: as large as can be */
void virtio_ready(struct vdev *d);
u32 virtio_config(struct vdev *d, u32 offset);
void virtio_ack(struct vdev *d);
bool vq_add(struct vq *q, const struct vbuf *bufs, u32 n, void *token);  /* false: it is full */
void vq_kick(struct vq *q);                               /* if the device wants that */
void *vq_reap(struct vq *q, u32 *len);                    /* a finished request's token, or 0 */
void *vq_wait(struct vq *q, u32 *len);                    /* the same; halts until there is one */
#endif
