/* counter: one 64-bit word in guest RAM, incremented in ring 3 as fast as the CPU can; a process
 * that maps the RAM measures pauses by polling it. */
#include "kernel.h"

/* touch=MB or touch=all: one write to each page first, so that all of it is populated. */
static void touch(void)
{
    const char *how = opt("touch");
    if (!how)
        return;
    u64 left = strcmp(how, "all") ? parse_num(how) << 20 : ~0ul, pages = 0;
    for (u32 i = 0; i < ram_count; i++) {
        u64 start = ram[i].start < FREE_RAM ? FREE_RAM + 4095 : ram[i].start, end = ram[i].start + ram[i].size;
        for (start &= ~4095ul; start + 4096 <= end && left >= 4096; start += 4096, left -= 4096, pages++)
            *(volatile u64 *)start = start;
    }
    print("touched %lu pages\n", pages);
}

void counter(void)
{
    u64 at = opt_num("addr", COUNTER_PAGE);
    volatile u64 *value = (volatile u64 *)at;
    touch();
    print("counter at 0x%lx\n", at);
    *value = 0;
    print("counter ready\n");
    for (;;)
        ++*value;
}
