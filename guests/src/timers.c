/* timers: clocks must not go backwards, on one CPU or from one to another, and ticks must not stop.
 * Clocks: TSC (as ring 0 and ring 3 see it: some hosts offset only the one) and kvmclock. Ticks: on
 * each CPU the LAPIC timer, in turn periodic and TSC deadline; on CPU 0 the PIT as well. */
#include "kernel.h"

#define MSR_KVM_SYSTEM_TIME_NEW 0x4b564d01
#define CLOCKS 3

struct pvclock {  /* KVM's pvclock_vcpu_time_info */
    u32 version, pad;
    u64 tsc_timestamp, system_time;
    u32 tsc_to_system_mul;
    signed char tsc_shift;
    u8 flags, pad2[2];
} __attribute__((aligned(64)));

static const char *const clock_names[CLOCKS] = {"tsc", "tsc3", "kvmclock"};
static volatile struct pvclock pvclocks[MAX_CPUS];
static volatile u64 latest[CLOCKS] __attribute__((aligned(64)));
static volatile u64 round_number, stop_tsc;
static bool has_pvclock, has_deadline;

static u64 pvclock_0(u64 cpu, u64 b)
{
    volatile struct pvclock *p = &pvclocks[cpu];
    u32 version, lo, hi;
    u64 ns;
    (void)b;
    do {
        version = p->version & ~1u;
        asm volatile("lfence; rdtsc" : "=a"(lo), "=d"(hi)::"memory");
        u64 delta = ((u64)hi << 32 | lo) - p->tsc_timestamp;
        delta = p->tsc_shift < 0 ? delta >> -p->tsc_shift : delta << p->tsc_shift;
        ns = p->system_time + (u64)((unsigned __int128)delta * p->tsc_to_system_mul >> 32);
        asm volatile("" ::: "memory");
    } while (version != p->version);
    return ns;
}

static u64 read_clock(u32 which, u32 cpu)
{
    return which == 0 ? rdtsc0() : which == 1 ? rdtsc() : ring0(pvclock_0, cpu, 0);
}

/* The latest value any CPU published is loaded before the clock is read: it may not be later. */
static void check_clocks(u32 cpu)
{
    for (u32 i = 0; i < (has_pvclock ? 3 : 2); i++) {
        u64 before = __atomic_load_n(&latest[i], __ATOMIC_SEQ_CST);
        u64 now = read_clock(i, cpu);
        if (now < before)
            fail("cpu=%u %s latest=%lu now=%lu back=%lu", cpu, clock_names[i], before, now, before - now);
        while (before < now && !__atomic_compare_exchange_n(&latest[i], &before, now, 0, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST))
            ;
    }
}

static void start_ticks(u32 cpu, bool deadline)
{
    struct percpu *me = &percpu[cpu];
    if (deadline) {
        lapic_timer(0x40000 | VEC_TIMER, 0);
        me->deadline = tsc_hz / 100;
        wrmsr(MSR_TSC_DEADLINE, rdtsc0() + me->deadline);
    } else {
        tick_start(10);
    }
}

static void one_round(u32 cpu)
{
    struct percpu *me = &percpu[cpu];
    struct stall lapic = {rdtsc0(), 0}, pit = lapic;
    u64 ticks = me->ticks, pits = pit_ticks;
    bool deadline = has_deadline && (round_number + cpu) & 1, halting = round_number & 2;

    if (has_pvclock && round_number == 1)
        wrmsr(MSR_KVM_SYSTEM_TIME_NEW, (u64)&pvclocks[cpu] | 1);
    start_ticks(cpu, deadline);
    while (rdtsc0() < stop_tsc) {
        u64 events = me->events;
        check_clocks(cpu);
        if (stalled(&lapic, me->ticks != ticks))
            fail("cpu=%u lapic %s stalled after tick %lu", cpu, deadline ? "deadline" : "periodic", ticks);
        ticks = me->ticks;
        if (cpu == 0 && stalled(&pit, pit_ticks != pits))
            fail("cpu=0 pit stalled after tick %lu", pits);
        if (cpu == 0)
            pits = pit_ticks;
        if (halting)
            wait_change(&me->events, events);
    }
    me->deadline = 0;
    lapic_timer(0x10000 | VEC_TIMER, 0);
}

void timers(void)
{
    u32 r[4];
    u64 period = opt_num("period", 1000);

    calibrate();
    pit_start(100);
    cpuid(0x40000000, 0, r);
    if (r[1] == 0x4b4d564b && r[0] >= 0x40000001) {  /* "KVMK" */
        cpuid(0x40000001, 0, r);
        has_pvclock = r[0] & 1 << 3;
    }
    cpuid(1, 0, r);
    has_deadline = r[2] & 1 << 24;
    print("timers tsc=%lu kHz lapic=%lu kHz kvmclock=%u deadline=%u\n", tsc_hz / 1000, lapic_hz / 1000, has_pvclock, has_deadline);
    for (round_number = 1;; round_number++) {
        u64 tsc = rdtsc0(), pits = pit_ticks, ticks = percpu[0].ticks, ns = latest[2];
        stop_tsc = tsc + tsc_hz / 1000 * period;
        smp_run(one_round);
        print("timers ok %lu tsc=%lu ms kvmclock=%lu ms pit=%lu lapic=%lu\n", round_number, (rdtsc0() - tsc) / (tsc_hz / 1000),
              ns ? (latest[2] - ns) / 1000000 : 0, pit_ticks - pits, percpu[0].ticks - ticks);
        if (last_round(round_number))
            break;
    }
    irq_disable(0);
}
