/* The KVM API: structures with all members named, and ioctls with the error as their result. */
#pragma once

#ifndef FOR_CFFI
#include <linux/kvm.h>
#include <stddef.h>
#include <stdint.h>
#endif

/* struct kvm_irqchip, kvm_ioapic_state and kvm_run have anonymous unions, which cffi cannot
 * name. These have the same layout; the assertions in kvm.c say so. */

struct pyvmm_ioapic {
	uint64_t base_address;
	uint32_t ioregsel, id, irr, pad;
	uint64_t redirtbl[24];
};
union pyvmm_chip {
	char dummy[512];
	struct kvm_pic_state pic;
	struct pyvmm_ioapic ioapic;
};
struct pyvmm_irqchip {
	uint32_t chip_id, pad;
	union pyvmm_chip chip;
};

/* Of struct kvm_run the head, which is the same for all exits, and the exits that pyvmm reads. */

struct pyvmm_run_io {
	uint8_t direction, size;
	uint16_t port;
	uint32_t count;
	uint64_t data_offset;
};
struct pyvmm_run_mmio {
	uint64_t phys_addr;
	uint8_t data[8];
	uint32_t len;
	uint8_t is_write;
};
struct pyvmm_run_internal {
	uint32_t suberror, ndata;
	uint64_t data[16];
};
struct pyvmm_run_system_event {
	uint32_t type, ndata;
	uint64_t data[16];
};
struct pyvmm_run_fail_entry {
	uint64_t hardware_entry_failure_reason;
	uint32_t cpu;
};
union pyvmm_run_exit {
	struct pyvmm_run_io io;
	struct pyvmm_run_mmio mmio;
	struct pyvmm_run_internal internal;
	struct pyvmm_run_system_event system_event;
	struct pyvmm_run_fail_entry fail_entry;
	char padding[256];
};
struct pyvmm_run {
	uint8_t request_interrupt_window, immediate_exit, padding1[6];
	uint32_t exit_reason;
	uint8_t ready_for_interrupt_injection, if_flag;
	uint16_t flags;
	uint64_t cr8, apic_base;
	union pyvmm_run_exit exit;
};

int pyvmm_ioctl(int fd, unsigned long request, void *argument);
int pyvmm_ioctl_value(int fd, unsigned long request, unsigned long argument);
struct pyvmm_slot;
struct pyvmm_answers;

/* Of one vCPU: what its thread finds between two KVM_RUNs. */
struct pyvmm_gate {
	struct pyvmm_slot *slot; /* where it changes hands, or NULL */
	struct pyvmm_run *run; /* the kvm_run mapping */
	/* What is answered here, or NULL; and the table that is in use, which must stay. */
	struct pyvmm_answers *answers, *used;
};

int pyvmm_run(int vcpu_fd, struct pyvmm_gate *gate);
int pyvmm_install_kick(int signum);
void *pyvmm_map(int fd, size_t size);
void *pyvmm_map_private(size_t size);
int pyvmm_change(uint32_t *word, uint32_t from, uint32_t to);
void pyvmm_wake(uint32_t *word);
int pyvmm_unmap(void *address, size_t size);
