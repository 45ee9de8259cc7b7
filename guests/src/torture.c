/* torture: known values in every register that a program has, checked for ever on every CPU. In ring 3
 * bursts of spinning with all general, flag, segment, x87, SSE, AVX and AVX-512 registers loaded; after
 * each timer tick in ring 0 the debug registers, CR2 and MSRs, which then get the next values. */
#include "kernel.h"
#include "torture.h"

#define MSRS 11

struct regs {
    u64 gpr[16], flags, seg[4], fs0, gs0, k[8], pad;
    u8 fx[512];
    u64 vec[32][8];
} __attribute__((aligned(64)));
struct system {  /* the ring-0 part */
    u64 dr[8], cr2, msr[MSRS];
};
struct torture {
    u64 self, stack, spins, spins2;
    u32 level, cpu;
    u64 fs_word, checks;
    struct regs want, got;
    struct system sys_want, sys_got;
} __attribute__((aligned(64)));
_Static_assert(__builtin_offsetof(struct regs, fx) == R_FX && __builtin_offsetof(struct regs, k) == R_K, "torture.h");
_Static_assert(__builtin_offsetof(struct regs, vec) == R_VEC && sizeof(struct regs) == R_SIZE, "torture.h");
_Static_assert(__builtin_offsetof(struct torture, level) == T_LEVEL, "torture.h");
_Static_assert(__builtin_offsetof(struct torture, want) == T_WANT && __builtin_offsetof(struct torture, got) == T_GOT, "torture.h");

void torture_burst(void);

static struct torture tortures[MAX_CPUS];
static volatile u64 rounds[MAX_CPUS];
static volatile bool done;
static u64 xcr0;
static u32 msr_count;  /* the last, tsc_aux, only where CPUID has rdtscp */
static u64 shown;
static bool segments;

static const char *const gpr_names[16] = {"rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi",
                                          "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15"};
static const char *const seg_names[4] = {"ds", "es", "fs", "gs"};
static const struct { u32 number; const char *name; } msrs[MSRS] = {
    {0xc0000100, "fs_base"}, {0xc0000101, "gs_base"}, {0xc0000102, "kernel_gs_base"}, {0xc0000081, "star"},
    {0xc0000082, "lstar"}, {0xc0000083, "cstar"}, {0xc0000084, "sfmask"}, {0x174, "sysenter_cs"},
    {0x175, "sysenter_esp"}, {0x176, "sysenter_eip"}, {0xc0000103, "tsc_aux"},
};

static u64 mix(u64 *seed)
{
    *seed += 0x9e3779b97f4a7c15ul;
    u64 v = (*seed ^ *seed >> 30) * 0xbf58476d1ce4e5b9ul;
    return v ^ v >> 27;
}

static void fill_system(struct torture *t)
{
    struct system *s = &t->sys_want;
    u64 seed = (u64)t->cpu << 32 | t->checks;

    for (u32 i = 0; i < 4; i++)      /* 8-byte aligned, in the lower half, where nothing is mapped */
        s->dr[i] = 0x700000000000ul | (mix(&seed) >> 20 & ~7ul);
    s->dr[6] = 0xffff0ff0 | (mix(&seed) & 15);
    s->dr[7] = t->checks & 1 ? 0x99990455 : 0x99990400;  /* four 8-byte write watchpoints, on or off */
    s->cr2 = mix(&seed);
    s->msr[0] = (u64)&t->fs_word;
    s->msr[1] = (u64)t;
    for (u32 i = 2; i < MSRS; i++)   /* canonical addresses in the kernel half */
        s->msr[i] = mix(&seed) | 0xffff800000000000ul;
    s->msr[3] = mix(&seed);
    s->msr[6] = (u32)mix(&seed);
    s->msr[7] = mix(&seed) & 0xfffc;
    s->msr[10] = (u32)mix(&seed);
}

static u64 load_system_0(u64 torture, u64 b)
{
    const struct system *s = &((struct torture *)torture)->sys_want;
    (void)b;
    asm volatile("mov %0, %%dr7" ::"r"(0x400ul));
    asm volatile("mov %0, %%dr0; mov %1, %%dr1; mov %2, %%dr2; mov %3, %%dr3" ::"r"(s->dr[0]), "r"(s->dr[1]), "r"(s->dr[2]), "r"(s->dr[3]));
    asm volatile("mov %0, %%dr6; mov %1, %%dr7; mov %2, %%cr2" ::"r"(s->dr[6]), "r"(s->dr[7]), "r"(s->cr2));
    for (u32 i = 0; i < msr_count; i++)
        asm volatile("wrmsr" ::"c"(msrs[i].number), "a"((u32)s->msr[i]), "d"((u32)(s->msr[i] >> 32)));
    return 0;
}

static u64 save_system_0(u64 torture, u64 b)
{
    struct system *s = &((struct torture *)torture)->sys_got;
    (void)b;
    asm volatile("mov %%dr0, %0; mov %%dr1, %1; mov %%dr2, %2; mov %%dr3, %3" : "=r"(s->dr[0]), "=r"(s->dr[1]), "=r"(s->dr[2]), "=r"(s->dr[3]));
    asm volatile("mov %%dr6, %0; mov %%dr7, %1; mov %%cr2, %2" : "=r"(s->dr[6]), "=r"(s->dr[7]), "=r"(s->cr2));
    for (u32 i = 0; i < msr_count; i++) {
        u32 lo, hi;
        asm volatile("rdmsr" : "=a"(lo), "=d"(hi) : "c"(msrs[i].number));
        s->msr[i] = (u64)hi << 32 | lo;
    }
    return 0;
}

static u64 enable_xcr0_0(u64 value, u64 b)
{
    u64 cr4;
    (void)b;
    asm volatile("mov %%cr4, %0" : "=r"(cr4));
    asm volatile("mov %0, %%cr4" ::"r"(cr4 | 1 << 18));
    asm volatile("xsetbv" ::"c"(0), "a"((u32)value), "d"(0));
    return 0;
}

static void choose_level(void)
{
    u32 r[4], have[4];
    const char *limit = opt("vectors");
    xcr0 = 0;
    cpuid(0x80000001, 0, r);
    msr_count = r[3] & 1 << 27 ? MSRS : MSRS - 1;
    cpuid(1, 0, r);
    if ((limit && !strcmp(limit, "sse")) || !(r[2] & 1 << 26) || !(r[2] & 1 << 28))
        return;
    xcr0 = 7;
    cpuid(0xd, 0, have);
    cpuid(7, 0, r);
    if (r[1] & 1 << 16 && (have[0] & 0xe0) == 0xe0 && !(limit && !strcmp(limit, "avx")))
        xcr0 = 0xe7;
}

static void fill(struct torture *t, u64 number)
{
    u64 seed = ~number << 8 | t->cpu;
    struct regs *w = &t->want;

    for (u32 i = 0; i < 16; i++)
        w->gpr[i] = i == 4 ? mix(&seed) >> 17 : mix(&seed);  /* rsp: a canonical address */
    /* CF PF AF ZF SF DF OF AC ID, beside the fixed bit 1 and IF */
    w->flags = (mix(&seed) & 0x240cd5) | 0x202;
    w->seg[0] = w->seg[1] = number & 1 && segments ? 0 : 0x23;
    w->seg[2] = w->seg[3] = 0;
    w->fs0 = t->fs_word = mix(&seed);
    w->gs0 = t->self = (u64)t;
    for (u32 i = 0; i < 8; i++)
        w->k[i] = mix(&seed) & 0xffff;
    for (u32 i = 0; i < 32 * 8; i++)
        w->vec[i / 8][i % 8] = mix(&seed);
    memset(w->fx, 0, sizeof w->fx);
    *(u16 *)&w->fx[0] = (u16)(0x37f | (mix(&seed) & 0xc00));       /* FCW: rounding */
    *(u16 *)&w->fx[2] = (u16)(mix(&seed) & 0x7f00 & ~0x8080);      /* FSW: condition codes and top */
    w->fx[4] = 0xff;                                               /* all eight in use */
    *(u32 *)&w->fx[24] = (u32)(0x1f80 | (mix(&seed) & 0xe03f));    /* MXCSR: all masked */
    for (u32 i = 0; i < 8; i++) {
        *(u64 *)&w->fx[32 + 16 * i] = mix(&seed) | 1ul << 63;
        *(u16 *)&w->fx[40 + 16 * i] = (u16)(0x3f00 + (mix(&seed) & 0xff));
    }
    for (u32 i = 0; i < 16; i++)
        memcpy(&w->fx[160 + 16 * i], w->vec[i], 16);
}

static void expect(const struct torture *t, const char *name, u32 index, u64 want, u64 got)
{
    if (want != got)
        fail("cpu=%u %s[%u] want=0x%lx got=0x%lx", t->cpu, name, index, want, got);
}

static void compare(const struct torture *t)
{
    const struct regs *w = &t->want, *g = &t->got;

    for (u32 i = 0; i < 16; i++)
        expect(t, gpr_names[i], 0, w->gpr[i], g->gpr[i]);
    expect(t, "rflags", 0, w->flags, g->flags & 0x240ed7);
    for (u32 i = 0; segments && i < 4; i++)
        expect(t, seg_names[i], 0, w->seg[i], g->seg[i] & 0xffff);
    expect(t, "fs:0", 0, w->fs0, g->fs0);
    expect(t, "gs:0", 0, w->gs0, g->gs0);
    expect(t, "fcw", 0, *(u16 *)&w->fx[0], *(u16 *)&g->fx[0]);
    expect(t, "fsw", 0, *(u16 *)&w->fx[2], *(u16 *)&g->fx[2]);
    expect(t, "ftw", 0, w->fx[4], g->fx[4]);
    expect(t, "mxcsr", 0, *(u32 *)&w->fx[24], *(u32 *)&g->fx[24]);
    for (u32 i = 0; i < 8; i++) {
        expect(t, "st", i, *(u64 *)&w->fx[32 + 16 * i], *(u64 *)&g->fx[32 + 16 * i]);
        expect(t, "st exponent", i, *(u16 *)&w->fx[40 + 16 * i], *(u16 *)&g->fx[40 + 16 * i]);
    }
    for (u32 i = 0; i < 32; i++)
        expect(t, "xmm", i / 2, *(u64 *)&w->fx[160 + 8 * i], *(u64 *)&g->fx[160 + 8 * i]);
    for (u32 i = 0; t->level == 1 && i < 16 * 4; i++)
        expect(t, "ymm", i / 4, w->vec[i / 4][i % 4], g->vec[i / 4][i % 4]);
    for (u32 i = 0; t->level == 2 && i < 32 * 8; i++)
        expect(t, "zmm", i / 8, w->vec[i / 8][i % 8], g->vec[i / 8][i % 8]);
    for (u32 i = 0; t->level == 2 && i < 8; i++)
        expect(t, "k", i, w->k[i], g->k[i] & 0xffff);
}

static void compare_system(const struct torture *t)
{
    const struct system *w = &t->sys_want, *g = &t->sys_got;

    for (u32 i = 0; i < 8; i++)
        if (i != 4 && i != 5)
            expect(t, "dr", i, w->dr[i], g->dr[i]);
    expect(t, "cr2", 0, w->cr2, g->cr2);
    for (u32 i = 0; i < msr_count; i++)
        expect(t, msrs[i].name, 0, w->msr[i], g->msr[i]);
}

static void torment(u32 cpu)
{
    struct torture *t = &tortures[cpu];
    volatile u64 *ticks = &percpu[cpu].ticks;
    u64 seen = *ticks, burst = 0, limit = passes;

    t->cpu = cpu;
    t->checks = 1;
    t->level = xcr0 == 0xe7 ? 2 : xcr0 == 7 ? 1 : 0;
    if (xcr0)
        ring0(enable_xcr0_0, xcr0, 0);
    fill_system(t);
    ring0(load_system_0, (u64)t, 0);
    tick_start(50);
    while (!done) {
        fill(t, burst++);
        t->spins = t->spins2 = 200000;
        torture_burst();
        compare(t);
        if (*ticks == seen)
            continue;
        seen = *ticks;
        ring0(save_system_0, (u64)t, 0);
        compare_system(t);
        rounds[cpu] = t->checks++;
        fill_system(t);
        ring0(load_system_0, (u64)t, 0);
        if (cpu)
            continue;
        u64 least = rounds[0];
        for (u32 i = 1; i < cpus; i++)
            if (rounds[i] < least)
                least = rounds[i];
        if (least > shown) {
            shown = least;
            print("torture %lu ok\n", shown);
            done = limit && shown >= limit;
        }
    }
    lapic_timer(0x10000 | VEC_TIMER, 0);
}

void torture(void)
{
    calibrate();
    choose_level();
    /* A host that runs ring 3 on the bare CPU does not keep its selectors: only when asked for. */
    segments = opt("segments") != 0;
    done = 0;
    shown = 0;
    memset((void *)rounds, 0, sizeof rounds);
    print("torture vectors %s segments %u\n", xcr0 == 0xe7 ? "avx512" : xcr0 == 7 ? "avx" : "sse", segments);
    smp_run(torment);
}
