/* Whether this kernel does what a carrier rests on. */
#pragma once

#ifndef FOR_CFFI
#include <stdint.h>
#endif

/* How far it has come. */
enum pyvmm_trial_step {
	PYVMM_TRIAL_BEGUN,
	PYVMM_TRIAL_ENTERED, /* a task in another group has entered the vCPU */
	PYVMM_TRIAL_LEFT, /* and is there after the exec */
	PYVMM_TRIAL_DONE, /* and KVM does as it asks */
};

struct pyvmm_trial {
	int vcpu_fd; /* of a guest that halts at once, and has no irqchip */
	struct pyvmm_run *run;
	int pipe_fds[2]; /* closed on exec */
	int program_fd; /* of a program that ends soon */
	char *const *command;
	char *const *environment;
	char *stacks; /* two of PYVMM_TRIAL_STACK */
	uint32_t step; /* futex */
	int32_t error; /* the negative error number, where it ended */
	int32_t pid, task_pid; /* to be waited for, the second with __WALL */
	int64_t move; /* how long the vCPU took from one task to the other, ns */
};

enum { PYVMM_TRIAL_STACK = 16384 };

int pyvmm_try(struct pyvmm_trial *trial);
int pyvmm_wait_trial(struct pyvmm_trial *trial, int64_t timeout_ns);
