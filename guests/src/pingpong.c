/* pingpong: the CPUs pass a count round, 64 turns by IPI to a halted CPU, then 64 by shared memory to
 * a spinning one. Each turn by IPI must bring exactly one. One CPU alone sends to itself. */
#include "kernel.h"

#define LINE 512  /* turns a line */

static volatile u64 count __attribute__((aligned(64)));
static volatile bool done;
static u64 start_pings[MAX_CPUS];  /* before any CPU starts: a ping may come before its CPU does */

static bool by_ipi(u64 turn) { return !(turn & 64); }

static void await_ping(u32 cpu, u64 had)
{
    struct percpu *me = &percpu[cpu];
    struct stall stall = {rdtsc0(), 0};
    for (;;) {  /* the tick wakes the CPU too, so that a lost IPI shows as such */
        u64 events = me->events;
        if (me->pings != had || done)
            return;
        if (stalled(&stall, count % cpus != cpu))
            fail("cpu=%u lost ipi at %lu", cpu, count);
        wait_change(&me->events, events);
    }
}

static void play(u32 cpu)
{
    struct percpu *me = &percpu[cpu];
    u64 had = start_pings[cpu];

    tick_start(50);
    for (u64 turn = cpu; !done; turn += cpus) {
        if (by_ipi(turn) && turn) {
            await_ping(cpu, had);
            if (done)
                break;
            if (me->pings != had + 1)
                fail("cpu=%u want %lu ipis got %lu", cpu, had + 1, me->pings);
            had++;
        }
        struct stall stall = {0, 0};
        for (u32 spins = 0; count < turn && !done; spins++) {
            cpu_relax();
            if (spins % 4096 == 4095 && stalled(&stall, !stall.last))
                fail("cpu=%u count stuck at %lu", cpu, count);
        }
        if (done)
            break;
        if (count != turn)
            fail("cpu=%u count want=%lu got=%lu", cpu, turn, count);
        if (turn && turn % LINE == 0) {
            print("pingpong %lu\n", turn);
            if (last_round(turn / LINE)) {
                done = 1;
                break;
            }
        }
        count = turn + 1;
        if (by_ipi(turn + 1))
            send_ipi((u32)((turn + 1) % cpus), VEC_PING);
    }
    lapic_timer(0x10000 | VEC_TIMER, 0);
}

void pingpong(void)
{
    calibrate();
    count = 0;
    done = 0;
    for (u32 i = 0; i < cpus; i++)
        start_pings[i] = percpu[i].pings;
    smp_run(play);
}
