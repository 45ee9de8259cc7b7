/* The few library functions that the programs and gcc itself need. */
#include "kernel.h"

int strcmp(const char *a, const char *b)
{
    while (*a && *a == *b)
        a++, b++;
    return (u8)*a - (u8)*b;
}

bool starts(const char *s, const char *prefix)
{
    while (*prefix)
        if (*s++ != *prefix++)
            return 0;
    return 1;
}

void *memcpy(void *d, const void *s, u64 n)
{
    void *to = d;
    asm volatile("rep movsb" : "+D"(to), "+S"(s), "+c"(n)::"memory");
    return d;
}

void *memset(void *d, int c, u64 n)
{
    void *to = d;
    asm volatile("rep stosb" : "+D"(to), "+c"(n) : "a"(c) : "memory");
    return d;
}

u64 fnv1a(const void *start, u64 len)
{
    u64 hash = 0xcbf29ce484222325ul;
    for (const u8 *p = start; len--; p++)
        hash = (hash ^ *p) * 0x100000001b3ul;
    return hash;
}
