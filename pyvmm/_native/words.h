/* Words in memory that native code and Python's threads change at the same time: locks, and bits.
 *
 * Native code that answers a guest only ever tries a lock. Python's threads take another one of
 * their own first, so at most one of them waits here. */
#pragma once

#ifndef FOR_CFFI
#include <stdint.h>

static inline int try_lock(uint32_t *lock)
{
	uint32_t free = 0;

	return __atomic_compare_exchange_n(lock, &free, 1, 0, __ATOMIC_ACQUIRE, __ATOMIC_RELAXED);
}

static inline void unlock(uint32_t *lock)
{
	__atomic_store_n(lock, 0, __ATOMIC_RELEASE);
}
#endif

void pyvmm_lock(uint32_t *lock);
int pyvmm_add_word_functions(void *module);
