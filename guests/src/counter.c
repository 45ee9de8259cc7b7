/* counter: one 64-bit word in guest RAM, incremented in ring 3 as fast as the CPU can; a process
 * that maps the RAM measures pauses by polling it. */
#include "kernel.h"

/* A write to each page of RAM that the image does not use, up to left bytes of it; *count goes up by one
 * with each. */
static void walk(u64 left, volatile u64 *count)
{
    for (u32 i = 0; i < ram_count; i++) {
        u64 start = ram[i].start < FREE_RAM ? FREE_RAM + 4095 : ram[i].start, end = ram[i].start + ram[i].size;
        for (start &= ~4095ul; start + 4096 <= end && left >= 4096; start += 4096, left -= 4096, ++*count)
            *(volatile u64 *)start = start;
    }
}

/* touch=MB or touch=all: so much RAM is populated first. walk: the counter is not all that is written to, but
 * one word of each page in turn; how fast that goes depends on the tables between guest and host. */
void counter(void)
{
    u64 at = opt_num("addr", COUNTER_PAGE), pages = 0;
    volatile u64 *value = (volatile u64 *)at;
    const char *touch = opt("touch");
    if (touch) {
        walk(strcmp(touch, "all") ? parse_num(touch) << 20 : ~0ul, &pages);
        print("touched %lu pages\n", pages);
    }
    print("counter at 0x%lx\n", at);
    *value = 0;
    print("counter ready\n");
    while (opt("walk"))
        walk(~0ul, value);
    for (;;)
        ++*value;
}
