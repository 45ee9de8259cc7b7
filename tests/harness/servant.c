/* A task that shares the memory of the process that makes it, in a thread group or with a
 * descriptor table of its own or not, and makes one system call after the other for whoever writes
 * them into a page that both can see. */
#include <linux/signal.h>
#include <linux/time.h>

#include "raw.h"

enum { IDLE, ASKED, DONE };

struct servant {
	uint32_t turn; /* futex */
	int32_t pid, tid, kick_signal;
	int64_t number, arguments[5], result;
	int64_t begun, ended; /* CLOCK_MONOTONIC, ns */
};

static void serve(void *argument)
{
	struct servant *servant = argument;
	uint64_t kicks = 1ULL << (servant->kick_signal - 1);

	raw_syscall(__NR_rt_sigprocmask, SIG_UNBLOCK, (long)&kicks, 0, sizeof(kicks), 0);
	servant->pid = (int32_t)raw_syscall(__NR_getpid, 0, 0, 0, 0, 0);
	servant->tid = (int32_t)raw_syscall(__NR_gettid, 0, 0, 0, 0, 0);
	for (;;) {
		uint32_t turn;

		store_word(&servant->turn, servant->turn == ASKED ? DONE : IDLE);
		wake_word(&servant->turn);
		while ((turn = load_word(&servant->turn)) != ASKED)
			wait_word(&servant->turn, turn, 0);
		servant->begun = raw_clock(CLOCK_MONOTONIC);
		servant->result = raw_syscall(servant->number, servant->arguments[0],
					      servant->arguments[1], servant->arguments[2],
					      servant->arguments[3], servant->arguments[4]);
		servant->ended = raw_clock(CLOCK_MONOTONIC);
	}
}

/* Start one by clone(2) with CLONE_VM and more: its id, or the negative error number. It takes no
 * signal but the kick. */
int start_servant(struct servant *servant, long flags, void *stack_end, int kick_signal)
{
	uint64_t all = ~0ULL, old;
	long pid;

	servant->kick_signal = kick_signal;
	raw_syscall(__NR_rt_sigprocmask, SIG_SETMASK, (long)&all, (long)&old, sizeof(all), 0);
	pid = start_task(CLONE_VM | flags, serve, servant, stack_end);
	raw_syscall(__NR_rt_sigprocmask, SIG_SETMASK, (long)&old, 0, sizeof(old), 0);
	return (int)pid;
}
