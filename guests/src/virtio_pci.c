/* The registers of virtio devices on PCI (virtio 1.3, 4.1); see virtio.h. Interrupts are messages,
 * or with the option intx the line, which the handler ends in ring 0. */
#include "virtio.h"
#include "pci.h"

enum { C_FEATURES_SEL = 0, C_FEATURES = 4, C_ACCEPT_SEL = 8, C_ACCEPT = 0xc, C_CONFIG_VECTOR = 0x10,
       C_QUEUES = 0x12, C_STATUS = 0x14, C_QUEUE_SEL = 0x16, C_SIZE = 0x18, C_VECTOR = 0x1a,
       C_ENABLE = 0x1c, C_NOTIFY_OFF = 0x1e, C_DESC = 0x20, C_AVAIL = 0x28, C_USED = 0x30 };

static u32 status(struct vdev *d) { return mmio_read8(d->base + C_STATUS); }
static void set_status(struct vdev *d, u32 value) { mmio_write8(d->base + C_STATUS, (u8)value); }
static u32 config(struct vdev *d, u32 offset) { return mmio_read(d->config + offset); }
static void ack(struct vdev *d) { (void)d; }

static u32 features(struct vdev *d, u32 word)
{
    mmio_write(d->base + C_FEATURES_SEL, word);
    return mmio_read(d->base + C_FEATURES);
}

static void accept(struct vdev *d, u32 word, u32 bits)
{
    mmio_write(d->base + C_ACCEPT_SEL, word);
    mmio_write(d->base + C_ACCEPT, bits);
    if (mmio_read(d->base + C_ACCEPT) != bits)
        fail("PCI slot %u: features %x are not read back", d->pci, bits);
}

static u32 queue_max(struct vdev *d, u32 index)
{
    mmio_write16(d->base + C_QUEUE_SEL, (u16)index);
    return mmio_read16(d->base + C_SIZE);
}

static void write64(u64 at, const void *p)
{
    mmio_write(at, (u32)(u64)p);
    mmio_write(at + 4, (u32)((u64)p >> 32));
}

static bool queue_set(struct vq *q)
{
    u64 base = q->dev->base;
    mmio_write16(base + C_QUEUE_SEL, (u16)q->index);
    mmio_write16(base + C_SIZE, (u16)q->size);
    write64(base + C_DESC, q->desc);
    write64(base + C_AVAIL, &q->avail);
    write64(base + C_USED, &q->used);
    if (!q->dev->isr) {
        pci_msix(q->dev->pci, q->index + 1, VEC_VIRTIO + q->dev->slot);
        mmio_write16(base + C_VECTOR, (u16)(q->index + 1));
        if (mmio_read16(base + C_VECTOR) != q->index + 1)
            fail("PCI slot %u queue %u takes no vector", q->dev->pci, q->index);
    }
    q->notify = q->dev->notify + mmio_read16(base + C_NOTIFY_OFF) * q->dev->notify_step;
    mmio_write16(base + C_ENABLE, 1);
    return mmio_read16(base + C_ENABLE) == 1;
}

static void notify(struct vq *q) { mmio_write16(q->notify, (u16)q->index); }

static void interrupts(struct vdev *d)
{
    if (d->isr) {
        virtio_isr[d->slot] = (volatile u8 *)d->isr;
        pci_line(d->pci, VEC_VIRTIO + d->slot);
        return;
    }
    pci_msix(d->pci, 0, VEC_VIRTIO + d->slot);
    mmio_write16(d->base + C_CONFIG_VECTOR, 0);
}

static const struct vface face = {status, set_status, features, accept, queue_max, queue_set, notify,
                                  config, ack, interrupts};

static u64 place(u32 slot, u32 at) { return pci_bar(slot, pci_read(slot, at + 4, 1)) + pci_read(slot, at + 8, 4); }

bool virtio_pci_find(struct vdev *d, u32 type, u32 nth)
{
    u32 number = 0;
    for (u32 slot = 1; slot < 32; slot++) {
        u32 id = pci_read(slot, PCI_ID, 4);
        if ((id & 0xffff) != 0x1af4 || id >> 16 < 0x1040)
            continue;
        if (id >> 16 != 0x1040 + type || nth--) {
            number++;
            continue;
        }
        u64 isr = 0;
        *d = (struct vdev){.face = &face, .pci = slot, .slot = number % VIRTIO_SLOTS};
        for (u32 at = pci_capability(slot, 9, 0); at; at = pci_capability(slot, 9, at)) {
            u32 kind = pci_read(slot, at + 3, 1);
            if (kind == 1)
                d->base = place(slot, at);
            else if (kind == 2)
                d->notify = place(slot, at), d->notify_step = pci_read(slot, at + 16, 4);
            else if (kind == 3)
                isr = place(slot, at);
            else if (kind == 4)
                d->config = place(slot, at);
        }
        if (!d->base || !d->notify || !isr || !d->config)
            fail("PCI slot %u lacks a capability", slot);
        if (opt("intx"))
            d->isr = isr;
        return 1;
    }
    return 0;
}
