/* Checks and prints what a Linux kernel finds that is entered in long mode: registers, segments,
 * struct boot_params (Documentation/arch/x86/{boot,zero-page}.rst). The verdict is the last line. */
typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long u64;

#define FIELD(type, offset) (*(const volatile type *)(params + (offset)))

struct e820 {
    u64 addr, size;
    u32 type;
} __attribute__((packed));

static const u8 *params;
extern char image_start[], image_end[];

static u8 inb(u16 port)
{
    u8 value;
    asm volatile("inb %1, %0" : "=a"(value) : "Nd"(port));
    return value;
}

static void print(const char *text)
{
    for (; *text; text++) {
        while (!(inb(0x3fd) & 0x20))
            ;
        asm volatile("outb %0, %1" : : "a"(*text), "Nd"((u16)0x3f8));
    }
}

static void print_hex(u64 value)
{
    char text[20] = " 0x";
    int digits = 1, at = 3;

    while (digits < 16 && value >> 4 * digits)
        digits++;
    while (digits--)
        text[at++] = "0123456789abcdef"[value >> 4 * digits & 15];
    text[at] = 0;
    print(text);
}

static void fail(const char *what, u64 value)
{
    print("linux64 FAIL ");
    print(what);
    print_hex(value);
    print("\r\n");
    for (;;)
        asm volatile("cli; hlt");
}

static void expect(const char *what, u64 value, u64 mask, u64 wanted)
{
    if ((value & mask) != wanted)
        fail(what, value);
}

static void check_cpu(u64 flags)
{
    struct {
        u16 limit;
        u64 base;
    } __attribute__((packed)) gdt;
    u16 selector;
    u64 control;
    u32 low, high;

    expect("rflags", flags, 0x600, 0);                  /* IF, DF */
    asm("movw %%cs, %0" : "=r"(selector));
    expect("cs", selector, ~0UL, 0x10);
    asm("movw %%ds, %0" : "=r"(selector));
    expect("ds", selector, ~0UL, 0x18);
    asm("movw %%es, %0" : "=r"(selector));
    expect("es", selector, ~0UL, 0x18);
    asm("movw %%ss, %0" : "=r"(selector));
    expect("ss", selector, ~0UL, 0x18);
    asm("movq %%cr0, %0" : "=r"(control));
    expect("cr0", control, 0x80000001, 0x80000001);     /* PG, PE */
    asm("movq %%cr4, %0" : "=r"(control));
    expect("cr4", control, 0x1020, 0x20);               /* PAE, not LA57 */
    asm("rdmsr" : "=a"(low), "=d"(high) : "c"(0xc0000080));
    expect("efer", low, 0x500, 0x500);                  /* LME, LMA */
    asm("sgdt %0" : "=m"(gdt));
    if (gdt.limit < 0x1f)
        fail("gdt limit", gdt.limit);
    /* Flat 4 GiB; present, ring 0; execute and read, 64 bit; read and write. */
    expect("gdt[0x10]", ((const u64 *)gdt.base)[2], 0xff6ffe000000ffff & ~(1UL << 40),
           0x00af9a000000ffff & 0xff6ffe000000ffff);
    expect("gdt[0x18]", ((const u64 *)gdt.base)[3], 0xff8ffe000000ffff, 0x008f92000000ffff);
}

static int in_ram(u64 start, u64 size)
{
    const struct e820 *map = (const void *)(params + 0x2d0);

    for (int i = 0; i < FIELD(u8, 0x1e8); i++)
        if (map[i].type == 1 && map[i].addr <= start && start + size <= map[i].addr + map[i].size)
            return 1;
    return 0;
}

static void check_memory(void)
{
    const struct e820 *map = (const void *)(params + 0x2d0);
    u64 last = 0;

    if (!FIELD(u8, 0x1e8) || FIELD(u8, 0x1e8) > 128)
        fail("e820_entries", FIELD(u8, 0x1e8));
    for (int i = 0; i < FIELD(u8, 0x1e8); i++) {
        print("e820");
        print_hex(map[i].addr);
        print_hex(map[i].size);
        print_hex(map[i].type);
        print("\r\n");
        if (map[i].addr < last || !map[i].size)
            fail("e820 order", map[i].addr);
        last = map[i].addr + map[i].size;
    }
    if (!in_ram((u64)image_start, image_end - image_start))
        fail("kernel outside RAM", (u64)image_start);
    if (!in_ram((u64)params, 4096))
        fail("boot_params outside RAM", (u64)params);
}

static void check_initrd(void)
{
    u64 start = FIELD(u32, 0x218), size = FIELD(u32, 0x21c);
    u32 sum = 0;

    if (!in_ram(start, size))
        fail("initrd outside RAM", start);
    if (size && start < (u64)image_end)
        fail("initrd over the kernel", start);
    for (u64 i = 0; i < size; i++)
        sum = sum * 31 + ((const u8 *)start)[i];
    print("initrd");
    print_hex(start);
    print_hex(size);
    print_hex(sum);
    print("\r\n");
}

static void check_setup_data(void)
{
    u64 at = FIELD(u64, 0x250);
    const u8 *data = (const u8 *)at;
    u32 sum = 0;

    if (!in_ram(at, 48))
        fail("setup_data", at);
    expect("setup_data next", *(const u64 *)data, ~0UL, 0);
    expect("setup_data type", *(const u32 *)(data + 8), ~0UL, 9);
    expect("setup_data len", *(const u32 *)(data + 12), ~0UL, 32);
    for (int i = 16; i < 48; i++)
        sum = sum * 31 + data[i];
    print("seed");
    print_hex(sum);
    print("\r\n");
}

void check(const char *entered_as, const u8 *boot_params, u64 flags)
{
    const char *cmdline;

    params = boot_params;
    check_cpu(flags);
    expect("sentinel", FIELD(u8, 0x1ef), ~0UL, 0);
    expect("boot_flag", FIELD(u16, 0x1fe), ~0UL, 0xaa55);
    expect("header", FIELD(u32, 0x202), ~0UL, 0x53726448);
    if (FIELD(u16, 0x206) < 0x20c)
        fail("version", FIELD(u16, 0x206));
    expect("type_of_loader", FIELD(u8, 0x210), ~0UL, 0xff);
    expect("loadflags", FIELD(u8, 0x211), 1, 1);
    expect("code32_start", FIELD(u32, 0x214), ~0UL, (u64)image_start);
    cmdline = (const char *)(u64)FIELD(u32, 0x228);
    if (!in_ram((u64)cmdline, 4096))
        fail("cmd_line_ptr", (u64)cmdline);
    print("cmdline ");
    print(cmdline);
    print("\r\n");
    check_memory();
    check_initrd();
    check_setup_data();
    print("rsdp");
    print_hex(FIELD(u64, 0x70));
    print("\r\nlinux64 PASS as ");
    print(entered_as);
    print("\r\n");
}
