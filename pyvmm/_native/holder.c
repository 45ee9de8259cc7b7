/* execve drops the caller's address space, and whoever drops it last takes it apart: with
 * gigabytes of guest RAM mapped, and a VM whose last descriptor closes on exec, that takes
 * longer than everything else in the guest's pause. A task made by clone(CLONE_VM) in a
 * thread group of its own shares the address space and survives the exec, so the taking
 * apart happens when it exits: after the new VM runs. */
#include "holder.h"

#include <linux/signal.h>

#include "raw.h"

struct holder {
	int release_fd;
	size_t count;
	const int *keep; /* ascending */
};

static struct holder holder;
static char holder_stack[16384] __attribute__((aligned(16)));

static void hold(void *argument)
{
	const struct holder *self = argument;
	unsigned int from = 0;
	char byte;

	/* A descriptor left open here would delay a peer's end of file. */
	for (size_t i = 0; i < self->count; i++) {
		if ((unsigned int)self->keep[i] > from)
			raw_syscall(__NR_close_range, from, self->keep[i] - 1, 0, 0, 0);
		from = self->keep[i] + 1;
	}
	raw_syscall(__NR_close_range, from, ~0U, 0, 0, 0);
	while (raw_syscall(__NR_read, self->release_fd, (long)&byte, 1, 0, 0) == -EINTR)
		;
	raw_syscall(__NR_exit_group, 0, 0, 0, 0, 0);
}

/* Start the holder: its process id, or the negative error number. It ends when release_fd (the
 * read end of a pipe) reaches end of file: when the new image closes the other end, or when
 * nobody is left to do so.
 *
 * keep_fds, in ascending order, stay open in it and must contain release_fd. It reads the list
 * at any time until it ends: the caller leaves it as it is, as nobody else touches its stack.
 * One holder at a time. It has no signal handlers and runs with all signals blocked. It is reaped
 * with __WALL, and sends no signal when it ends. */
int pyvmm_hold_memory(const int *keep_fds, size_t count, int release_fd)
{
	uint64_t all = ~0ULL, old;
	long pid;

	holder.keep = keep_fds;
	holder.count = count;
	holder.release_fd = release_fd;
	raw_syscall(__NR_rt_sigprocmask, SIG_SETMASK, (long)&all, (long)&old, sizeof(all), 0);
	pid = start_task(CLONE_VM, hold, &holder, holder_stack + sizeof(holder_stack));
	raw_syscall(__NR_rt_sigprocmask, SIG_SETMASK, (long)&old, 0, sizeof(old), 0);
	return (int)pid;
}
