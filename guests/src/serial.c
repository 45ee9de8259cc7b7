/* serial: writes to the 16550 as fast as it takes bytes; for measurements. passes=N: so many KiB.
 * lines: numbers in rising order in their place, for tests. */
#include "kernel.h"

void serial(void)
{
    static char kib[1025];
    if (opt("lines"))
        for (u64 n = 1;; n++)
            print("line %lu\n", n);
    memset(kib, 'x', sizeof kib - 1);
    for (u64 n = 1;; n++) {
        print("%s", kib);
        if (last_round(n))
            break;
    }
    print("\n");
}
