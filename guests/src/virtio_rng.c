/* virtio-rng: random bytes by virtio. Each round asks for several buffers of different lengths at
 * once; all must come back full, none twice the same, and nothing beside them may change. */
#include "virtio.h"

#define BUFFERS 4
#define SPACE 256
#define GUARD 0xa5

static struct vdev dev;
static struct vq *queue;
static u8 space[BUFFERS][SPACE];
static u64 last[BUFFERS];

static u32 length(u64 round, u32 i) { return 16 + (u32)(round * 37 + i * 61) % 200; }

static void check(u64 round, u32 i, u32 got)
{
    u32 want = length(round, i);
    u64 first;
    if (got != want)
        fail("buffer %u: %u bytes of %u", i, got, want);
    memcpy(&first, space[i] + 8, sizeof first);
    if (first == last[i] || first == 0x0101010101010101ul * GUARD)
        fail("buffer %u: %lx is not random", i, first);
    last[i] = first;
    for (u32 at = 0; at < SPACE; at++)
        if ((at < 8 || at >= 8 + want) && space[i][at] != GUARD)
            fail("buffer %u: byte %u was overwritten", i, at);
}

void virtio_rng(void)
{
    u64 step = opt_num("step", 256);
    if (!virtio_find(&dev, 4, (u32)opt_num("nth", 0)))
        fail("there is no entropy device");
    virtio_negotiate(&dev, 0);
    queue = vq_new(&dev, 0, 0);
    virtio_ready(&dev);
    for (u64 round = 1;; round++) {
        for (u32 i = 0; i < BUFFERS; i++) {
            u32 half = length(round, i) / 2;
            memset(space[i], GUARD, SPACE);
            /* Whole, or in two parts, which makes it an indirect table. */
            struct vbuf bufs[2] = {{space[i] + 8, half, 1}, {space[i] + 8 + half, length(round, i) - half, 1}};
            if (i & 1)
                bufs[0].len = length(round, i);
            if (!vq_add(queue, bufs, i & 1 ? 1 : 2, space[i]))
                fail("the queue is full");
        }
        vq_kick(queue);
        for (u32 n = 0; n < BUFFERS; n++) {
            u32 got;
            u8 *token = vq_wait(queue, &got);
            check(round, (u32)((u64)(token - space[0]) / SPACE), got);
        }
        if (round % step == 0)
            print("rng %lu\n", round);
        if (last_round(round / step))
            return;
    }
}
