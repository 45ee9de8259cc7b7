/* Chooses and starts the program; the ends that all programs share. */
#include "kernel.h"

const char *program_name = "shell";
u64 passes;

static void exit_program(void)
{
    debug_exit((u8)opt_num("exit", 0));
    poweroff();
}

/* Some of everything, briefly. */
static void selftest(void)
{
    static void (*const parts[])(void) = {memhash, timers, pingpong, piospin, torture};
    passes = 2;
    for (u32 i = 0; i < sizeof parts / sizeof *parts; i++)
        parts[i]();
}

static const struct program programs[] = {
    {"shell", shell},     {"counter", counter}, {"ticker", ticker},   {"halt", halt},
    {"memhash", memhash}, {"timers", timers},   {"pingpong", pingpong}, {"piospin", piospin},
    {"torture", torture}, {"selftest", selftest}, {"exit", exit_program}, {"serial", serial},
    {"virtio-rng", virtio_rng}, {"virtio-blk", virtio_blk}, {"virtio-console", virtio_console},
    {"virtio-net", virtio_net}, {"virtio-attack", virtio_attack}, {"pci-scan", pci},
    {"fwcfg", fwcfg},
};

/* At the port that most test guests configure, and at QEMU's default. */
void debug_exit(u8 code)
{
    outb(0xf4, code);
    outb(0x501, code);
}

void poweroff(void)
{
    outw(0x604, 0x2000);  /* ACPI PM1 control: sleep enable, type 0 = S5 */
    stop();
}

static u64 triple_fault_0(u64 a, u64 b)
{
    static const struct { u16 limit; u64 base; } __attribute__((packed)) none;
    (void)a, (void)b;
    asm volatile("lidt %0; ud2" ::"m"(none));
    __builtin_unreachable();
}

void triple_fault(void) { ring0(triple_fault_0, 0, 0); }

void reset(void)
{
    outb(0x64, 0xfe);     /* keyboard controller: pulse the reset line */
    for (u64 start = rdtsc(); rdtsc() - start < 1000000000ul;)
        cpu_relax();
    triple_fault();       /* a machine without one */
    stop();
}

void fail(const char *format, ...)
{
    static u32 failed;
    __builtin_va_list args;
    if (__atomic_exchange_n(&failed, 1, __ATOMIC_SEQ_CST))
        stop();           /* another CPU is reporting */
    __builtin_va_start(args, format);
    print("%s FAIL ", program_name);
    vprint(format, args);
    __builtin_va_end(args);
    print("\n");
    debug_exit(0x21);
    outb(0x505, 1);
    stop();
}

/* Ring 3, CPU 0. kind: 1 PVH, 2 multiboot. */
__attribute__((noreturn)) void main(u32 kind, u64 info)
{
    const struct program *program = &programs[0];

    idt_init();
    boot_init(kind, info);
    serial_init();
    map_init();
    lapic_init();
    boot_tsc = rdtsc0();
    smp_start();
    for (u32 i = 0; i < sizeof programs / sizeof *programs; i++)
        if (opt(programs[i].name))
            program = &programs[i];
    program_name = program->name;
    print("program %s on %u cpus\n", program_name, cpus);
    passes = opt_num("passes", 0);
    program->run();
    print("%s PASS\n", program_name);
    if (opt("debugexit"))
        debug_exit((u8)opt_num("debugexit", 0x10));
    poweroff();
}
