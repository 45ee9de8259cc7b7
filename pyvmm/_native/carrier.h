/* The carrier: the tasks that run a guest's vCPUs while the process executes its next image; and
 * the control pages, memory that it shares with the image before and the one after. */
#pragma once

#ifndef FOR_CFFI
#include <stddef.h>
#include <stdint.h>

#include "state.h"
#endif

enum {
	/* Of the control pages' layout, and of what their words mean. */
	PYVMM_CARRIER_VERSION = 1,
	/* KVM splits an access that crosses a page, and each part in pieces of 8 bytes. */
	PYVMM_MAX_WRITES = 16,
	PYVMM_MAX_PORT_DATA = 4096,
	/* What the carrier gets besides as struct kvm_run says it. */
	PYVMM_EXIT_SIZE = 512,
	PYVMM_STACK_SIZE = 65536,
};

/* What the carrier's vCPUs are to do: the lower bits of pyvmm_control.command. Above them is a
 * number that changes with each command. */
enum pyvmm_command {
	PYVMM_HOLD, /* stay out of the guest: it was paused */
	PYVMM_RUN, /* run; an exit that needs user space waits */
	PYVMM_TAKE, /* stop, with no access half done; all there: write the state down */
	PYVMM_BACK, /* go back to the threads of the image before */
	PYVMM_END, /* the guest runs elsewhere, or not at all */
};

/* Whose the guest is: pyvmm_control.phase. */
enum pyvmm_phase {
	PYVMM_PREPARING, /* the image before has not called execve: it takes the vCPUs back */
	PYVMM_CROSSING, /* it has: the carrier's, until an image takes them */
	PYVMM_TAKEN, /* the new image's */
	PYVMM_LATE, /* the carrier's: the new image had its time, and is about to be killed */
};

/* Who may enter a vCPU: pyvmm_slot.owner. */
enum pyvmm_owner {
	PYVMM_OLD, /* a thread of the image before */
	PYVMM_CARRIED, /* its task in the carrier */
	PYVMM_NEW, /* a thread of the new image */
	PYVMM_KEPT, /* a thread of the image before, which gives it to nobody any more */
};

/* A write to a port or to an address without memory that no device has seen yet. */
struct pyvmm_write {
	uint64_t address;
	uint32_t is_port, size, count;
	uint32_t reserved;
	uint8_t data[8]; /* of a port, if that is not enough, pyvmm_slot.port_data */
};

/* One vCPU. Times are CLOCK_MONOTONIC in ns. */
struct pyvmm_slot {
	uint32_t owner; /* futex */
	int32_t tid; /* of the carrier's task */
	uint32_t stopped, saved; /* number of the command for which it is; futexes */
	int32_t result; /* of the last KVM_RUN: 0 if an exit waits, or the negative error number */
	uint32_t is_parked, has_exit, write_count;
	uint64_t left, entered; /* the move to the carrier: last and first in the guest */
	uint64_t stopped_at, run_at; /* the move to the new image */
	uint64_t parked_at; /* since when an exit waits, or 0 */
	struct pyvmm_state_error error;
	int32_t save_result;
	uint32_t cpuid_count;
	struct kvm_cpuid_entry2 cpuid[PYVMM_MAX_CPUID];
	struct pyvmm_write writes[PYVMM_MAX_WRITES];
	uint8_t port_data[PYVMM_MAX_PORT_DATA];
	uint8_t exit[PYVMM_EXIT_SIZE];
	struct pyvmm_cpu_state state;
};

struct pyvmm_control {
	uint32_t version, size; /* of this structure */
	uint32_t slots_at, slot_size, xsave_at, xsave_size; /* bytes; an XSAVE area is in its slot */
	uint32_t cpu_count, has_xsave2;
	uint32_t command, phase; /* futexes */
	uint32_t stopped; /* how many have, for the command whose number is above; futex */
	uint32_t ready; /* how many tasks are there; futex */
	int32_t pid, error; /* of the carrier; why it is not ready */
	uint32_t attempts; /* how many images it has started in place of one that is gone */
	uint32_t first_command; /* PYVMM_RUN, or PYVMM_HOLD */
	uint64_t deadline; /* when the carrier ends the wait for an image; CLOCK_MONOTONIC, ns */
	uint64_t asked_at, saved_at, loaded_at, taken_at; /* the takeover, in ns */
	struct pyvmm_msr_list msrs;
	struct pyvmm_vm_state vm;
};

/* What the carrier knows by itself: in the memory of the image before. */
struct pyvmm_carrier_task {
	struct pyvmm_carrier *carrier;
	struct pyvmm_slot *slot;
	struct pyvmm_run *run;
	int vcpu_fd;
	uint32_t has_given; /* the irqfds, to a VM to come */
};

struct pyvmm_carrier {
	struct pyvmm_control *control;
	struct pyvmm_carrier_task *tasks;
	char *stacks; /* for each task one, and two more */
	int vm_fd;
	int process_fd; /* a pidfd of the image that the guest goes to */
	const struct kvm_irqfd *irqfds; /* those of the VM */
	size_t irqfd_count;
	int program_fd; /* of the old program, for the way back */
	const int *keep_fds; /* stay open, ascending */
	size_t keep_count;
	const int *handed_fds; /* of these what the next image gets */
	size_t handed_count;
	char *const *command;
	char *const *died_environment; /* tells that the new image died */
	char *const *late_environment; /* or that it did not take over in time */
	uint64_t signal_mask; /* which an image is to have */
	int64_t patience; /* how long an image that the carrier starts has, ns */
	int kick_signal;
};

int pyvmm_start_carrier(struct pyvmm_carrier *carrier);
int pyvmm_wait_ready(struct pyvmm_control *control, int64_t timeout_ns);
int pyvmm_command(struct pyvmm_control *control, uint32_t command, int kick_signal);
