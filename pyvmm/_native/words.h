/* Words in memory that native code and Python's threads change at the same time: locks, and bits. */
#pragma once

#ifndef FOR_CFFI
#include <linux/futex.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/syscall.h>
#include <unistd.h>

/* What a lock says. Native code that answers a guest only ever tries one; Python's threads wait. */
enum { LOCK_FREE, LOCK_TAKEN, LOCK_AWAITED };

static inline int try_lock(uint32_t *lock)
{
	uint32_t free = LOCK_FREE;

	return __atomic_compare_exchange_n(lock, &free, LOCK_TAKEN, 0, __ATOMIC_ACQUIRE,
					   __ATOMIC_RELAXED);
}

static inline void unlock(uint32_t *lock)
{
	if (__atomic_exchange_n(lock, LOCK_FREE, __ATOMIC_RELEASE) == LOCK_AWAITED)
		syscall(SYS_futex, lock, FUTEX_WAKE_PRIVATE, 1, NULL, NULL, 0);
}
#endif

int pyvmm_add_word_functions(void *module);
