/* fwcfg: what guests made for QEMU look for: fw_cfg by port and by DMA, the ACPI PM timer, and with
 * `testdev` QEMU's pc-testdev. Each round looks at all of it, from ring 3 and from ring 0. */
#include "kernel.h"

#define SELECTOR 0x510
#define DATA 0x511
#define DMA 0x514
#define PM_TIMER 0x608
#define PM_HZ 3579545ul
#define PM_MASK 0xffffffu

enum { SIGNATURE, ID, RAM_SIZE = 3, NB_CPUS = 5, MAX_CPUS_KEY = 15, CMDLINE_SIZE = 0x14, CMDLINE_DATA, FILE_DIR = 0x19 };
enum { ERROR = 1, READ = 2, SKIP = 4, SELECT = 8, WRITE = 16 };
#define MOST_FILES 64
#define LARGEST 65536

struct access { u32 control, length; u64 address; };
struct file { u32 size; u16 key, reserved; char name[56]; } __attribute__((packed));

static volatile struct access request __attribute__((aligned(16)));
static u8 by_port[LARGEST], by_dma[LARGEST];
static struct { u32 count; struct file files[MOST_FILES]; } __attribute__((packed)) directory;

static u16 swap16(u16 v) { return (u16)(v << 8 | v >> 8); }
static u32 swap32(u32 v) { return __builtin_bswap32(v); }
static u64 swap64(u64 v) { return __builtin_bswap64(v); }

static u64 select_0(u64 key, u64 unused) { (void)unused; outw(SELECTOR, (u16)key); return 0; }
static u64 byte_0(u64 a, u64 b) { (void)a, (void)b; return inb(DATA); }
static u64 timer_0(u64 a, u64 b) { (void)a, (void)b; return inl(PM_TIMER); }

static u64 start_0(u64 address, u64 unused)
{
    (void)unused;
    if (address >> 32)
        outl(DMA, swap32((u32)(address >> 32)));
    outl(DMA + 4, swap32((u32)address));
    return 0;
}

static void read_port(u32 key, void *to, u32 length)
{
    u8 *p = to;
    outw(SELECTOR, (u16)key);
    while (length--)
        *p++ = inb(DATA);
}

static u64 number(u32 key, u32 size)
{
    u64 value = 0;
    read_port(key, &value, size);
    return value;
}

/* The control word that comes of it. */
static u32 dma(u32 control, u64 address, u32 length)
{
    struct stall s = {0};
    request.control = swap32(control);
    request.length = swap32(length);
    request.address = swap64(address);
    ring0(start_0, (u64)&request, 0);
    while (swap32(request.control) & ~(u32)ERROR)
        if (stalled(&s, 0))
            fail("transfer %x of %u bytes does not end", control, length);
    return swap32(request.control);
}

static void want(const char *what, u64 found, u64 wanted)
{
    if (found != wanted)
        fail("%s is 0x%lx, not 0x%lx", what, found, wanted);
}

static void check_numbers(void)
{
    u64 length = 0;
    want("signature", number(SIGNATURE, 4), 0x554d4551);
    ring0(select_0, SIGNATURE, 0);
    want("first byte in ring 0", ring0(byte_0, 0, 0), 'Q');
    want("features", number(ID, 4), 3);
    want("signature of DMA", inl(DMA) | (u64)inl(DMA + 4) << 32, 0x47464320554d4551ul);
    want("CPUs", number(NB_CPUS, 2), cpus);
    want("most CPUs", number(MAX_CPUS_KEY, 2), cpus);
    want("a key that nobody has", number(0x3abc, 8), 0);
    while (cmdline[length])
        length++;
    want("size of the command line", number(CMDLINE_SIZE, 4), length + 1);
    read_port(CMDLINE_DATA, by_port, sizeof cmdline);
    if (strcmp((char *)by_port, cmdline))
        fail("command line '%s'", by_port);
}

static void check_files(bool tell)
{
    u32 count;
    read_port(FILE_DIR, &directory, sizeof directory);
    count = swap32(directory.count);
    if (!count || count > MOST_FILES)
        fail("%u files", count);
    for (u32 i = 0; i < count; i++) {
        struct file *file = &directory.files[i];
        u32 size = swap32(file->size), key = swap16(file->key);
        if (key < 0x20 || size > LARGEST || file->name[55])
            fail("file %u has key 0x%x and %u bytes", i, key, size);
        if (i && strcmp(directory.files[i - 1].name, file->name) >= 0)
            fail("file %s is out of order", file->name);
        read_port(key, by_port, size);
        want("data behind the end", inb(DATA), 0);
        memset(by_dma, 0xa5, size);
        want(file->name, dma(key << 16 | SELECT | READ, (u64)by_dma, size), 0);
        if (fnv1a(by_dma, size) != fnv1a(by_port, size))
            fail("%s is not the same by DMA", file->name);
        if (tell)
            print("file %s %u 0x%lx\n", file->name, size, fnv1a(by_port, size));
        if (!strcmp(file->name, "etc/vmcoreinfo")) {
            u16 content[8] = {1, 1, 0x1234, 0, 0x5678};
            want("a write in part", dma(key << 16 | SELECT | WRITE, (u64)content, size + 1), ERROR);
            want("a write", dma(key << 16 | SELECT | WRITE, (u64)content, size), 0);
            read_port(key, by_port, size);
            want("what was written", fnv1a(by_port, size), fnv1a(content, size));
        } else if (size)
            want("a write of what is read-only", dma(key << 16 | SELECT | WRITE, (u64)by_dma, 1), ERROR);
    }
}

static void check_dma(void)
{
    u64 free = (FREE_RAM + 0xfff) & ~0xffful, none = 0xd0000000ul;
    u32 large = 3u << 20;

    want("select and skip", dma(SIGNATURE << 16 | SELECT | SKIP, 0, 2), 0);
    want("the byte behind it", inb(DATA), 'M');
    want("nothing", dma(SIGNATURE << 16 | SELECT, 0, ~0u), 0);
    want("a read to where no memory is", dma(SIGNATURE << 16 | SELECT | READ, none, 4), ERROR);
    want("a read of all there is", dma(SIGNATURE << 16 | SELECT | READ, free, ~0u), ERROR);
    /* Longer than a slice, and aligned to nothing. */
    memset((void *)free, 0xa5, large + 8);
    want("a long read", dma(SIGNATURE << 16 | SELECT | READ, free + 1, large), 0);
    for (u32 at = 5; at <= large; at++)
        if (((u8 *)free)[at])
            fail("byte %u of a long read", at);
    want("before", *(u8 *)free, 0xa5);
    want("behind", ((u8 *)free)[large + 1], 0xa5);
    want("the beginning", *(u32 *)(free + 1), 0x554d4551);
    ring0(start_0, none, 0);
    ring0(start_0, ~0ul - 7, 0);
    want("a transfer afterwards", dma(SIGNATURE << 16 | SELECT | READ, free, 4), 0);
}

/* What the timer counted since the last time, beside the TSC: both before and behind it are read. */
static void check_timer(void)
{
    static u64 before, behind, last;
    u64 now_before = rdtsc0(), now = ring0(timer_0, 0, 0), now_behind = rdtsc0(), ticks, least, most;
    want("the timer's highest byte", now >> 24, 0);
    if (last) {
        ticks = (now - (last - 1)) & PM_MASK;
        least = (now_before - behind) * PM_HZ / tsc_hz, most = (now_behind - before) * PM_HZ / tsc_hz;
        /* The TSC's frequency was measured; a hundredth and a millisecond for that. */
        if (most < PM_MASK && (ticks + ticks / 100 + PM_HZ / 1000 < least || ticks > most + most / 100 + PM_HZ / 1000))
            fail("the timer counted %lu, not %lu to %lu", ticks, least, most);
    }
    before = now_before, behind = now_behind, last = now + 1;
    now = inl(PM_TIMER);
    want("the timer in ring 3", ((now - (last - 1)) & PM_MASK) < PM_MASK / 2, 1);
}

static void check_testdev(void)
{
    volatile u64 *word = (volatile u64 *)COUNTER_PAGE;
    u64 events = percpu[0].events;
    outl(0xe0, 0x12345678);
    want("testdev 32", inl(0xe0), 0x12345678);
    outw(0xe2, 0xabcd);
    want("testdev 16", inw(0xe2), 0xabcd);
    outb(0xe1, 0xef);
    want("testdev 8", inl(0xe0), 0xabcdef78);
    want("testdev by bytes", inl(0xe8), 0xabcdef78);
    mmio_write(0xff000010, 0xcafe0001);
    want("testdev memory", mmio_read(0xff000010), 0xcafe0001);
    mmio_write(0xff00fffc, 7);
    want("testdev's last word", mmio_read(0xff00fffc), 7);
    *word = 0x1122334455667788;
    outl(0xe4, COUNTER_PAGE);
    want("a page that was flushed", *word, 0x1122334455667788);
    irq_enable(5);
    outb(0x2005, 1);
    wait_change(&percpu[0].events, events);
    outb(0x2005, 0);
    irq_disable(5);
}

void fwcfg(void)
{
    bool with_testdev = opt("testdev") != 0;
    calibrate();
    print("fwcfg ram 0x%lx\n", number(RAM_SIZE, 8));
    for (u64 round = 1;; round++) {
        check_numbers();
        check_timer();
        check_files(round == 1);
        check_dma();
        if (with_testdev)
            check_testdev();
        check_timer();
        print("fwcfg %lu\n", round);
        if (last_round(round))
            return;
    }
}
