/* shell: the interactive program. Halted whenever there is nothing to do; a 100 Hz timer interrupt
 * drives the visible counter, also kept in the shared counter page. */
#include "kernel.h"

static char line[256];
static u32 length;
static bool ticking;
static volatile u64 *const counter_word = (volatile u64 *)COUNTER_PAGE;

static void do_help(const char *);
static void do_uptime(const char *a) { (void)a; print("uptime %lu ms\n", uptime_ms()); }
static void do_counter(const char *a) { (void)a; print("counter %lu\n", *counter_word); }
static void do_echo(const char *a) { print("%s\n", a); }
static void do_reset(const char *a) { (void)a; print("reset\n"); reset(); }
static void do_poweroff(const char *a) { (void)a; print("poweroff\n"); poweroff(); }

static void do_panic(const char *a)
{
    (void)a;
    print("panic\n");
    outb(0x505, 1);
    stop();
}

static void do_triple(const char *a) { (void)a; print("triplefault\n"); triple_fault(); }

/* An address that no table maps. */
static void do_fault(const char *a)
{
    (void)a;
    *(volatile u64 *)0x7000deadbee8 = 1;
}

static void do_exit(const char *a)
{
    debug_exit((u8)parse_num(a));
    print("exit: no isa-debug-exit device\n");
}

static void do_ticker(const char *a)
{
    if (strcmp(a, "on") && strcmp(a, "off"))
        print("usage: ticker on|off\n");
    else
        ticking = !strcmp(a, "on");
}

static const char *second(const char *a)
{
    while (*a && *a != ' ')
        a++;
    while (*a == ' ')
        a++;
    return a;
}

static bool is_ram(u64 start, u64 len)
{
    for (u32 i = 0; i < ram_count; i++)
        if (start >= ram[i].start && len <= ram[i].size && start - ram[i].start <= ram[i].size - len)
            return 1;
    return 0;
}

static void do_hash(const char *a)
{
    u64 start = parse_num(a), len = parse_num(second(a));
    if (!*a || !*second(a))
        print("usage: hash START LEN\n");
    else if (!is_ram(start, len))
        print("hash: 0x%lx + 0x%lx is not RAM\n", start, len);
    else
        print("hash 0x%lx 0x%lx = 0x%lx\n", start, len, fnv1a((const void *)start, len));
}

static void do_cpus(const char *a)
{
    (void)a;
    print("cpus %u\n", cpus);
    for (u32 i = 0; i < cpus; i++)
        print("cpu %u apic id %lu\n", i, percpu[i].apic_id);
}

static u8 cmos(u8 reg)
{
    outb(0x70, reg);
    return inb(0x71);
}

static u32 bcd(u8 v, bool binary) { return binary ? v : (v >> 4) * 10u + (v & 15u); }

static void do_clock(const char *a)
{
    u8 now[7], again[7], status = cmos(0x0b);
    static const u8 regs[] = {0x32, 0x09, 0x08, 0x07, 0x04, 0x02, 0x00};
    (void)a;
    do {  /* until two readings agree: an update may fall in between */
        for (u32 i = 0; i < 7; i++)
            now[i] = cmos(regs[i]);
        for (u32 i = 0; i < 7; i++)
            again[i] = cmos(regs[i]);
    } while (fnv1a(now, 7) != fnv1a(again, 7));
    if (now[2] == 0xff) {
        print("clock: no RTC\n");
        return;
    }
    bool binary = status & 4;
    u32 v[7];
    for (u32 i = 0; i < 7; i++)
        v[i] = bcd(now[i], binary);
    print("clock %u%u%u%u-%u%u-%u%u", v[0] / 10, v[0] % 10, v[1] / 10, v[1] % 10, v[2] / 10, v[2] % 10, v[3] / 10, v[3] % 10);
    print(" %u%u:%u%u:%u%u\n", v[4] / 10, v[4] % 10, v[5] / 10, v[5] % 10, v[6] / 10, v[6] % 10);
}

static void do_modules(const char *a)
{
    (void)a;
    print("modules %u\n", module_count);
    for (u32 i = 0; i < module_count; i++)
        print("module %u at 0x%lx size %lu\n", i, modules[i].start, modules[i].size);
}

static void do_memory(const char *a)
{
    (void)a;
    for (u32 i = 0; i < ram_count; i++)
        print("ram 0x%lx size 0x%lx\n", ram[i].start, ram[i].size);
}

static void do_cmdline(const char *a) { (void)a; print("cmdline %s\n", cmdline); }

static const struct command { const char *name, *help; void (*run)(const char *args); } commands[] = {
    {"help", "this list", do_help},
    {"uptime", "milliseconds since boot", do_uptime},
    {"counter", "the counter: 100 a second, never back", do_counter},
    {"ticker", "on|off: print the counter every second", do_ticker},
    {"hash", "START LEN: FNV-1a of a range of RAM", do_hash},
    {"echo", "TEXT", do_echo},
    {"cpus", "the CPUs and their APIC ids", do_cpus},
    {"clock", "the CMOS clock", do_clock},
    {"memory", "the RAM ranges", do_memory},
    {"modules", "what the loader passed (initrd)", do_modules},
    {"cmdline", "the command line", do_cmdline},
    {"exit", "CODE: write CODE to isa-debug-exit", do_exit},
    {"reset", "reset the machine", do_reset},
    {"triplefault", "reset it that way", do_triple},
    {"fault", "touch an unmapped address: register dump and panic", do_fault},
    {"poweroff", "power the machine off", do_poweroff},
    {"panic", "report a guest panic", do_panic},
};

static void do_help(const char *a)
{
    (void)a;
    for (u32 i = 0; i < sizeof commands / sizeof *commands; i++)
        print("  %s - %s\n", commands[i].name, commands[i].help);
}

static void prompt(void)
{
    length = 0;
    print("guest> ");
}

static void run_line(void)
{
    char *name = line, *args;
    line[length] = 0;
    while (length && line[length - 1] == ' ')
        line[--length] = 0;
    while (*name == ' ')
        name++;
    for (args = name; *args && *args != ' '; args++)
        ;
    while (*args == ' ')
        *args++ = 0;
    if (!*name)
        return;
    for (u32 i = 0; i < sizeof commands / sizeof *commands; i++)
        if (!strcmp(name, commands[i].name)) {
            commands[i].run(args);
            return;
        }
    print("unknown command: %s (try help)\n", name);
}

static void key(int c)
{
    if (c == '\r' || c == '\n') {
        print("\n");
        run_line();
        prompt();
    } else if (c == 3) {
        print("^C\n");
        prompt();
    } else if (c == 0x15) {
        for (; length; length--)
            print("\b \b");
    } else if (c == 8 || c == 127) {
        if (length) {
            length--;
            print("\b \b");
        }
    } else if (c >= ' ' && c < 127 && length < sizeof line - 1) {
        line[length++] = (char)c;
        print("%c", c);
    }
}

void shell(void)
{
    struct percpu *me = &percpu[0];
    u64 shown = 0;
    int c;

    *counter_word = 0;
    tick_start(10);
    outb(0x3f9, 1);  /* interrupt on received data */
    irq_enable(4);
    print("\npyvmm guest, %u cpus. type help\n", cpus);
    prompt();
    for (;;) {
        u64 events = me->events;
        *counter_word = me->ticks;
        while ((c = getkey()) >= 0)
            key(c);
        if (ticking && me->ticks / 100 != shown)
            print("\ncounter %lu\n", me->ticks);
        shown = me->ticks / 100;
        wait_change(&me->events, events);
    }
}
