/* virtio-blk: a disk by virtio. Each pass writes every block anew with what only that block and
 * that pass have, several requests under way, and reads it back; the pass before is checked before it is
 * overwritten. Then a flush. Read-only disks are checked for pass 0. Arguments: disk=N the nth disk,
 * depth=N requests under way, kb=N of each, mb=N of the disk, zero: write-zeroes and discard, too.
 * count: the other CPUs count meanwhile, as the program counter does.
 * bench=read or write: none of this, but as many requests as can be in ms=N, anywhere or (seq) in order;
 * how many they are is in the shared counter page all along. */
#include "virtio.h"

#define MAX_DEPTH 64
#define SECTOR 512
enum { IN = 0, OUT = 1, FLUSH = 4, GET_ID = 8, DISCARD = 11, WRITE_ZEROES = 13 };
enum { F_RO = 1 << 5, F_FLUSH = 1 << 9, F_CONFIG_WCE = 1 << 11, F_DISCARD = 1 << 13, F_ZEROES = 1 << 14 };

struct request {
    struct { u32 type, reserved; u64 sector; } header;
    u8 status;
    u32 number;      /* which block of the disk */
    u8 *data;
};

static struct vdev dev;
static struct vq *queue;
static struct request requests[MAX_DEPTH], single;
static u32 depth, size, blocks;
static bool zeroes;
static const char *const verbs[] = {"read", "write"};

static inline u64 pattern(u64 word, u64 pass)
{
    u64 v = (word + pass * 0x9e3779b97f4a7c15ul) * 0xff51afd7ed558ccdul;
    return v ^ v >> 32;
}

/* In every pass one block of 8 is zeroed and not written. */
static bool is_zeroed(u32 number, u64 pass) { return zeroes && pass && number % 8 == pass % 8; }

static void fill(struct request *r, u64 pass)
{
    u64 *words = (u64 *)r->data, first = (u64)r->number * (size / 8);
    for (u32 i = 0; i < size / 8; i++)
        words[i] = pattern(first + i, pass);
}

static void check(struct request *r, u64 pass)
{
    u64 *words = (u64 *)r->data, first = (u64)r->number * (size / 8);
    for (u32 i = 0; i < size / 8; i++) {
        u64 want = is_zeroed(r->number, pass) ? 0 : pattern(first + i, pass);
        if (words[i] != want)
            fail("pass %lu block %u word %u want=0x%lx got=0x%lx", pass, r->number, i, want, words[i]);
    }
}

static void submit(struct request *r, u32 type, u64 sector, void *data, u32 length)
{
    struct vbuf bufs[3] = {{&r->header, 16, 0}, {data, length, type == IN || type == GET_ID}, {&r->status, 1, 1}};
    r->header.type = type;
    r->header.sector = sector;
    r->status = 0xff;
    if (!length)
        bufs[1] = bufs[2];
    if (!vq_add(queue, bufs, length ? 3 : 2, r))
        fail("the queue is full");
}

static struct request *wait(void)
{
    u32 got;
    return vq_wait(queue, &got);
}

/* One request alone; its status. */
static u8 request(u32 type, u64 sector, void *data, u32 length)
{
    submit(&single, type, sector, data, length);
    vq_kick(queue);
    if (wait() != &single)
        fail("another request came back");
    return single.status;
}

static void block_start(struct request *r, u32 type, u32 number, u64 pass)
{
    r->number = number;
    if (type == OUT)
        fill(r, pass);
    else
        memset(r->data, 0xa5, size);
    submit(r, type, (u64)number * (size / SECTOR), r->data, size);
}

/* All blocks, depth of them at a time; they may come back in any order. */
static void all(u32 type, u64 pass)
{
    u32 next = 0, under_way = 0;
    while (next < blocks && under_way < depth) {
        if (type == OUT && is_zeroed(next, pass)) {
            next++;
            continue;
        }
        block_start(&requests[under_way++], type, next++, pass);
    }
    vq_kick(queue);
    while (under_way) {
        struct request *r = wait();
        if (r->status)
            fail("pass %lu %s of block %u: status %u", pass, verbs[type], r->number, r->status);
        if (type == IN)
            check(r, pass);
        while (type == OUT && next < blocks && is_zeroed(next, pass))
            next++;
        if (next < blocks) {
            block_start(r, type, next++, pass);
            vq_kick(queue);
        } else {
            under_way--;
        }
    }
}

static void zero_blocks(u64 pass)
{
    static struct { u64 sector; u32 count, flags; } range;
    for (u32 number = (u32)(pass % 8); number < blocks; number += 8) {
        range.sector = (u64)number * (size / SECTOR);
        range.count = size / SECTOR;
        range.flags = number & 8 ? 1 : 0;
        /* What was discarded may read as anything, so it is zeroed as well. */
        if (dev.features & F_DISCARD && number & 16) {
            range.flags = 0;
            if (request(DISCARD, 0, &range, sizeof range))
                fail("discard of block %u: status %u", number, single.status);
        }
        if (request(WRITE_ZEROES, 0, &range, sizeof range))
            fail("write-zeroes of block %u: status %u", number, single.status);
    }
}

/* Requests that a device must refuse, and go on. */
static void refused(u64 capacity)
{
    u8 *data = requests[0].data;
    if (request(IN, capacity, data, SECTOR) != 1 || request(IN, ~0ul, data, SECTOR) != 1)
        fail("reading beyond the end: status %u", single.status);
    if (request(OUT, capacity, data, SECTOR) != 1)
        fail("writing beyond the end: status %u", single.status);
    if (request(77, 0, data, SECTOR) != 2)
        fail("unknown request: status %u", single.status);
    if (dev.features & F_RO && request(OUT, 0, data, SECTOR) != 1)
        fail("writing a read-only disk: status %u", single.status);
}

static void bench(u32 type)
{
    u64 done = 0, seed = 1, start, length, took = 0;
    u32 next = 0, under_way;
    bool seq = opt("seq");
    calibrate();
    length = opt_num("ms", 1000) * (tsc_hz / 1000);
    start = rdtsc();
    for (under_way = 0; under_way < depth; under_way++)
        submit(&requests[under_way], type, (u64)(next++ % blocks) * (size / SECTOR), requests[under_way].data, size);
    vq_kick(queue);
    while (under_way) {
        struct request *r = wait();
        if (r->status)
            fail("bench: status %u", r->status);
        *(volatile u64 *)COUNTER_PAGE = ++done;
        took = rdtsc() - start;
        if (took >= length) {
            under_way--;
            continue;
        }
        seed = seed * 6364136223846793005ul + 1442695040888963407ul;
        submit(r, type, (u64)(seq ? next++ % blocks : (seed >> 33) % blocks) * (size / SECTOR), r->data, size);
        vq_kick(queue);
    }
    print("blk bench %lu requests of %u in %lu ms\n", done, size, took / (tsc_hz / 1000));
}

/* Pass after pass, on CPU 0. */
static void work(bool readonly)
{
    /* keep: the disk holds pass N, from a run before. */
    u64 pass = opt_num("keep", 0);
    if (!readonly && !opt("keep"))
        all(OUT, pass);
    for (;;) {
        all(IN, pass);
        print("blk pass %lu ok\n", pass);
        if (last_round(pass))
            return;
        if (readonly)
            continue;
        pass++;
        all(OUT, pass);
        if (zeroes)
            zero_blocks(pass);
        if (request(FLUSH, 0, 0, 0))
            fail("flush: status %u", single.status);
    }
}

static void pass_or_count(u32 cpu)
{
    volatile u64 *value = (volatile u64 *)COUNTER_PAGE;
    if (!cpu)
        work(dev.features & F_RO);
    else
        for (;;)
            ++*value;
}

void virtio_blk(void)
{
    static char id[21];
    if (!virtio_find(&dev, 2, (u32)opt_num("disk", 0)))
        fail("there is no such disk");
    virtio_negotiate(&dev, F_RO | F_FLUSH | F_CONFIG_WCE | F_DISCARD | F_ZEROES);
    queue = vq_new(&dev, 0, 0);
    virtio_ready(&dev);
    u64 capacity = virtio_config(&dev, 0) | (u64)virtio_config(&dev, 4) << 32;
    bool readonly = dev.features & F_RO;
    depth = (u32)opt_num("depth", 8);
    depth = depth > MAX_DEPTH ? MAX_DEPTH : depth < 1 ? 1 : depth;
    size = (u32)opt_num("kb", 4) << 10;
    u64 mb = opt_num("mb", ~0ul >> 20);
    blocks = (u32)((capacity * SECTOR < mb << 20 ? capacity * SECTOR : mb << 20) / size);
    zeroes = opt("zero") && dev.features & F_ZEROES;
    for (u32 i = 0; i < depth; i++)
        requests[i].data = ram_alloc(size);
    if (request(GET_ID, 0, id, 20))
        fail("no id: status %u", single.status);
    print("disk '%s' %lu sectors%s, %u blocks of %u\n", id, capacity, readonly ? " read-only" : "", blocks, size);
    if (opt("bench")) {
        bench(strcmp(opt("bench"), "write") ? IN : OUT);
        return;
    }
    refused(capacity);
    if (opt("count"))
        smp_run(pass_or_count);
    else
        work(readonly);
}
