/* Time: TSC and LAPIC timer frequencies (measured against the PIT), ticks, uptime. */
#include "kernel.h"

u64 tsc_hz, lapic_hz, boot_tsc;

#define PIT_HZ 1193182ul
#define WINDOW (PIT_HZ / 50)  /* 20 ms */

struct reading {
    u64 tsc, lapic;
    u32 pit;  /* all of them count up here */
};

/* Reads the clocks one after the other: of several times the one in which the host did least of
 * something else in between. */
static struct reading read_clocks(void)
{
    struct reading best = {0};
    u64 least = ~0ul;
    for (int i = 0; i < 8; i++) {
        struct reading now;
        u64 start = rdtsc0();
        outb(0x43, 0x80);              /* latch channel 2 */
        now.lapic = 0xffffffff - mmio_read(LAPIC + 0x390);
        now.tsc = rdtsc0();
        now.pit = inb(0x42);
        now.pit |= (u32)inb(0x42) << 8;
        now.pit = 0xffff - now.pit;
        if (now.tsc - start < least)
            least = now.tsc - start, best = now;
    }
    return best;
}

/* Counts TSC and LAPIC ticks while PIT channel 2 runs down once. Polls the counter itself, so that a
 * late poll makes the window longer instead of the result wrong. */
void calibrate(void)
{
    struct reading first, last;
    if (tsc_hz)
        return;
    for (int tries = 0; tries < 10; tries++) {
        outb(0x61, (inb(0x61) & ~2) | 1);  /* gate on, speaker off */
        outb(0x43, 0xb0);                  /* channel 2, mode 0, 16 bit */
        outb(0x42, 0xff);
        outb(0x42, 0xff);
        lapic_timer(0x10000 | VEC_TIMER, 0xffffffff);
        first = read_clocks();
        do
            last = read_clocks();
        while (last.pit - first.pit < WINDOW);
        if (!(inb(0x61) & 0x20))
            break;
        /* It has run out, and begun anew: this was not looked at for 55 ms. */
    }
    tsc_hz = (last.tsc - first.tsc) * PIT_HZ / (last.pit - first.pit);
    lapic_hz = (last.lapic - first.lapic) * PIT_HZ / (last.pit - first.pit);
    lapic_timer(0x10000 | VEC_TIMER, 0);
}

bool stalled(struct stall *s, bool event)
{
    u64 now = rdtsc0(), passed = now - s->last, limit = tsc_hz / 10;
    s->last = now;
    s->waited = event ? 0 : s->waited + (passed < limit ? passed : limit);
    return s->waited > 2 * tsc_hz;
}

void tick_start(u32 ms)
{
    calibrate();
    percpu[this_cpu()].deadline = 0;
    lapic_timer(0x20000 | VEC_TIMER, (u32)(lapic_hz * ms / 1000));
}

void pit_start(u32 hz)
{
    u32 divisor = (u32)(PIT_HZ / hz);
    outb(0x43, 0x34);
    outb(0x40, (u8)divisor);
    outb(0x40, (u8)(divisor >> 8));
    irq_enable(0);
}

u64 uptime_ms(void)
{
    calibrate();
    return (rdtsc0() - boot_tsc) / (tsc_hz / 1000);
}
