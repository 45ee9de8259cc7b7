/* virtio-mmio and split virtqueues; see virtio.h. The rings' memory is guest-physical = virtual. */
#include "virtio.h"

#define FENCE() __atomic_thread_fence(__ATOMIC_SEQ_CST)
#define READ(x) (*(volatile __typeof__(x) *)&(x))
#define WRITE(x, v) (*(volatile __typeof__(x) *)&(x) = (v))

static u32 status(struct vdev *d) { return mmio_read(d->base + V_STATUS); }
static void set_status(struct vdev *d, u32 value) { mmio_write(d->base + V_STATUS, value); }
static void notify(struct vq *q) { mmio_write(q->dev->base + V_NOTIFY, q->index); }
static u32 config(struct vdev *d, u32 offset) { return mmio_read(d->base + V_CONFIG + offset); }
static void irq_enable_mmio(struct vdev *d) { virtio_irq_enable(d->slot); }

static u32 features(struct vdev *d, u32 word)
{
    mmio_write(d->base + V_FEATURES_SEL, word);
    return mmio_read(d->base + V_FEATURES);
}

static void accept(struct vdev *d, u32 word, u32 bits)
{
    mmio_write(d->base + V_ACCEPT_SEL, word);
    mmio_write(d->base + V_ACCEPT, bits);
}

static void ack(struct vdev *d)
{
    u32 isr = mmio_read(d->base + V_ISR);
    if (isr)
        mmio_write(d->base + V_ACK, isr);
}

static u32 queue_max(struct vdev *d, u32 index)
{
    mmio_write(d->base + V_QUEUE_SEL, index);
    return mmio_read(d->base + V_SIZE_MAX);
}

static void write64(u64 at, const void *p)
{
    mmio_write(at, (u32)(u64)p);
    mmio_write(at + 4, (u32)((u64)p >> 32));
}

static bool queue_set(struct vq *q)
{
    u64 base = q->dev->base;
    mmio_write(base + V_QUEUE_SEL, q->index);
    mmio_write(base + V_SIZE, q->size);
    write64(base + V_DESC, q->desc);
    write64(base + V_AVAIL, &q->avail);
    write64(base + V_USED, &q->used);
    mmio_write(base + V_READY, 1);
    return mmio_read(base + V_READY);
}

static const struct vface mmio = {status, set_status, features, accept, queue_max, queue_set, notify,
                                  config, ack, irq_enable_mmio};

bool virtio_find(struct vdev *d, u32 type, u32 nth)
{
    for (u32 slot = 0; slot < VIRTIO_SLOTS; slot++) {
        u64 base = VIRTIO_MMIO + slot * 0x200;
        if (mmio_read(base + V_MAGIC) != 0x74726976 || mmio_read(base + V_VERSION) != 2)
            break;
        if (mmio_read(base + V_DEVICE) == type && !nth--) {
            *d = (struct vdev){.face = &mmio, .base = base, .slot = slot};
            return 1;
        }
    }
    return virtio_pci_find(d, type, nth);
}

void virtio_negotiate(struct vdev *d, u64 wanted)
{
    wanted |= VF_VERSION_1 | VF_EVENT_IDX | VF_INDIRECT;
    d->face->set_status(d, 0);
    while (d->face->status(d))
        cpu_relax();
    d->face->set_status(d, S_ACKNOWLEDGE);
    d->face->set_status(d, S_ACKNOWLEDGE | S_DRIVER);
    d->features = 0;
    for (u32 word = 0; word < 2; word++) {
        u32 taken = d->face->features(d, word) & (u32)(wanted >> 32 * word);
        d->face->accept(d, word, taken);
        d->features |= (u64)taken << 32 * word;
    }
    d->face->set_status(d, S_ACKNOWLEDGE | S_DRIVER | S_FEATURES_OK);
    if (!(d->face->status(d) & S_FEATURES_OK))
        fail("virtio slot %u refuses features %lx", d->slot, d->features);
    d->face->irq_enable(d);
}

/* The image is full: what is large lies in the RAM behind it. Never given back. */
void *ram_alloc(u64 size)
{
    static u64 next = (FREE_RAM + 4095) & ~4095ul;
    u64 start = next;
    next = (next + size + 4095) & ~4095ul;
    for (u32 i = 0; i < ram_count; i++)
        if (start >= ram[i].start && next <= ram[i].start + ram[i].size)
            return memset((void *)start, 0, size);
    fail("no RAM for %lu bytes at 0x%lx", size, start);
}

struct vq *vq_new(struct vdev *d, u32 index, u32 size)
{
    struct vq *q = ram_alloc(sizeof *q);
    u32 most = d->face->queue_max(d, index);
    most = most < VQ_MAX ? most : VQ_MAX;
    q->dev = d;
    q->index = index;
    q->size = size && size < most ? size : most;
    for (u32 i = 0; i < q->size; i++)
        q->free[q->free_count++] = (u16)(q->size - 1 - i);
    if (!d->face->queue_set(q))
        fail("virtio slot %u queue %u of %u is not ready", d->slot, index, q->size);
    return q;
}

void virtio_ready(struct vdev *d)
{
    d->face->set_status(d, S_ACKNOWLEDGE | S_DRIVER | S_FEATURES_OK | S_DRIVER_OK);
}

u32 virtio_config(struct vdev *d, u32 offset) { return d->face->config(d, offset); }
void virtio_ack(struct vdev *d) { d->face->ack(d); }

/* The event fields come right behind the rings, whose length is the queue's. */
static u16 *used_event(struct vq *q) { return &q->avail.ring[q->size]; }
static u16 *avail_event(struct vq *q) { return (u16 *)&q->used.ring[q->size]; }

bool vq_add(struct vq *q, const struct vbuf *bufs, u32 n, void *token)
{
    bool indirect = q->dev->features & VF_INDIRECT && n > 1 && n <= 4;
    u32 need = indirect ? 1 : n;
    u16 slots[64];
    if (!n || n > 64 || q->free_count < need)
        return 0;
    for (u32 i = 0; i < need; i++)
        slots[i] = q->free[--q->free_count];
    u16 head = slots[0];
    for (u32 i = 0; i < n; i++) {
        struct vdesc *at = indirect ? &q->table[head][i] : &q->desc[slots[i]];
        bool more = i + 1 < n;
        at->addr = (u64)bufs[i].addr;
        at->len = bufs[i].len;
        at->flags = (u16)((bufs[i].write ? VD_WRITE : 0) | (more ? VD_NEXT : 0));
        at->next = (u16)(!more ? 0 : indirect ? i + 1 : slots[i + 1]);
    }
    if (indirect)
        q->desc[head] = (struct vdesc){(u64)q->table[head], n * (u32)sizeof(struct vdesc), VD_INDIRECT, 0};
    q->token[head] = token;
    q->count[head] = (u16)need;
    q->avail.ring[q->avail.idx % q->size] = head;
    __atomic_thread_fence(__ATOMIC_RELEASE);
    WRITE(q->avail.idx, (u16)(q->avail.idx + 1));
    return 1;
}

void vq_kick(struct vq *q)
{
    FENCE();
    u16 old = q->kicked, now = q->avail.idx;
    q->kicked = now;
    bool wanted = q->dev->features & VF_EVENT_IDX
        ? (u16)(now - READ(*avail_event(q)) - 1) < (u16)(now - old)
        : !(READ(q->used.flags) & 1);
    if (wanted)
        q->dev->face->notify(q);
}

void *vq_reap(struct vq *q, u32 *len)
{
    if (READ(q->used.idx) == q->used_idx)
        return 0;
    __atomic_thread_fence(__ATOMIC_ACQUIRE);
    u32 head = READ(q->used.ring[q->used_idx % q->size].id);
    *len = READ(q->used.ring[q->used_idx % q->size].len);
    q->used_idx++;
    if (head >= q->size || !q->token[head])
        fail("virtio slot %u queue %u returns %u, which is not under way", q->dev->slot, q->index, head);
    void *token = q->token[head];
    q->token[head] = 0;
    for (u16 i = 0, slot = (u16)head; i < q->count[head]; i++) {
        u16 next = q->desc[slot].next;
        q->free[q->free_count++] = slot;
        slot = next;
    }
    return token;
}

void *vq_wait(struct vq *q, u32 *len)
{
    for (;;) {
        u64 events = virtio_events[q->dev->slot];
        void *token = vq_reap(q, len);
        if (token)
            return token;
        WRITE(*used_event(q), q->used_idx);
        FENCE();
        if (READ(q->used.idx) != q->used_idx)
            continue;
        wait_change(&virtio_events[q->dev->slot], events);
        virtio_ack(q->dev);
        if (q->dev->face->status(q->dev) & S_NEEDS_RESET)
            fail("virtio slot %u needs a reset", q->dev->slot);
    }
}
