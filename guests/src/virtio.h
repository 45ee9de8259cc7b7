/* virtio 1.3 for drivers: devices on virtio-mmio, or on PCI if there
 * are none or the option pci says so; split virtqueues, with
 * event-idx and indirect descriptors where they are offered. One CPU a queue at a time. */
#ifndef VIRTIO_H
#define VIRTIO_H
#include "kernel.h"

#define VIRTIO_MMIO 0xfeb00000ul  /* slots of 0x200 bytes, interrupts from IOAPIC pin 16 on */
#define VIRTIO_SLOTS 8
#define VIRTIO_MAX 32             /* devices, on either bus */
#define VQ_MAX 256                /* entries of a queue, at most */

/* Registers that both buses have, each at its own offset; CONFIG_VECTOR and VECTOR are PCI's alone. */
enum { V_FEATURES_SEL, V_FEATURES, V_ACCEPT_SEL, V_ACCEPT, V_CONFIG_VECTOR, V_STATUS, V_GENERATION,
       V_QUEUE_SEL, V_SIZE_MAX, V_SIZE, V_VECTOR, V_READY, V_DESC, V_AVAIL, V_USED, V_REGISTERS };
#define NO_VECTOR 0xffff
enum { S_ACKNOWLEDGE = 1, S_DRIVER = 2, S_DRIVER_OK = 4, S_FEATURES_OK = 8, S_NEEDS_RESET = 64 };
#define VF_INDIRECT (1ul << 28)
#define VF_EVENT_IDX (1ul << 29)
#define VF_VERSION_1 (1ul << 32)

struct vdesc { u64 addr; u32 len; u16 flags, next; };
enum { VD_NEXT = 1, VD_WRITE = 2, VD_INDIRECT = 4 };

struct face;                     /* where a bus has the registers */
struct vdev {
    const struct face *face;
    u64 base, isr, config, notify; /* addresses of the parts */
    u64 features, table;           /* table: of MSI-X, if the device has entries of it */
    u32 number, entries, line;     /* line: the vector of its interrupt line */
    u32 function, notify_step;     /* of PCI */
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
    u32 index, size, vector;
    u64 notify;
    struct vdev *dev;
};

bool virtio_open(struct vdev *d, u32 number);             /* device by device, in order; 0: no more */
u32 virtio_type(struct vdev *d);
bool virtio_find(struct vdev *d, u32 type, u32 nth);      /* the nth device of the type, from 0 */
u64 v_at(struct vdev *d, u32 reg);                        /* a register's address */
u32 v_get(struct vdev *d, u32 reg);
void v_set(struct vdev *d, u32 reg, u32 value);
void virtio_negotiate(struct vdev *d, u64 features);      /* reset; take those that are offered */
void *ram_alloc(u64 size);                                /* zeroed, page-aligned */
struct vq *vq_new(struct vdev *d, u32 index, u32 size);   /* size 0: as large as can be */
void virtio_ready(struct vdev *d);
u32 virtio_config(struct vdev *d, u32 offset);
void virtio_ack(struct vdev *d);
u64 vq_notify_at(struct vdev *d, u32 index);              /* where a queue of that number is kicked */
bool vq_add(struct vq *q, const struct vbuf *bufs, u32 n, void *token);  /* false: it is full */
void vq_kick(struct vq *q);                               /* if the device wants that */
void *vq_reap(struct vq *q, u32 *len);                    /* a finished request's token, or 0 */
void *vq_wait(struct vq *q, u32 *len);                    /* the same; halts until there is one */
#endif
