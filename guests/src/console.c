/* The 16550 at 0x3f8 (input by interrupt 4, output polled), the debug console, and print(). */
#include "kernel.h"

#define COM1 0x3f8

static volatile u8 input[256];
static volatile u32 input_head, input_tail;
static volatile u32 lock;
static u32 tx_room;
static bool to_serial = 1, to_debugcon;

void serial_init(void)
{
    const char *console = opt("console");
    if (console) {
        to_debugcon = !strcmp(console, "debugcon") || !strcmp(console, "both");
        to_serial = strcmp(console, "debugcon") != 0;
    }
    outb(COM1 + 1, 0);
    outb(COM1 + 3, 0x80);
    outb(COM1 + 0, 1);     /* 115200 baud */
    outb(COM1 + 1, 0);
    outb(COM1 + 3, 3);     /* 8n1 */
    outb(COM1 + 2, 0x07);  /* FIFOs on and empty, interrupt at the first byte */
    outb(COM1 + 4, 0x0b);  /* DTR, RTS, OUT2: the interrupt line */
}

/* Interrupt 4 (ring 0), or a program that polls. A full buffer drops the byte. */
void serial_rx(void)
{
    while (inb(COM1 + 5) & 1) {
        u8 c = inb(COM1);
        if (input_head - input_tail < sizeof input)
            input[input_head++ % sizeof input] = c;
    }
}

int getkey(void)
{
    if (input_tail == input_head)
        return -1;
    return input[input_tail++ % sizeof input];
}

static void put(char c)
{
    if (to_debugcon)
        outb(0xe9, (u8)c);
    if (!to_serial)
        return;
    while (!tx_room)       /* THR empty means room for a whole FIFO */
        if (inb(COM1 + 5) & 0x20)
            tx_room = 16;
        else
            cpu_relax();
    tx_room--;
    outb(COM1, (u8)c);
}

static void number(u64 v, u32 base)
{
    char buf[24];
    u32 n = 0;
    do
        buf[n++] = "0123456789abcdef"[v % base];
    while (v /= base);
    while (n)
        put(buf[--n]);
}

void print_fatal(void) { lock = 0; }

/* %s %c %d %u %x %lu %lx %%: no widths. One call prints without other CPUs in between. */
void vprint(const char *format, __builtin_va_list args)
{
    while (__atomic_exchange_n(&lock, 1, __ATOMIC_ACQUIRE))
        cpu_relax();
    for (const char *p = format; *p; p++) {
        if (*p == '\n')
            put('\r');
        if (*p != '%') {
            put(*p);
            continue;
        }
        bool wide = *++p == 'l';
        p += wide;
        if (*p == 's') {
            for (const char *s = __builtin_va_arg(args, const char *); *s; s++)
                put(*s);
        } else if (*p == 'c') {
            put((char)__builtin_va_arg(args, int));
        } else if (*p == 'd') {
            int v = __builtin_va_arg(args, int);
            if (v < 0)
                put('-');
            number(v < 0 ? -(u64)v : (u64)v, 10);
        } else if (*p == 'u' || *p == 'x') {
            number(wide ? __builtin_va_arg(args, u64) : __builtin_va_arg(args, u32), *p == 'x' ? 16 : 10);
        } else {
            put(*p);
        }
    }
    __atomic_store_n(&lock, 0, __ATOMIC_RELEASE);
}

void print(const char *format, ...)
{
    __builtin_va_list args;
    __builtin_va_start(args, format);
    vprint(format, args);
    __builtin_va_end(args);
}
