/* What every part of the guest shares: types, port I/O, the ring-0 call and the services. */
#ifndef KERNEL_H
#define KERNEL_H

#define MAX_CPUS 32
#define STACK_SIZE 8192          /* one ring-3 and one ring-0 stack a CPU, aligned to its size */
#define COUNTER_PAGE 0x200000ul  /* fixed guest-physical address of the shared counter */
#define FREE_RAM 0x201000ul      /* first byte of RAM that the image does not use */
#define AP_TRAMPOLINE 0x8000     /* real-mode start page of the other CPUs */
#define LAPIC 0xfee00000ul
#define IOAPIC 0xfec00000ul

#define MSR_TSC_DEADLINE 0x6e0
#define VEC_IRQ 32               /* PIC interrupts 0..15 */
#define VEC_TIMER 48             /* LAPIC timer */
#define VEC_IPI 49               /* wakes a halted CPU for a job */
#define VEC_PING 50
#define VEC_CHANGE 51            /* a device says that something but a queue changed: wakes all waits */
#define VEC_DEVICE 52            /* devices on a bus: a line each, or a message each */
#define VEC_LAST 83              /* the last with a stub of its own */
#define VEC_SPURIOUS 0xff

#ifndef __ASSEMBLER__
typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long u64;
typedef _Bool bool;

static inline void outb(u16 port, u8 v) { asm volatile("outb %0, %1" ::"a"(v), "Nd"(port)); }
static inline void outw(u16 port, u16 v) { asm volatile("outw %0, %1" ::"a"(v), "Nd"(port)); }
static inline void outl(u16 port, u32 v) { asm volatile("outl %0, %1" ::"a"(v), "Nd"(port)); }
static inline u8 inb(u16 port) { u8 v; asm volatile("inb %1, %0" : "=a"(v) : "Nd"(port)); return v; }
static inline u16 inw(u16 port) { u16 v; asm volatile("inw %1, %0" : "=a"(v) : "Nd"(port)); return v; }
static inline u32 inl(u16 port) { u32 v; asm volatile("inl %1, %0" : "=a"(v) : "Nd"(port)); return v; }
static inline u64 rdtsc(void) { u32 a, d; asm volatile("lfence; rdtsc" : "=a"(a), "=d"(d)); return (u64)d << 32 | a; }
static inline void cpu_relax(void) { asm volatile("pause" ::: "memory"); }
static inline u32 mmio_read(u64 a) { u32 v; asm volatile("movl (%1), %0" : "=a"(v) : "r"(a) : "memory"); return v; }
static inline void mmio_write(u64 a, u32 v) { asm volatile("movl %0, (%1)" ::"a"(v), "r"(a) : "memory"); }
static inline u8 mmio_read8(u64 a) { u8 v; asm volatile("movb (%1), %0" : "=a"(v) : "r"(a) : "memory"); return v; }
static inline void mmio_write8(u64 a, u8 v) { asm volatile("movb %0, (%1)" ::"a"(v), "r"(a) : "memory"); }
static inline u16 mmio_read16(u64 a) { u16 v; asm volatile("movw (%1), %0" : "=a"(v) : "r"(a) : "memory"); return v; }
static inline void mmio_write16(u64 a, u16 v) { asm volatile("movw %0, (%1)" ::"a"(v), "r"(a) : "memory"); }

/* start.S: run fn(a, b) in ring 0 with interrupts off; callable from ring 3 only. */
typedef u64 ring0_fn(u64 a, u64 b);
u64 ring0(ring0_fn *fn, u64 a, u64 b);
extern u8 user_stacks[], kernel_stacks[], ap_start[], ap_end[], trap_stubs[], invalid_opcode[], spurious_stub[];
extern u64 gdt[], idt[], pml4[], pdpt[];
extern volatile u32 cpu_count;

/* cpu.c: traps, ring-0 leaf functions, the local APIC. */
struct frame {
    u64 r15, r14, r13, r12, r11, r10, r9, r8, rbp, rdi, rsi, rdx, rcx, rbx, rax;
    u64 vector, error, rip, cs, rflags, rsp, ss;
};
struct percpu {
    volatile u64 events;             /* interrupts of any kind */
    volatile u64 ticks, pings, deadline;  /* deadline: TSC cycles to the next tick, 0 = periodic timer */
    u64 apic_id;
} __attribute__((aligned(64)));
extern struct percpu percpu[MAX_CPUS];
extern volatile u64 pit_ticks, device_events[VEC_LAST + 1];  /* the latter by vector, from VEC_DEVICE on */
/* By the stack in use: kernel_stacks follow user_stacks, so one formula serves both rings. */
static inline u32 this_cpu(void)
{
    u64 sp;
    asm volatile("mov %%rsp, %0" : "=r"(sp));
    return (u32)((sp - (u64)user_stacks) / STACK_SIZE % MAX_CPUS);
}
void idt_init(void);
void wait_change(volatile u64 *value, u64 old);  /* halt until *value != old (set by an interrupt) */
u64 rdmsr(u32 msr);
void wrmsr(u32 msr, u64 value);
u64 rdtsc0(void);                                 /* TSC as ring 0 sees it */
void cpuid(u32 leaf, u32 sub, u32 out[4]);
void irq_enable(u32 irq), irq_disable(u32 irq);
u32 vector_new(void);                             /* for a device; the first again after the last */
void line_edge(u32 pin, u32 vector);              /* IOAPIC pin, to CPU 0 */
u32 line_level(u32 pin, u64 isr);                 /* reading the byte at isr ends it; its vector */
void lapic_init(void);
void lapic_timer(u32 mode_vector, u32 count);
void send_ipi(u32 cpu, u32 vector);
void stop(void) __attribute__((noreturn));

/* smp.c */
extern u32 cpus;
typedef void job_fn(u32 cpu);
void smp_start(void);
void smp_run(job_fn *job);                        /* run job on every CPU, CPU 0 last; returns when all did */
void ap_main(u32 cpu);

/* boot.c: what the loader handed over. */
struct range { u64 start, size; };
extern struct range ram[32], modules[8];
extern u32 ram_count, module_count;
extern char cmdline[1024];
void boot_init(u32 kind, u64 info);
void map_init(void);
const char *opt(const char *name);                /* value of NAME=VALUE, "" for a bare NAME, else 0 */
u64 opt_num(const char *name, u64 otherwise);
u64 parse_num(const char *s);                     /* decimal, 0x hex, suffixes K M G */

/* console.c */
void serial_init(void);
void serial_rx(void);                             /* the serial interrupt, ring 0 */
int getkey(void);                                 /* next input byte, or -1 */
void print(const char *format, ...) __attribute__((format(printf, 1, 2)));
void vprint(const char *format, __builtin_va_list args);
void print_fatal(void);                           /* break the console lock: a dump goes first */

/* time.c */
extern u64 tsc_hz, lapic_hz, boot_tsc;
void calibrate(void);
void tick_start(u32 ms);                          /* periodic LAPIC timer on this CPU */
void pit_start(u32 hz);
u64 uptime_ms(void);

struct stall { u64 last, waited; };               /* guest running time without an event */
bool stalled(struct stall *s, bool event);        /* true after 2 s of it; a paused guest does not count */

/* main.c: a program returns when it has done passes=N rounds. */
struct program { const char *name; void (*run)(void); };
extern u64 passes;
static inline bool last_round(u64 round) { return passes && round >= passes; }
void fail(const char *format, ...) __attribute__((format(printf, 1, 2), noreturn));
void poweroff(void) __attribute__((noreturn));
void reset(void) __attribute__((noreturn));
void debug_exit(u8 code), triple_fault(void);
extern const char *program_name;

void shell(void), counter(void), ticker(void), halt(void), memhash(void), timers(void);
void pingpong(void), torture(void), piospin(void), serial(void);
void virtio_rng(void), virtio_blk(void), virtio_console(void), virtio_net(void);
void virtio_attack(void), pci(void);
void fwcfg(void);
u64 fnv1a(const void *start, u64 len);

/* lib.c */
int strcmp(const char *a, const char *b);
bool starts(const char *s, const char *prefix);
void *memcpy(void *d, const void *s, u64 n);
void *memset(void *d, int c, u64 n);
#endif
#endif
