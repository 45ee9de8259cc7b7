/* piospin: port I/O as fast as it goes on the serial scratch register, single and string accesses, every
 * value read back: an access that is lost, repeated or mixed up shows. */
#include "kernel.h"

#define SCRATCH 0x3ff

static void verify(u64 n, u8 want, u8 got)
{
    if (want != got)
        fail("n=%lu want=0x%x got=0x%x", n, want, got);
}

void piospin(void)
{
    for (u64 n = 1;; n++) {
        u8 in = 0;
        if (n % 16) {
            outb(SCRATCH, (u8)n);
            in = inb(SCRATCH);
        } else {
            u8 bytes[4] = {(u8)~n, (u8)(n + 1), (u8)(n + 2), (u8)n}, back[4];
            const u8 *from = bytes;
            u8 *to = back;
            u64 count = 4;
            asm volatile("rep outsb" : "+S"(from), "+c"(count) : "d"(SCRATCH) : "memory");
            verify(n, 0, (u8)count);
            count = 4;
            asm volatile("rep insb" : "+D"(to), "+c"(count) : "d"(SCRATCH) : "memory");
            for (u32 i = 0; i < 4; i++)
                verify(n, (u8)n, back[i]);
            in = back[3];
        }
        verify(n, (u8)n, in);
        if (n % 4096 == 0) {
            print("piospin %lu\n", n);
            if (last_round(n / 4096))
                break;
        }
    }
}
