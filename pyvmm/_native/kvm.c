#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include "kvm.h"

#include <errno.h>
#include <signal.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <time.h>

#include "answers.h"
#include "carrier.h"
#include "guard.h"
#include "raw.h"

#define SAME_OFFSET(view, member, kernel, kernel_member)                                      \
	_Static_assert(offsetof(struct view, member) == offsetof(struct kernel, kernel_member), \
		       #view "." #member)

SAME_OFFSET(pyvmm_irqchip, chip, kvm_irqchip, chip);
_Static_assert(sizeof(struct pyvmm_irqchip) == sizeof(struct kvm_irqchip), "kvm_irqchip");
SAME_OFFSET(pyvmm_ioapic, redirtbl, kvm_ioapic_state, redirtbl);
_Static_assert(sizeof(struct pyvmm_ioapic) == sizeof(struct kvm_ioapic_state), "kvm_ioapic");
SAME_OFFSET(pyvmm_run, immediate_exit, kvm_run, immediate_exit);
SAME_OFFSET(pyvmm_run, exit_reason, kvm_run, exit_reason);
SAME_OFFSET(pyvmm_run, cr8, kvm_run, cr8);
SAME_OFFSET(pyvmm_run, exit.io.data_offset, kvm_run, io.data_offset);
SAME_OFFSET(pyvmm_run, exit.mmio.data, kvm_run, mmio.data);
SAME_OFFSET(pyvmm_run, exit.mmio.is_write, kvm_run, mmio.is_write);
SAME_OFFSET(pyvmm_run, exit.internal.data, kvm_run, internal.data);
SAME_OFFSET(pyvmm_run, exit.system_event.type, kvm_run, system_event.type);
SAME_OFFSET(pyvmm_run, exit.fail_entry.hardware_entry_failure_reason, kvm_run,
	    fail_entry.hardware_entry_failure_reason);

_Static_assert(offsetof(struct kvm_sregs2, flags) == offsetof(struct kvm_sregs, interrupt_bitmap),
	       "kvm_sregs2 begins as kvm_sregs does");
_Static_assert(sizeof(struct kvm_msrs) == 8 && sizeof(struct kvm_msr_entry) == 16 &&
		       offsetof(struct kvm_msr_entry, data) == 8,
	       "kvm_msrs as words of 64 bits");

/* An ioctl that takes a pointer: its result, or the negative error number. The kernel copies the
 * structure, in or out, before it returns: nobody else may look at it meanwhile. */
int pyvmm_ioctl(int fd, unsigned long request, void *argument)
{
	int result = ioctl(fd, request, argument);

	return result < 0 ? -errno : result;
}

/* An ioctl that takes a number: its result, or the negative error number. */
int pyvmm_ioctl_value(int fd, unsigned long request, unsigned long argument)
{
	int result = ioctl(fd, request, argument);

	return result < 0 ? -errno : result;
}

static int enter(int vcpu_fd)
{
	int result;

	guard.is_in_run = 1;
	result = pyvmm_ioctl_value(vcpu_fd, KVM_RUN, 0);
	guard.is_in_run = 0;
	if (guard.is_poisoned) {
		guard.is_poisoned = 0;
		return -EHWPOISON;
	}
	return result;
}

/* Answer the access that the vCPU came back with, by the table of this moment: whether that was
 * possible. Whoever replaces the table keeps the one that was for as long as it is in use: it is
 * looked at again once everybody sees which that is. */
static int answer(struct pyvmm_gate *gate)
{
	struct pyvmm_answers *answers = __atomic_load_n(&gate->answers, __ATOMIC_SEQ_CST);
	struct pyvmm_answers *before;
	int answered;

	do {
		before = answers;
		__atomic_store_n(&gate->used, before, __ATOMIC_SEQ_CST);
		answers = __atomic_load_n(&gate->answers, __ATOMIC_SEQ_CST);
	} while (answers != before);
	answered = answers && pyvmm_answer(answers, gate->run);
	__atomic_store_n(&gate->used, NULL, __ATOMIC_RELEASE);
	return answered;
}

static int64_t now_ns(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return now.tv_sec * (int64_t)SECOND_NS + now.tv_nsec;
}

/* KVM_RUN, again and again while what the vCPU comes back with is answered here: 0 for another
 * exit, 1 for accesses that the vCPU made elsewhere (gate->slot), or the negative
 * error number. fcntl.ioctl retries EINTR from Python 3.14 on, and a kicked KVM_RUN must come back.
 * On x86 KVM tells of a page with a hardware error by SIGBUS, whose handler has run when ioctl
 * returns.
 *
 * The exit in the kvm_run mapping belongs to the calling thread until the next KVM_RUN. The
 * exception is immediate_exit, which others set: KVM reads it on entry, after which only a signal
 * ends KVM_RUN. So who stops a vCPU stores it first and kicks then. The system call that sends
 * the signal keeps that order, for the vCPU's thread as well: no barrier is needed.
 *
 * While gate->slot is set the vCPU changes hands, here and without the interpreter, which one thread
 * after the other would wait for. An image that goes gives the vCPU to the carrier as soon as
 * no access is half done, and waits; should it come back, it goes on with what KVM_RUN said there. An
 * image that comes waits until it has been given the vCPU. */
int pyvmm_run(int vcpu_fd, struct pyvmm_gate *gate)
{
	struct pyvmm_slot *slot = __atomic_load_n(&gate->slot, __ATOMIC_SEQ_CST);
	uint32_t owner;
	int result;

	if (slot && (owner = load_word(&slot->owner)) != PYVMM_OLD && owner != PYVMM_KEPT) {
		while (load_word(&slot->owner) == PYVMM_CARRIED)
			wait_word(&slot->owner, PYVMM_CARRIED, 0);
		slot->run_at = now_ns();
		__atomic_store_n(&gate->slot, NULL, __ATOMIC_SEQ_CST);
		if (slot->write_count || slot->has_exit)
			return 1;
	}
	do
		result = enter(vcpu_fd);
	while (!result && answer(gate));
	slot = __atomic_load_n(&gate->slot, __ATOMIC_SEQ_CST);
	if (result != -EINTR || !slot)
		return result;
	slot->left = now_ns();
	/* Unless that was taken back since. */
	if (!change_word(&slot->owner, PYVMM_OLD, PYVMM_CARRIED))
		return result;
	wake_word(&slot->owner);
	while ((owner = load_word(&slot->owner)) != PYVMM_OLD)
		wait_word(&slot->owner, owner, 0);
	return slot->result;
}

static void ignore_signal(int signum)
{
	(void)signum;
}

/* Give the kick its handler: 0, or the negative error number. A kick only has to end KVM_RUN
 * with EINTR: no SA_RESTART, and no Python handler that the main thread would have to run for
 * each kick. */
int pyvmm_install_kick(int signum)
{
	struct sigaction action = { .sa_handler = ignore_signal };

	return sigaction(signum, &action, NULL) < 0 ? -errno : 0;
}

/* mmap of a vCPU descriptor without the duplicate descriptor that Python's mmap keeps; NULL if
 * the host does not do it. */
void *pyvmm_map(int fd, size_t size)
{
	void *address = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);

	return address == MAP_FAILED ? NULL : address;
}

/* Private memory for tasks' stacks, which are touched as they are used; NULL if the host has none. */
void *pyvmm_map_private(size_t size)
{
	void *address = mmap(NULL, size, PROT_READ | PROT_WRITE,
			     MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);

	return address == MAP_FAILED ? NULL : address;
}

/* Change a word if it has a value: whether it had. */
int pyvmm_change(uint32_t *word, uint32_t from, uint32_t to)
{
	return change_word(word, from, to);
}

/* Wake whoever waits for a word to change. */
void pyvmm_wake(uint32_t *word)
{
	wake_word(word);
}

/* Undo pyvmm_map: 0, or the negative error number. No thread may be in KVM_RUN by then. */
int pyvmm_unmap(void *address, size_t size)
{
	return munmap(address, size) < 0 ? -errno : 0;
}
