/* What the loader handed over: command line, memory map and modules, by Xen PVH start_info or
 * multiboot 1 information. All is copied: a program may overwrite the loader's pages. */
#include "kernel.h"

struct range ram[32], modules[8];
u32 ram_count, module_count;
char cmdline[1024];

struct start_info {  /* Xen public/arch-x86/hvm/start_info.h */
    u32 magic, version, flags, nr_modules;
    u64 modlist_paddr, cmdline_paddr, rsdp_paddr, memmap_paddr;
    u32 memmap_entries, reserved;
};
struct pvh_module { u64 paddr, size, cmdline_paddr, reserved; };
struct pvh_memmap { u64 addr, size; u32 type, reserved; };

struct multiboot_info {  /* multiboot 0.6.96, section 3.3 */
    u32 flags, mem_lower, mem_upper, boot_device, cmdline, mods_count, mods_addr, syms[4];
    u32 mmap_length, mmap_addr;
};
struct multiboot_module { u32 start, end, string, reserved; };
struct multiboot_mmap { u32 size; u64 addr, len; u32 type; } __attribute__((packed));

static void add_ram(u64 start, u64 size)
{
    if (ram_count < sizeof ram / sizeof *ram)
        ram[ram_count++] = (struct range){start, size};
}

static void add_module(u64 start, u64 size)
{
    if (module_count < sizeof modules / sizeof *modules)
        modules[module_count++] = (struct range){start, size};
}

static void copy_cmdline(u64 from)
{
    const char *s = (const char *)from;
    for (u32 i = 0; from && s[i] && i < sizeof cmdline - 1; i++)
        cmdline[i] = s[i];
}

void boot_init(u32 kind, u64 info)
{
    if (kind == 1) {
        const struct start_info *si = (const void *)info;
        const struct pvh_module *mod = (const void *)si->modlist_paddr;
        const struct pvh_memmap *map = (const void *)si->memmap_paddr;
        copy_cmdline(si->cmdline_paddr);
        for (u32 i = 0; i < si->nr_modules; i++)
            add_module(mod[i].paddr, mod[i].size);
        for (u32 i = 0; si->version >= 1 && i < si->memmap_entries; i++)
            if (map[i].type == 1)
                add_ram(map[i].addr, map[i].size);
    } else {
        const struct multiboot_info *mb = (const void *)info;
        const struct multiboot_module *mod = (const void *)(u64)mb->mods_addr;
        if (mb->flags & 4)
            copy_cmdline(mb->cmdline);
        for (u32 i = 0; mb->flags & 8 && i < mb->mods_count; i++)
            add_module(mod[i].start, mod[i].end - mod[i].start);
        for (u32 at = 0; mb->flags & 64 && at < mb->mmap_length;) {
            const struct multiboot_mmap *m = (const void *)((u64)mb->mmap_addr + at);
            if (m->type == 1)
                add_ram(m->addr, m->len);
            at += m->size + 4;
        }
        if (!ram_count && mb->flags & 1)
            add_ram(0x100000, (u64)mb->mem_upper << 10);
    }
}

/* Maps RAM above 4 GiB, and forgets what lies beyond MAX_GIB: 1 GiB pages, or 2 MiB pages, whose
 * tables are in conventional memory: the image is full. */
#define MAX_GIB 64ul
#define HIGH_TABLES 0x40000ul

void map_init(void)
{
    u32 r[4];
    u64 end = 0;
    for (u32 i = 0; i < ram_count; i++) {
        if (ram[i].start >= MAX_GIB << 30)
            ram[i].start = ram[i].size = 0;
        if (ram[i].start + ram[i].size > MAX_GIB << 30)
            ram[i].size = (MAX_GIB << 30) - ram[i].start;
        if (ram[i].start + ram[i].size > end)
            end = ram[i].start + ram[i].size;
    }
    cpuid(0x80000001, 0, r);
    for (u64 gib = 4; gib << 30 < end; gib++) {
        u64 *table = (u64 *)(HIGH_TABLES + (gib - 4) * 4096);
        pdpt[gib] = r[3] & 1 << 26 ? gib << 30 | 0x87 : (u64)table | 7;
        for (u64 i = 0; !(r[3] & 1 << 26) && i < 512; i++)
            table[i] = gib << 30 | i << 21 | 0x87;
    }
}

/* The value stays valid until the next call: for CPU 0 at start-up. */
const char *opt(const char *name)
{
    static char value[64];
    for (const char *p = cmdline; *p;) {
        const char *n = name;
        while (*p == ' ')
            p++;
        while (*n && *p == *n)
            p++, n++;
        if (!*n && (*p == '=' || *p == ' ' || !*p)) {
            u32 i = 0;
            p += *p == '=';
            while (*p && *p != ' ' && i < sizeof value - 1)
                value[i++] = *p++;
            value[i] = 0;
            return value;
        }
        while (*p && *p != ' ')
            p++;
    }
    return 0;
}

u64 parse_num(const char *s)
{
    u64 v = 0;
    u32 base = s[0] == '0' && (s[1] == 'x' || s[1] == 'X') ? 16 : 10;
    for (s += base == 16 ? 2 : 0; *s; s++) {
        u32 d = *s >= '0' && *s <= '9' ? *s - '0' : (*s | 32) >= 'a' && (*s | 32) <= 'f' ? (*s | 32) - 'a' + 10 : 99;
        if (d >= base)
            break;
        v = v * base + d;
    }
    return *s == 'K' || *s == 'k' ? v << 10 : *s == 'M' || *s == 'm' ? v << 20 : *s == 'G' || *s == 'g' ? v << 30 : v;
}

u64 opt_num(const char *name, u64 otherwise)
{
    const char *v = opt(name);
    return v && *v ? parse_num(v) : otherwise;
}
