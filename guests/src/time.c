/* Time: TSC and LAPIC timer frequencies (measured against the PIT), ticks, uptime. */
#include "kernel.h"

u64 tsc_hz, lapic_hz, boot_tsc;

#define PIT_HZ 1193182ul
#define WINDOW (PIT_HZ / 50)  /* 20 ms */

/* Counts TSC and LAPIC ticks while PIT channel 2 runs down once. Polls the counter itself, so that a
 * late poll makes the window longer instead of the result wrong. */
void calibrate(void)
{
    if (tsc_hz)
        return;
    outb(0x61, (inb(0x61) & ~2) | 1);  /* gate on, speaker off */
    outb(0x43, 0xb0);                  /* channel 2, mode 0, 16 bit */
    outb(0x42, 0xff);
    outb(0x42, 0xff);
    lapic_timer(0x10000 | VEC_TIMER, 0xffffffff);
    u32 first = 0, now;
    u64 tsc0 = 0, l0 = 0, tsc1, l1;
    do {
        outb(0x43, 0x80);              /* latch channel 2 */
        tsc1 = rdtsc0();
        l1 = 0xffffffff - mmio_read(LAPIC + 0x390);
        now = inb(0x42);
        now |= (u32)inb(0x42) << 8;
        now = 0xffff - now;
        if (!tsc0)
            first = now, tsc0 = tsc1, l0 = l1;
    } while (now - first < WINDOW);
    tsc_hz = (tsc1 - tsc0) * PIT_HZ / (now - first);
    lapic_hz = (l1 - l0) * PIT_HZ / (now - first);
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
