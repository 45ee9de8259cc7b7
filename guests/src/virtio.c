/* virtio devices and split virtqueues; see virtio.h. The rings' memory is guest-physical = virtual. */
#include "virtio.h"
#include "pci.h"

#define FENCE() __atomic_thread_fence(__ATOMIC_SEQ_CST)
#define READ(x) (*(volatile __typeof__(x) *)&(x))
#define WRITE(x, v) (*(volatile __typeof__(x) *)&(x) = (v))

struct face { struct { u8 at, width; } reg[V_REGISTERS]; };

static const struct face mmio_face = {{
    [V_FEATURES_SEL] = {0x14, 4}, [V_FEATURES] = {0x10, 4}, [V_ACCEPT_SEL] = {0x24, 4}, [V_ACCEPT] = {0x20, 4},
    [V_STATUS] = {0x70, 4}, [V_GENERATION] = {0xfc, 4}, [V_QUEUE_SEL] = {0x30, 4}, [V_SIZE_MAX] = {0x34, 4},
    [V_SIZE] = {0x38, 4}, [V_READY] = {0x44, 4}, [V_DESC] = {0x80, 4}, [V_AVAIL] = {0x90, 4}, [V_USED] = {0xa0, 4},
}};
/* The size is the largest one until the driver has chosen. */
static const struct face pci_face = {{
    [V_FEATURES_SEL] = {0x00, 4}, [V_FEATURES] = {0x04, 4}, [V_ACCEPT_SEL] = {0x08, 4}, [V_ACCEPT] = {0x0c, 4},
    [V_CONFIG_VECTOR] = {0x10, 2}, [V_STATUS] = {0x14, 1}, [V_GENERATION] = {0x15, 1}, [V_QUEUE_SEL] = {0x16, 2},
    [V_SIZE_MAX] = {0x18, 2}, [V_SIZE] = {0x18, 2}, [V_VECTOR] = {0x1a, 2}, [V_READY] = {0x1c, 2},
    [V_DESC] = {0x20, 4}, [V_AVAIL] = {0x28, 4}, [V_USED] = {0x30, 4},
}};
enum { MMIO_MAGIC = 0, MMIO_VERSION = 4, MMIO_DEVICE = 8, MMIO_NOTIFY = 0x50, MMIO_ISR = 0x60, MMIO_ACK = 0x64,
       MMIO_CONFIG = 0x100 };
enum { COMMON = 1, NOTIFY = 2, ISR = 3, DEVICE = 4 };  /* parts of a device on PCI */

u64 v_at(struct vdev *d, u32 reg) { return d->base + d->face->reg[reg].at; }

u32 v_get(struct vdev *d, u32 reg)
{
    u64 at = v_at(d, reg);
    u32 width = d->face->reg[reg].width;
    return width == 1 ? mmio_read8(at) : width == 2 ? mmio_read16(at) : mmio_read(at);
}

void v_set(struct vdev *d, u32 reg, u32 value)
{
    u64 at = v_at(d, reg);
    u32 width = d->face->reg[reg].width;
    if (width == 1)
        mmio_write8(at, (u8)value);
    else if (width == 2)
        mmio_write16(at, (u16)value);
    else
        mmio_write(at, value);
}

static void set64(struct vdev *d, u32 reg, const void *p)
{
    mmio_write(v_at(d, reg), (u32)(u64)p);
    mmio_write(v_at(d, reg) + 4, (u32)((u64)p >> 32));
}

static bool is_mmio(u64 base) { return mmio_read(base + MMIO_MAGIC) == 0x74726976 && mmio_read(base + MMIO_VERSION) == 2; }

static bool open_mmio(struct vdev *d, u32 number)
{
    u64 base = VIRTIO_MMIO + number * 0x200;
    if (number >= VIRTIO_SLOTS || !is_mmio(base))
        return 0;
    *d = (struct vdev){.face = &mmio_face, .base = base, .isr = base + MMIO_ISR, .config = base + MMIO_CONFIG,
                       .notify = base + MMIO_NOTIFY, .number = number, .line = VEC_DEVICE + number};
    return 1;
}

/* The part of a kind, of which the first capability tells. */
static u64 part(u32 function, u32 kind, u32 *found)
{
    for (u32 at = 0; (at = pci_capability(function, PCAP_VENDOR, at));)
        if (pci_read(function, at + 3, 1) == kind) {
            *found = at;
            return pci_bar(function, pci_read(function, at + 4, 1)) + pci_read(function, at + 8, 4);
        }
    fail("function %x has no part %u", function, kind);
}

static bool is_virtio(u32 function)
{
    u32 id = pci_read(function, P_ID, 4);
    return (u16)id == 0x1af4 && id >> 16 >= 0x1040 && id >> 16 < 0x1080;
}

static bool open_pci(struct vdev *d, u32 number)
{
    u32 function = 0, left = number + 1, at;
    for (; function < PCI_FUNCTIONS; function++)
        if (pci_exists(function) && is_virtio(function) && !--left)
            break;
    if (function == PCI_FUNCTIONS)
        return 0;
    *d = (struct vdev){.face = &pci_face, .number = number, .function = function};
    d->base = part(function, COMMON, &at);
    d->isr = part(function, ISR, &at);
    d->config = part(function, DEVICE, &at);
    d->notify = part(function, NOTIFY, &at);
    d->notify_step = pci_read(function, at + 16, 4);
    d->entries = opt("intx") ? 0 : pci_msix(function, &d->table);
    return 1;
}

bool virtio_open(struct vdev *d, u32 number)
{
    return (opt("pci") || !is_mmio(VIRTIO_MMIO) ? open_pci : open_mmio)(d, number);
}

u32 virtio_type(struct vdev *d)
{
    return d->face == &pci_face ? pci_read(d->function, P_ID + 2, 2) - 0x1040 : mmio_read(d->base + MMIO_DEVICE);
}

bool virtio_find(struct vdev *d, u32 type, u32 nth)
{
    for (u32 number = 0; virtio_open(d, number); number++)
        if (virtio_type(d) == type && !nth--)
            return 1;
    return 0;
}

static void interrupts(struct vdev *d)
{
    if (d->face == &mmio_face) {
        line_edge(16 + d->number, d->line);
    } else if (d->entries) {
        msix_set(d->table, 0, VEC_CHANGE);
        v_set(d, V_CONFIG_VECTOR, 0);
        if (v_get(d, V_CONFIG_VECTOR))
            fail("virtio %u takes no vector", d->number);
    } else if (!d->line) {
        d->line = line_level(pci_read(d->function, P_LINE, 1), d->isr);
    }
}

void virtio_negotiate(struct vdev *d, u64 features)
{
    features |= VF_VERSION_1 | VF_EVENT_IDX | VF_INDIRECT;
    v_set(d, V_STATUS, 0);
    while (v_get(d, V_STATUS))
        cpu_relax();
    v_set(d, V_STATUS, S_ACKNOWLEDGE);
    v_set(d, V_STATUS, S_ACKNOWLEDGE | S_DRIVER);
    d->features = 0;
    for (u32 word = 0; word < 2; word++) {
        v_set(d, V_FEATURES_SEL, word);
        u32 taken = v_get(d, V_FEATURES) & (u32)(features >> 32 * word);
        v_set(d, V_ACCEPT_SEL, word);
        v_set(d, V_ACCEPT, taken);
        d->features |= (u64)taken << 32 * word;
    }
    v_set(d, V_STATUS, S_ACKNOWLEDGE | S_DRIVER | S_FEATURES_OK);
    if (!(v_get(d, V_STATUS) & S_FEATURES_OK))
        fail("virtio %u refuses features %lx", d->number, d->features);
    interrupts(d);
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

u64 vq_notify_at(struct vdev *d, u32 index)
{
    v_set(d, V_QUEUE_SEL, index);
    return d->notify + d->notify_step * (d->notify_step ? mmio_read16(d->base + 0x1e) : 0);
}

/* A vector of its own; without MSI-X that of the device's line. */
static u32 vector_of(struct vdev *d, u32 index)
{
    static u8 vectors[VIRTIO_MAX][64];
    if (!d->entries)
        return d->line;
    u32 entry = 1 + index < d->entries ? 1 + index : d->entries - 1;
    u8 *vector = &vectors[d->number % VIRTIO_MAX][entry % 64];
    *vector = *vector ? *vector : (u8)vector_new();
    msix_set(d->table, entry, *vector);
    v_set(d, V_VECTOR, entry);
    if (v_get(d, V_VECTOR) != entry)
        fail("virtio %u queue %u takes no vector", d->number, index);
    return *vector;
}

struct vq *vq_new(struct vdev *d, u32 index, u32 size)
{
    struct vq *q = ram_alloc(sizeof *q);
    q->notify = vq_notify_at(d, index);
    u32 most = v_get(d, V_SIZE_MAX);
    most = most < VQ_MAX ? most : VQ_MAX;
    q->dev = d;
    q->index = index;
    q->size = size && size < most ? size : most;
    for (u32 i = 0; i < q->size; i++)
        q->free[q->free_count++] = (u16)(q->size - 1 - i);
    v_set(d, V_SIZE, q->size);
    q->vector = vector_of(d, index);
    set64(d, V_DESC, q->desc);
    set64(d, V_AVAIL, &q->avail);
    set64(d, V_USED, &q->used);
    v_set(d, V_READY, 1);
    if (!v_get(d, V_READY))
        fail("virtio %u queue %u of %u is not ready", d->number, index, q->size);
    return q;
}

void virtio_ready(struct vdev *d)
{
    v_set(d, V_STATUS, S_ACKNOWLEDGE | S_DRIVER | S_FEATURES_OK | S_DRIVER_OK);
}

u32 virtio_config(struct vdev *d, u32 offset) { return mmio_read(d->config + offset); }

/* Nothing is left to do on PCI: messages need it not, and a line is ended by the interrupt's handler. */
void virtio_ack(struct vdev *d)
{
    u32 isr = d->face == &mmio_face ? mmio_read(d->isr) : 0;
    if (isr)
        mmio_write(d->base + MMIO_ACK, isr);
}

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
    if (!wanted)
        return;
    if (q->dev->face == &mmio_face)
        mmio_write(q->notify, q->index);
    else
        mmio_write16(q->notify, (u16)q->index);
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
        fail("virtio %u queue %u returns %u, which is not under way", q->dev->number, q->index, head);
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
        u64 events = device_events[q->vector];
        void *token = vq_reap(q, len);
        if (token)
            return token;
        WRITE(*used_event(q), q->used_idx);
        FENCE();
        if (READ(q->used.idx) != q->used_idx)
            continue;
        wait_change(&device_events[q->vector], events);
        virtio_ack(q->dev);
        if (v_get(q->dev, V_STATUS) & S_NEEDS_RESET)
            fail("virtio %u needs a reset", q->dev->number);
    }
}
