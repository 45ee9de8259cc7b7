/* The guard around accesses to guest memory: SIGBUS ends the access, not the process. */
#pragma once

#ifndef FOR_CFFI /* build.py defines it: cffi reads what lies outside */
#include <setjmp.h>
#include <signal.h>

/* What SIGBUS finds this thread at. */
struct guard {
	sigjmp_buf *jump; /* where it goes on; NULL: nothing is guarded */
	/* Whether it is in KVM_RUN, and was told there that a page of the guest's is broken. */
	volatile sig_atomic_t is_in_run, is_poisoned;
};

/* Initial-exec: a signal handler must not have to allocate it. */
extern __thread struct guard guard __attribute__((tls_model("initial-exec")));

/* Do something that touches guest memory: whether it came to its end. It changes no local
 * variable of the function around it that is looked at afterwards, unless that is volatile.
 *
 * The compiler moves no access over its beginning or end. For the processor it is no barrier. */
#define GUARDED(...)                                        \
	({                                                  \
		sigjmp_buf jump;                            \
		volatile int whole = 0;                     \
		if (!sigsetjmp(jump, 0)) {                  \
			guard.jump = &jump;                 \
			__asm__ volatile("" ::: "memory"); \
			__VA_ARGS__;                        \
			__asm__ volatile("" ::: "memory"); \
			whole = 1;                          \
		}                                           \
		guard.jump = NULL;                          \
		whole;                                      \
	})
#endif

int pyvmm_install_guard(void);
