/* execve drops the caller's address space, and whoever drops it last takes it apart: with
 * gigabytes of guest RAM mapped, and a VM whose last descriptor closes on exec, that takes
 * longer than everything else in the guest's pause. A task made by clone(CLONE_VM) in a
 * thread group of its own shares the address space and survives the exec, so the taking
 * apart happens when it exits: after the new VM runs.
 *
 * Here are raw system calls only: no function of libc, no errno, no thread-local storage. The
 * task shares the memory of a process whose other threads go on, and at the exec are gone from
 * one instruction to the next. libc's state is theirs, not the task's: a lock that one of them
 * held stays locked for ever, and its thread pointer is that of the thread that made the task,
 * so errno would be written into that thread's. Even the start is without libc, which would put
 * its own wrapper on the task's stack. build.py compiles this file so that the compiler adds no
 * call or canary either, and tests/unit/test_native.py sees that nothing is left. */
#include "carrier.h"

#include <asm/unistd.h>
#include <linux/errno.h>
#include <linux/sched.h>
#include <linux/signal.h>
#include <stdint.h>

static long raw_syscall(long number, long a, long b, long c, long d)
{
	register long fourth __asm__("r10") = d;
	long result;

	__asm__ volatile("syscall"
			 : "=a"(result)
			 : "a"(number), "D"(a), "S"(b), "d"(c), "r"(fourth)
			 : "rcx", "r11", "memory");
	return result;
}

/* clone(2) of a task that shares the memory and nothing else, and runs a function that does not
 * return: its process id, or the negative error number. The system call is a full barrier: the
 * task finds what was stored before. All that it finds later has to be left alone. */
static long start_task(void (*run)(void *), void *argument, void *stack_end)
{
	register void (*function)(void *) __asm__("r12") = run;
	register void *parameter __asm__("r13") = argument;
	register long tls __asm__("r8") = 0;
	register long child_tid __asm__("r10") = 0;
	long result;

	/* The registers are copied, but for rax and the stack. A frame of 0 is the outermost. */
	__asm__ volatile("syscall\n\t"
			 "test %%rax, %%rax\n\t"
			 "jnz 1f\n\t"
			 "xor %%ebp, %%ebp\n\t"
			 "mov %%r13, %%rdi\n\t"
			 "call *%%r12\n\t"
			 "ud2\n"
			 "1:"
			 : "=a"(result)
			 : "a"((long)__NR_clone), "D"((long)CLONE_VM), "S"(stack_end), "d"(0L),
			   "r"(child_tid), "r"(tls), "r"(function), "r"(parameter)
			 : "rcx", "r11", "memory", "cc");
	return result;
}

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
			raw_syscall(__NR_close_range, from, self->keep[i] - 1, 0, 0);
		from = self->keep[i] + 1;
	}
	raw_syscall(__NR_close_range, from, ~0U, 0, 0);
	while (raw_syscall(__NR_read, self->release_fd, (long)&byte, 1, 0) == -EINTR)
		;
	raw_syscall(__NR_exit_group, 0, 0, 0, 0);
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
	raw_syscall(__NR_rt_sigprocmask, SIG_SETMASK, (long)&all, (long)&old, sizeof(all));
	pid = start_task(hold, &holder, holder_stack + sizeof(holder_stack));
	raw_syscall(__NR_rt_sigprocmask, SIG_SETMASK, (long)&old, 0, sizeof(old));
	return (int)pid;
}
