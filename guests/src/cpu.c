/* Ring 0 after start-up: the trap handler, the leaf functions that ring 3 calls through ring0(),
 * the PIC and the local APIC. Everything here is short: a host may emulate it slowly. */
#include "kernel.h"

struct percpu percpu[MAX_CPUS];
volatile u64 pit_ticks, virtio_events[8];
volatile u8 *volatile virtio_isr[8];
static u16 irq_mask = 0xffff;
static bool use_ioapic;

static u64 wait_change_0(u64 value, u64 old)
{
    while (*(volatile u64 *)value == old)
        asm volatile("sti; hlt; cli" ::: "memory");
    return 0;
}
void wait_change(volatile u64 *value, u64 old)
{
    if (*value == old)
        ring0(wait_change_0, (u64)value, old);
}

static u64 rdmsr_0(u64 msr, u64 b)
{
    u32 a, d;
    (void)b;
    asm volatile("rdmsr" : "=a"(a), "=d"(d) : "c"((u32)msr));
    return (u64)d << 32 | a;
}
u64 rdmsr(u32 msr) { return ring0(rdmsr_0, msr, 0); }

static u64 wrmsr_0(u64 msr, u64 v)
{
    asm volatile("wrmsr" ::"c"((u32)msr), "a"((u32)v), "d"((u32)(v >> 32)));
    return 0;
}
void wrmsr(u32 msr, u64 value) { ring0(wrmsr_0, msr, value); }

static u64 rdtsc_0(u64 a, u64 b)
{
    u32 lo, hi;
    (void)a, (void)b;
    asm volatile("rdtsc" : "=a"(lo), "=d"(hi));
    return (u64)hi << 32 | lo;
}
u64 rdtsc0(void) { return ring0(rdtsc_0, 0, 0); }

/* In ring 0 because a host that runs ring 3 on the bare CPU cannot filter CPUID there. */
static u64 cpuid_0(u64 leaf_sub, u64 out)
{
    u32 *o = (u32 *)out;
    asm volatile("cpuid" : "=a"(o[0]), "=b"(o[1]), "=c"(o[2]), "=d"(o[3]) : "a"((u32)leaf_sub), "c"((u32)(leaf_sub >> 32)));
    return 0;
}
void cpuid(u32 leaf, u32 sub, u32 out[4]) { ring0(cpuid_0, leaf | (u64)sub << 32, (u64)out); }

static void dump(const struct frame *f, u32 cpu)
{
    u64 cr2;
    asm volatile("mov %%cr2, %0" : "=r"(cr2));
    print_fatal();
    print("\nexception %lu error 0x%lx on cpu %u\n", f->vector, f->error, cpu);
    print("rip %lx cs %lx rflags %lx rsp %lx ss %lx cr2 %lx\n", f->rip, f->cs, f->rflags, f->rsp, f->ss, cr2);
    print("rax %lx rbx %lx rcx %lx rdx %lx\n", f->rax, f->rbx, f->rcx, f->rdx);
    print("rsi %lx rdi %lx rbp %lx\n", f->rsi, f->rdi, f->rbp);
    print("r8 %lx r9 %lx r10 %lx r11 %lx\n", f->r8, f->r9, f->r10, f->r11);
    print("r12 %lx r13 %lx r14 %lx r15 %lx\n", f->r12, f->r13, f->r14, f->r15);
}

/* Called by trap_entry with interrupts off. */
void trap(struct frame *f)
{
    u32 cpu = this_cpu();
    struct percpu *me = &percpu[cpu];

    me->events++;
    if (f->vector >= VEC_TIMER) {
        if (f->vector == VEC_PING)
            me->pings++;
        if (f->vector >= VEC_VIRTIO) {
            virtio_events[f->vector - VEC_VIRTIO]++;  /* the driver asks the device, in ring 3 */
            if (virtio_isr[f->vector - VEC_VIRTIO])
                (void)*virtio_isr[f->vector - VEC_VIRTIO];
        }
        if (f->vector == VEC_TIMER) {
            me->ticks++;
            if (me->deadline)
                wrmsr_0(MSR_TSC_DEADLINE, rdtsc_0(0, 0) + me->deadline);
        }
        mmio_write(LAPIC + 0xb0, 0);  /* EOI */
    } else if (f->vector >= VEC_IRQ) {
        u32 irq = (u32)f->vector - VEC_IRQ;
        if (irq == 0)
            pit_ticks++;
        else if (irq == 4)
            serial_rx();
        if (use_ioapic) {
            mmio_write(LAPIC + 0xb0, 0);
            return;
        }
        if (irq == 7)
            return;                   /* the PIC's spurious interrupt takes no EOI */
        if (irq >= 8)
            outb(0xa0, 0x20);
        outb(0x20, 0x20);
    } else {
        dump(f, cpu);
        outb(0x505, 1);
        asm volatile("1: cli; hlt; jmp 1b");
    }
}

/* In ring 3: gates for the stubs in start.S, then the PIC with every line masked. */
void idt_init(void)
{
    for (u32 v = 0; v <= VEC_SPURIOUS; v++) {
        u64 entry = v <= VEC_LAST ? (u64)trap_stubs + v * 16 : (u64)spurious_stub;
        if (v == 6)
            entry = (u64)invalid_opcode;
        idt[v * 2] = (entry & 0xffff) | 0x08 << 16 | 0x8e00ul << 32 | (entry & 0xffff0000) << 32;
        idt[v * 2 + 1] = entry >> 32;
    }
    outb(0x20, 0x11);
    outb(0x21, VEC_IRQ);
    outb(0x21, 4);
    outb(0x21, 1);
    outb(0xa0, 0x11);
    outb(0xa1, VEC_IRQ + 8);
    outb(0xa1, 2);
    outb(0xa1, 1);
    outb(0x21, 0xff);
    outb(0xa1, 0xff);
}

static void ioapic_route(u32 pin, u32 vector)
{
    mmio_write(IOAPIC, 0x11 + pin * 2);
    mmio_write(IOAPIC + 0x10, (u32)percpu[0].apic_id << 24);
    mmio_write(IOAPIC, 0x10 + pin * 2);
    mmio_write(IOAPIC + 0x10, vector);
}

/* To CPU 0, through the PIC or with irq=ioapic the IOAPIC (the PIT may be on its pin 0 or 2). */
void irq_enable(u32 irq)
{
    const char *by = opt("irq");
    use_ioapic = by && !strcmp(by, "ioapic");
    if (use_ioapic) {
        ioapic_route(irq, VEC_IRQ + irq);
        if (irq == 0)
            ioapic_route(2, VEC_IRQ);
        return;
    }
    irq_mask &= (u16)~(1u << irq | 1u << 2);
    outb(0x21, (u8)irq_mask);
    outb(0xa1, (u8)(irq_mask >> 8));
}

void virtio_irq_enable(u32 slot) { ioapic_route(16 + slot, VEC_VIRTIO + slot); }
void level_irq_enable(u32 pin, u32 vector) { ioapic_route(pin, vector | 1u << 15); }

void irq_disable(u32 irq)
{
    if (use_ioapic) {
        ioapic_route(irq, 0x10000);
        if (irq == 0)
            ioapic_route(2, 0x10000);
        return;
    }
    irq_mask |= (u16)(1u << irq);
    outb(0x21, (u8)irq_mask);
    outb(0xa1, (u8)(irq_mask >> 8));
}

static u64 stop_0(u64 a, u64 b)
{
    (void)a, (void)b;
    asm volatile("1: cli; hlt; jmp 1b");
    return 0;
}
void stop(void)
{
    for (;;)
        ring0(stop_0, 0, 0);
}

void lapic_init(void)
{
    struct percpu *me = &percpu[this_cpu()];
    me->apic_id = mmio_read(LAPIC + 0x20) >> 24;
    mmio_write(LAPIC + 0x80, 0);                            /* TPR */
    mmio_write(LAPIC + 0xf0, 0x100 | VEC_SPURIOUS);         /* software enable */
    mmio_write(LAPIC + 0x350, this_cpu() ? 0x10000 : 0x700); /* LINT0: the PIC reaches CPU 0 only */
    mmio_write(LAPIC + 0x3e0, 0xb);                         /* divide by 1 */
}

/* mode_vector: LVT bits (0x20000 periodic, 0x40000 TSC deadline, 0x10000 masked) | vector. */
void lapic_timer(u32 mode_vector, u32 count)
{
    mmio_write(LAPIC + 0x320, mode_vector);
    mmio_write(LAPIC + 0x380, count);
}

void send_ipi(u32 cpu, u32 vector)
{
    mmio_write(LAPIC + 0x310, (u32)percpu[cpu].apic_id << 24);
    mmio_write(LAPIC + 0x300, 0x4000 | vector);
}
