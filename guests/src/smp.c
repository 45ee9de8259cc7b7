/* The other CPUs: INIT and SIPI to all, then jobs by shared memory, woken by IPI. */
#include "kernel.h"

u32 cpus = 1;
static job_fn *volatile job;
static volatile u64 job_number;
static volatile u32 job_left, online = 1;

/* Ring 3, every CPU but 0. */
void ap_main(u32 cpu)
{
    u64 seen = 0;
    lapic_init();
    __atomic_fetch_add(&online, 1, __ATOMIC_SEQ_CST);
    for (;;) {
        wait_change(&job_number, seen);
        seen = job_number;
        job(cpu);
        __atomic_fetch_sub(&job_left, 1, __ATOMIC_SEQ_CST);
    }
}

/* How many CPUs there should be: the command line, else CPUID, else 0 = unknown. */
static u32 expected(void)
{
    u32 r[4], n = (u32)opt_num("pyvmm.cpus", 0);
    if (n)
        return n;
    cpuid(1, 0, r);
    return r[3] & 1 << 28 ? r[1] >> 16 & 0xff : 0;
}

void smp_start(void)
{
    u32 want = expected();
    bool told = opt("pyvmm.cpus") != 0;
    if (want == 1 && told)
        return;
    memcpy((void *)AP_TRAMPOLINE, ap_start, (u64)(ap_end - ap_start));
    mmio_write(LAPIC + 0x300, 0xc4500);                       /* INIT to all but self */
    mmio_write(LAPIC + 0x300, 0xc4600 | AP_TRAMPOLINE >> 12); /* start-up */
    /* Unknown count: give up 50 ms after the last arrival. Known: wait 5 s for all. */
    u64 quiet = rdtsc();
    u32 seen = 1;
    u64 patience = want > 1 ? 10000000000ul : 150000000ul;
    while (!(want > 1 && online >= want) && rdtsc() - quiet < patience) {
        if (online != seen)
            seen = online, quiet = rdtsc();
        cpu_relax();
    }
    cpus = online;
    if (told && cpus != want)
        fail("cpus want=%lu got=%lu", (u64)want, (u64)cpus);
}

void smp_run(job_fn *fn)
{
    job = fn;
    job_left = cpus - 1;
    job_number++;
    for (u32 i = 1; i < cpus; i++)
        send_ipi(i, VEC_IPI);
    fn(0);
    while (job_left)
        cpu_relax();
}
