/* What Python cannot do itself: system calls whose error number must not be lost or retried,
 * a signal handler that does nothing, and a task that outlives an execve. */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <errno.h>
#include <linux/kvm.h>
#include <sched.h>
#include <signal.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <x86intrin.h>

/* struct kvm_irqchip and struct kvm_run end in anonymous unions, which cffi cannot name. The
 * views below have the same layout; the assertions say so. */
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

struct pyvmm_run_io { uint8_t direction, size; uint16_t port; uint32_t count; uint64_t data_offset; };
struct pyvmm_run_mmio { uint64_t phys_addr; uint8_t data[8]; uint32_t len; uint8_t is_write; };
struct pyvmm_run_internal { uint32_t suberror, ndata; uint64_t data[16]; };
struct pyvmm_run_system_event { uint32_t type, ndata; uint64_t data[16]; };
struct pyvmm_run_fail_entry { uint64_t hardware_entry_failure_reason; uint32_t cpu; };
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

/* The result, or the negative error number. */
static int pyvmm_ioctl(int fd, unsigned long request, void *argument)
{
	int result = ioctl(fd, request, argument);

	return result < 0 ? -errno : result;
}

static int pyvmm_ioctl_value(int fd, unsigned long request, unsigned long argument)
{
	int result = ioctl(fd, request, argument);

	return result < 0 ? -errno : result;
}

/* fcntl.ioctl retries EINTR from Python 3.14 on, and a kicked KVM_RUN must come back. */
static int pyvmm_run(int vcpu_fd)
{
	return pyvmm_ioctl_value(vcpu_fd, KVM_RUN, 0);
}

static void ignore_signal(int signum)
{
	(void)signum;
}

/* A kick only has to end KVM_RUN with EINTR: no SA_RESTART, and no Python handler that the
 * main thread would have to run for each kick. */
static int pyvmm_install_kick(int signum)
{
	struct sigaction action = { .sa_handler = ignore_signal };

	return sigaction(signum, &action, NULL) < 0 ? -errno : 0;
}

/* mmap of a vCPU descriptor without the duplicate descriptor that Python's mmap keeps. */
static void *pyvmm_map(int fd, size_t size)
{
	void *address = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);

	return address == MAP_FAILED ? NULL : address;
}

static int pyvmm_unmap(void *address, size_t size)
{
	return munmap(address, size) < 0 ? -errno : 0;
}

static int pyvmm_name_thread(const char *name)
{
	return prctl(PR_SET_NAME, name) < 0 ? -errno : 0;
}

/* Orders an earlier store before a later load, which x86 alone does not. */
static void pyvmm_barrier(void)
{
	__sync_synchronize();
}

static uint64_t pyvmm_rdtsc(void)
{
	return __rdtsc();
}

/* ---- a holder for the old address space ------------------------------------------------
 *
 * execve drops the caller's address space, and whoever drops it last takes it apart: with
 * gigabytes of guest RAM mapped, and a VM whose last descriptor closes on exec, that takes
 * longer than everything else in the guest's pause. A task made by clone(CLONE_VM) in a
 * thread group of its own shares the address space and survives the exec, so the taking
 * apart happens when it exits: after the new VM runs.
 *
 * The task shares this process's memory but not its descriptors or signal handlers. It may
 * use neither errno nor any lock of libc, so it makes raw system calls only, and it runs
 * with all signals blocked. It ends when release_fd (the read end of a pipe) reaches end of
 * file: when the new image closes the other end, or when nobody is left to do so. */

static long raw_syscall(long number, long a, long b, long c)
{
	long result;

	__asm__ volatile("syscall"
			 : "=a"(result)
			 : "a"(number), "D"(a), "S"(b), "d"(c)
			 : "rcx", "r11", "memory");
	return result;
}

struct holder {
	int release_fd, count;
	int keep[64]; /* ascending */
};

static struct holder holder;
static char holder_stack[16384] __attribute__((aligned(16)));

static int hold(void *argument)
{
	struct holder *self = argument;
	unsigned int from = 0;
	char byte;

	/* A descriptor left open here would delay a peer's end of file. */
	for (int i = 0; i < self->count; i++) {
		if ((unsigned int)self->keep[i] > from)
			raw_syscall(SYS_close_range, from, self->keep[i] - 1, 0);
		from = self->keep[i] + 1;
	}
	raw_syscall(SYS_close_range, from, ~0U, 0);
	while (raw_syscall(SYS_read, self->release_fd, (long)&byte, 1) == -EINTR)
		;
	raw_syscall(SYS_exit_group, 0, 0, 0);
	return 0;
}

/* Start the holder: its process id, or the negative error number. keep_fds, in ascending
 * order, stay open in it and must contain release_fd. One holder at a time. The child is
 * reaped with __WALL; it sends no signal when it ends. */
static int pyvmm_hold_memory(const int *keep_fds, int count, int release_fd)
{
	sigset_t all, old;
	int pid, error;

	if (count < 0 || count > (int)(sizeof(holder.keep) / sizeof(holder.keep[0])))
		return -EINVAL;
	memcpy(holder.keep, keep_fds, count * sizeof(int));
	holder.count = count;
	holder.release_fd = release_fd;
	sigfillset(&all);
	pthread_sigmask(SIG_SETMASK, &all, &old);
	pid = clone(hold, holder_stack + sizeof(holder_stack), CLONE_VM, &holder);
	error = errno;
	pthread_sigmask(SIG_SETMASK, &old, NULL);
	return pid < 0 ? -error : pid;
}
