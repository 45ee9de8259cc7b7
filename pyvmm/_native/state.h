/* The state of a vCPU, and of what a VM has beside them, in the kernel's own structures: how it
 * passes from one VM to another while the guest stands still.
 *
 * What is read here and what x86/vcpu_state.py reads is the same, in the same order, and so is
 * what is written; only that has to go through no form in between. */
#pragma once

#ifndef FOR_CFFI
#include <linux/kvm.h>
#include <stdint.h>

#include "kvm.h"
#endif

enum { PYVMM_MAX_MSRS = 768, PYVMM_MAX_CPUID = 256, PYVMM_CHIPS = 3 };

/* As struct kvm_msr_entry. */
struct pyvmm_msr {
	uint32_t index, reserved;
	uint64_t data;
};

/* Which registers are read of each vCPU: first those that always are, then those of which a 0 is
 * as good as nothing. */
struct pyvmm_msr_list {
	uint32_t count, sparse_from;
	uint32_t indices[PYVMM_MAX_MSRS];
};

struct pyvmm_cpu_state {
	struct kvm_regs regs;
	struct kvm_sregs sregs;
	uint64_t pdptrs[4];
	struct kvm_xcrs xcrs;
	struct kvm_debugregs debugregs;
	struct kvm_lapic_state lapic;
	struct kvm_vcpu_events events;
	struct kvm_mp_state mp_state;
	uint32_t has_pdptrs, has_tsc_offset, has_ssp;
	uint64_t tsc_offset, ssp;
	/* Before the value of the deadline is one, LAPIC and TSC have to be there. */
	uint64_t tsc_deadline;
	uint32_t msr_count, reserved;
	struct pyvmm_msr msrs[PYVMM_MAX_MSRS];
};

struct pyvmm_vm_state {
	struct pyvmm_irqchip chips[PYVMM_CHIPS];
	struct kvm_pit_state2 pit;
	/* kvmclock, and CLOCK_BOOTTIME at the same moment, ns. */
	uint64_t clock, boottime;
};

/* What went wrong: which request of whom, and of an MSR which. */
struct pyvmm_state_error {
	uint64_t request;
	uint32_t cpu, msr;
};

int pyvmm_save_cpu(int fd, struct pyvmm_cpu_state *state, void *xsave, int has_xsave2,
		   const struct pyvmm_msr_list *list, struct pyvmm_state_error *error);
int pyvmm_load_cpu(int fd, struct pyvmm_cpu_state *state, const void *xsave, uint32_t event_flags,
		   struct pyvmm_state_error *error);
void pyvmm_age_pit(struct kvm_pit_state2 *pit);
int pyvmm_save_vm(int fd, struct pyvmm_vm_state *state, struct pyvmm_state_error *error);
int pyvmm_load_vm(int fd, struct pyvmm_vm_state *state, struct pyvmm_state_error *error);
