/* What an exec does to a guest is tried out on one of a few bytes: a child that shares this
 * process's memory starts a task, the task enters the vCPU, the child executes another program, and
 * the task enters the vCPU again. */
#include "trial.h"

#include <linux/fcntl.h>
#include <linux/kvm.h>
#include <linux/signal.h>
#include <linux/time.h>

#include "kvm.h"
#include "raw.h"

static void end_trial(struct pyvmm_trial *trial, uint32_t step, int error)
{
	trial->error = error;
	store_word(&trial->step, step);
	wake_word(&trial->step);
	raw_syscall(__NR_exit_group, !!error, 0, 0, 0, 0);
	__builtin_unreachable();
}

static void run_task(void *argument)
{
	struct pyvmm_trial *trial = argument;
	struct kvm_regs regs;
	int keep[2] = { trial->pipe_fds[0], trial->vcpu_fd };
	unsigned int low = keep[0] < keep[1] ? keep[0] : keep[1];
	unsigned int high = keep[0] < keep[1] ? keep[1] : keep[0];
	int result;
	char byte;

	/* A descriptor left open here would delay a peer's end of file. */
	if (low)
		raw_syscall(__NR_close_range, 0, low - 1, 0, 0, 0);
	if (high > low + 1)
		raw_syscall(__NR_close_range, low + 1, high - 1, 0, 0, 0);
	raw_syscall(__NR_close_range, high + 1, ~0U, 0, 0, 0);
	trial->run->immediate_exit = 1;
	trial->move = -raw_clock(CLOCK_MONOTONIC);
	result = raw_ioctl(trial->vcpu_fd, KVM_RUN, 0);
	trial->move += raw_clock(CLOCK_MONOTONIC);
	if (result != -EINTR)
		end_trial(trial, PYVMM_TRIAL_BEGUN, result ? result : -EPROTO);
	store_word(&trial->step, PYVMM_TRIAL_ENTERED);
	/* Its end of file: the child is another program, or gone. */
	while (raw_syscall(__NR_read, trial->pipe_fds[0], (long)&byte, 1, 0, 0) == -EINTR)
		;
	store_word(&trial->step, PYVMM_TRIAL_LEFT);
	trial->run->immediate_exit = 0;
	result = raw_ioctl(trial->vcpu_fd, KVM_RUN, 0);
	if (!result)
		result = trial->run->exit_reason == KVM_EXIT_HLT ? 0 : -EPROTO;
	if (!result)
		result = raw_ioctl(trial->vcpu_fd, KVM_GET_REGS, &regs);
	end_trial(trial, result ? PYVMM_TRIAL_LEFT : PYVMM_TRIAL_DONE, result);
}

static void run_child(void *argument)
{
	static const char nothing[] = "/dev/null", this[] = "";
	struct pyvmm_trial *trial = argument;
	/* A child of the process: nobody else is sure to wait for it. */
	long pid = start_task(CLONE_VM | CLONE_PARENT, run_task, trial,
			      trial->stacks + 2 * PYVMM_TRIAL_STACK);
	long null;

	if (pid < 0)
		end_trial(trial, PYVMM_TRIAL_BEGUN, (int)pid);
	trial->task_pid = (int32_t)pid;
	null = raw_syscall(__NR_open, (long)nothing, O_RDWR, 0, 0, 0);
	for (int fd = 0; null > 2 && fd <= 2; fd++)
		raw_syscall(__NR_dup2, null, fd, 0, 0, 0);
	raw_syscall(__NR_execveat, trial->program_fd, (long)this, (long)trial->command,
		    (long)trial->environment, AT_EMPTY_PATH);
	raw_syscall(__NR_exit, 127, 0, 0, 0, 0);
}

/* Begin: 0, or the negative error number. What *trial names stays as it is until it has ended. */
int pyvmm_try(struct pyvmm_trial *trial)
{
	uint64_t all = ~0ULL, old;
	long pid;

	raw_syscall(__NR_rt_sigprocmask, SIG_SETMASK, (long)&all, (long)&old, sizeof(all), 0);
	pid = start_task(CLONE_VM | CLONE_VFORK | SIGCHLD, run_child, trial,
			 trial->stacks + PYVMM_TRIAL_STACK);
	raw_syscall(__NR_rt_sigprocmask, SIG_SETMASK, (long)&old, 0, sizeof(old), 0);
	if (pid < 0)
		return (int)pid;
	trial->pid = (int32_t)pid;
	return 0;
}

/* Wait for its end: 0 if all is as it should be, or the negative error number. */
int pyvmm_wait_trial(struct pyvmm_trial *trial, int64_t timeout_ns)
{
	int64_t end = raw_clock(CLOCK_MONOTONIC) + timeout_ns, left;
	uint32_t step;

	while ((step = load_word(&trial->step)) != PYVMM_TRIAL_DONE && !trial->error) {
		left = end - raw_clock(CLOCK_MONOTONIC);
		if (left <= 0)
			return -ETIMEDOUT;
		wait_word(&trial->step, step, left < SECOND_NS / 100 ? left : SECOND_NS / 100);
	}
	return trial->error;
}
