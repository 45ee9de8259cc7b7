/* memhash: every 64-bit word of RAM but the image's own holds a function of its address and the pass;
 * each pass checks all of them and writes the next pass's. Every CPU works on its own slice. */
#include "kernel.h"

static struct range areas[33];
static u32 area_count;
static u64 total_pages;
static volatile u64 pass_number;

static void find_areas(void)
{
    u64 left = opt_num("mb", strcmp(program_name, "selftest") ? ~0ul >> 20 : 64) << 8;
    area_count = 0;
    total_pages = 0;
    for (u32 i = 0; i < ram_count; i++) {
        u64 start = (ram[i].start + 4095) & ~4095ul, end = (ram[i].start + ram[i].size) & ~4095ul;
        if (start < 0x10000)
            start = 0x10000;     /* the loader's tables and the start page of the other CPUs */
        if (start >= 0x100000 && start < FREE_RAM)
            start = FREE_RAM;
        if (start >= end)
            continue;
        u64 pages = (end - start) >> 12;
        if (pages > left)
            pages = left;
        left -= pages;
        total_pages += pages;
        if (pages)
            areas[area_count++] = (struct range){start, pages << 12};
    }
}

static inline u64 pattern(u64 address, u64 n)
{
    u64 v = (address + n * 0x9e3779b97f4a7c15ul) * 0xff51afd7ed558ccdul;
    return v ^ v >> 32;
}

/* One slice: check pass n - 1 (from pass 1 on) and write pass n. */
static void slice(u32 cpu)
{
    u64 first = total_pages * cpu / cpus, end = total_pages * (cpu + 1) / cpus, n = pass_number, base = 0;
    for (u32 i = 0; i < area_count; base += areas[i++].size >> 12) {
        u64 pages = areas[i].size >> 12, from = first > base ? first - base : 0, to = end > base ? end - base : 0;
        if (to > pages)
            to = pages;
        for (u64 a = areas[i].start + (from << 12); a < areas[i].start + (to << 12); a += 8) {
            volatile u64 *word = (volatile u64 *)a;
            u64 got = *word;
            if (n && got != pattern(a, n - 1))
                fail("addr=0x%lx want=0x%lx got=0x%lx", a, pattern(a, n - 1), got);
            *word = pattern(a, n);
        }
    }
}

void memhash(void)
{
    find_areas();
    print("memhash %lu MiB\n", total_pages >> 8);
    pass_number = 0;
    smp_run(slice);
    do {
        pass_number++;
        smp_run(slice);
        print("memhash pass %lu ok\n", pass_number);
    } while (!last_round(pass_number));
}
