/* virtio-attack: an evil guest. The first entropy device is the witness: it must work all the time.
 * All other virtio devices get registers and rings that no driver would write, and another CPU, if
 * there is one, changes the rings while they are looked at. After each volley the victim must come
 * back with a reset. What devices may write to is kept off the image by aim: addresses are those of
 * a playground, or of no RAM at all. */
#include "virtio.h"

#define PLAYGROUND (1u << 20)

static struct vdev witness;
static struct vq *witness_queue;
static u8 *playground, *witness_buffer;
static u64 seed;
static volatile u32 over;

static u64 random(void)
{
    seed ^= seed << 13;
    seed ^= seed >> 7;
    return seed ^= seed << 17;
}

static u64 pick(const u64 *from, u32 n) { return from[random() % n]; }
#define PICK(...) pick((const u64[]){__VA_ARGS__}, sizeof((u64[]){__VA_ARGS__}) / 8)

/* In the playground, on registers, at the end of RAM, or nowhere. */
static u64 address(void)
{
    u64 inside = (u64)playground + random() % PLAYGROUND / 2;
    struct range last = ram[ram_count - 1];
    return PICK(inside, inside, inside & ~15ul, inside & ~4095ul, VIRTIO_MMIO + random() % 0x1000,
                LAPIC, IOAPIC, last.start + last.size - random() % 64, last.start + last.size,
                random() | 1ul << 63, ~0ul - random() % 64, random() << 40 | 1ul << 39);
}

static void write_any(u64 at, u64 value)
{
    switch (random() % 8) {
    case 0: asm volatile("movb %b0, (%1)" ::"q"(value), "r"(at) : "memory"); break;
    case 1: asm volatile("movw %w0, (%1)" ::"r"(value), "r"(at) : "memory"); break;
    case 2: asm volatile("movq %0, (%1)" ::"r"(value), "r"(at) : "memory"); break;
    default: mmio_write(at, (u32)value);
    }
}

static void registers(struct vdev *d)
{
    for (u32 i = 0; i < 24; i++) {
        u64 at = PICK(V_STATUS, V_STATUS, V_QUEUE_SEL, V_SIZE, V_READY, V_NOTIFY, V_ACCEPT, V_ACCEPT_SEL,
                      V_FEATURES_SEL, V_ACK, V_DESC, V_DESC + 4, V_AVAIL, V_USED, V_USED + 4,
                      random() % 0x1f8);
        u64 value = PICK(0, 1, 2, 3, 4, 8, 15, 11, 0xff, 64, 256, 65535, 0x80000000, 0xffffffff);
        if (at >= V_DESC && at < V_DESC + 0x30)
            value = at & 4 ? PICK(0, 0, 0, 0xffffffff) : address();
        if (at < V_CONFIG)
            write_any(d->base + at, value);
        else  /* a console prints what is written to its configuration */
            mmio_read(d->base + (at & ~3ul));
        if (!(random() & 3))
            mmio_read(d->base + random() % 0x200);
    }
}

/* A descriptor table with chains that are nearly right, or not at all. */
static void scribble(struct vdesc *table, u32 n)
{
    for (u32 i = 0; i < n; i++) {
        table[i].addr = address();
        table[i].len = (u32)PICK(0, 1, 8, 16, 16, 32, 512, 4096, 16 * 1025, 0x7fffffff, 0xffffffff);
        table[i].flags = (u16)PICK(0, VD_WRITE, VD_NEXT, VD_NEXT, VD_NEXT | VD_WRITE, VD_INDIRECT,
                                   VD_INDIRECT | VD_NEXT, random());
        table[i].next = (u16)PICK(i, i + 1, 0, random() % n, n, 0xffff);
    }
}

/* A driver as it should be, up to the rings; these lie in the playground, one behind the other. */
static void rings(struct vdev *d)
{
    u64 at = (u64)playground;
    virtio_negotiate(d, random() & random() & 0xffffff);
    for (u32 index = 0; index < 8; index++) {
        mmio_write(d->base + V_QUEUE_SEL, index);
        u32 size = mmio_read(d->base + V_SIZE_MAX);
        if (!size)
            break;
        size = size > 16 ? 16 : size;
        u16 *avail = (u16 *)(at + 16 * size);
        scribble((struct vdesc *)at, size);
        avail[0] = (u16)(random() & 1);
        avail[1] = (u16)PICK(1, 1, size, random() % size, size + 1, 0xffff, random());
        for (u32 i = 0; i <= size; i++)
            avail[2 + i] = (u16)PICK(i % size, random() % size, 0, size, 0xffff);
        mmio_write(d->base + V_SIZE, size);
        mmio_write(d->base + V_DESC, (u32)at);
        mmio_write(d->base + V_AVAIL, (u32)(at + 16 * size));
        mmio_write(d->base + V_USED, (u32)(at + 1024));
        mmio_write(d->base + V_READY, 1);
        at += 4096;
    }
    virtio_ready(d);
    for (u32 i = 0; i < 12; i++) {
        mmio_write(d->base + V_NOTIFY, (u32)(random() % 8));
        /* More of the same while the device may be working on it. */
        u64 queue = (u64)playground + random() % 8 * 4096;
        scribble((struct vdesc *)queue, 4);
        ((u16 *)(queue + 16 * 16))[1] += (u16)(random() % 3);
    }
    if (!(random() & 3))
        registers(d);
}

static void ask_witness(void)
{
    u32 len;
    struct vbuf buf = {witness_buffer, 64, 1};
    if (!vq_add(witness_queue, &buf, 1, witness_buffer))
        fail("the witness has no room");
    vq_kick(witness_queue);
    if (!vq_wait(witness_queue, &len) || len != 64)
        fail("the witness gives %u bytes", len);
}

static void check_reset(struct vdev *d)
{
    mmio_write(d->base + V_STATUS, 0);
    if (mmio_read(d->base + V_STATUS) || mmio_read(d->base + V_ISR))
        fail("slot %u does not come back: status %x", d->slot, mmio_read(d->base + V_STATUS));
    virtio_negotiate(d, 0);
    mmio_write(d->base + V_QUEUE_SEL, 0);
    if (mmio_read(d->base + V_READY))
        fail("slot %u keeps a queue over its reset", d->slot);
    mmio_write(d->base + V_STATUS, 0);
}

static void job(u32 cpu)
{
    if (cpu) {  /* random() is CPU 0's */
        for (u64 x = 88172645463325252ul; !over; x = x * 6364136223846793005ul + 1442695040888963407ul) {
            volatile u16 *at = (u16 *)(playground + (x >> 33) % 8 * 4096) + (x >> 40) % 300;
            *at = x >> 63 ? (u16)((x >> 50) & 15) : (u16)(x >> 48);
        }
        return;
    }
    u64 step = opt_num("step", 64), rounds = 0, broken = 0;
    struct vdev victims[VIRTIO_SLOTS];
    u32 count = 0;
    for (u32 slot = 0; slot < VIRTIO_SLOTS; slot++) {
        u64 base = VIRTIO_MMIO + slot * 0x200;
        if (slot != witness.slot && mmio_read(base) == 0x74726976)
            victims[count++] = (struct vdev){.base = base, .slot = slot};
    }
    if (!count)
        fail("there is no victim");
    do {
        for (u32 i = 0; i < step; i++) {
            struct vdev *d = &victims[random() % count];
            if (random() & 1)
                registers(d);
            else
                rings(d);
            ask_witness();
            broken += (mmio_read(d->base + V_STATUS) & S_NEEDS_RESET) != 0;
            check_reset(d);
        }
        print("attack %lu broken %lu\n", ++rounds * step, broken);
    } while (!last_round(rounds));
    over = 1;
}

void virtio_attack(void)
{
    seed = opt_num("seed", 0x9e3779b97f4a7c15ul) | 1;
    if (!virtio_find(&witness, 4, 0))
        fail("there is no entropy device");
    virtio_negotiate(&witness, 0);
    witness_queue = vq_new(&witness, 0, 0);
    virtio_ready(&witness);
    witness_buffer = ram_alloc(4096);
    playground = ram_alloc(PLAYGROUND);
    smp_run(job);
}
