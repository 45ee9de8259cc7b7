/* Guest memory may be memory that the host cannot back: a full tmpfs, no huge page left, a file
 * that was cut, a disk with errors. An access to it is SIGBUS; here it ends the access with
 * EFAULT, as it does a system call's. What is not guarded dies of it as before. */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include "guard.h"

#include <errno.h>
#include <stddef.h>

__thread struct guard guard __attribute__((tls_model("initial-exec")));

/* What SIGBUS did before. */
static struct sigaction unguarded = { .sa_handler = SIG_DFL };

/* It interrupts the thread that the signal is for, and looks at that thread's own variables: the
 * compiler's order of them is all that counts. */
static void handle_sigbus(int signum, siginfo_t *info, void *context)
{
	(void)context;
	/* A page that the host lost and that nobody is touching: whoever does will hear of it. */
	if (info->si_code == BUS_MCEERR_AO)
		return;
	if (guard.jump && info->si_code > 0)
		siglongjmp(*guard.jump, 1);
	if (guard.is_in_run && info->si_code == BUS_MCEERR_AR) {
		guard.is_poisoned = 1;
		return;
	}
	sigaction(signum, &unguarded, NULL);
	raise(signum);
}

/* Give SIGBUS its handler: 0, or the negative error number. SA_NODEFER: the jump out of the
 * handler leaves the signal mask as it is. */
int pyvmm_install_guard(void)
{
	struct sigaction action = { .sa_sigaction = handle_sigbus, .sa_flags = SA_SIGINFO | SA_NODEFER };
	struct sigaction before;

	if (sigaction(SIGBUS, &action, &before) < 0)
		return -errno;
	if (before.sa_sigaction != handle_sigbus)
		unguarded = before;
	return 0;
}
