/* The new image's side of an exec that the guest runs through: its vCPUs get the state of those
 * that the carrier runs. */
#pragma once

#ifndef FOR_CFFI
#include <stdint.h>

#include "carrier.h"
#endif

struct pyvmm_takeover {
	struct pyvmm_control *control;
	const int *vcpu_fds;
	int vm_fd;
	int kick_signal;
	int is_running; /* whether threads wait for the vCPUs */
	uint32_t event_flags;
	int64_t spin; /* how long to wait for a vCPU without giving the processor up, ns */
	int64_t patience; /* how long the vCPUs may take to stop, ns */
	struct pyvmm_state_error error;
};

int pyvmm_take_over(struct pyvmm_takeover *takeover);
