/* ticker and halt: a line a period, halted in between. */
#include "kernel.h"

static void tick(u64 period, const char *format)
{
    struct percpu *me = &percpu[0];
    const char *source = opt("timer");
    bool pit = source && !strcmp(source, "pit");
    volatile u64 *ticks = pit ? &pit_ticks : &me->ticks;
    u64 every = 1;  /* interrupts a line: the PIT's longest period is 54 ms */

    if (pit) {
        every = period / 10 ? period / 10 : 1;
        pit_start(100);
    } else {
        while (period / every > 1000)
            every++;
        tick_start((u32)(period / every));
    }
    for (u64 n = 1;; n++) {
        while (*ticks < n * every)
            wait_change(ticks, *ticks);
        print(format, n);
        if (last_round(n))
            break;
    }
}

void ticker(void) { tick(opt_num("period", 100), "tick %lu\n"); }
void halt(void) { tick(opt_num("period", 1000), "halt %lu\n"); }
