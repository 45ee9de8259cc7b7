/* What Python cannot do itself: system calls whose error number must not be lost or retried,
 * a signal handler that does nothing, and a task that outlives an execve; and what it does too
 * slowly: moving frames and blocks between queues and the host. */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <errno.h>
#include <fcntl.h>
#include <linux/falloc.h>
#include <linux/kvm.h>
#include <linux/virtio_blk.h>
#include <linux/virtio_net.h>
#include <linux/virtio_ring.h>
#include <sched.h>
#include <signal.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/vfs.h>
#include <unistd.h>
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

_Static_assert(offsetof(struct kvm_sregs2, flags) == offsetof(struct kvm_sregs, interrupt_bitmap),
	       "kvm_sregs2 begins as kvm_sregs does");
_Static_assert(sizeof(struct kvm_msrs) == 8 && sizeof(struct kvm_msr_entry) == 16 &&
		       offsetof(struct kvm_msr_entry, data) == 8,
	       "kvm_msrs as words of 64 bits");

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

/* fcntl.ioctl retries EINTR from Python 3.14 on, and a kicked KVM_RUN must come back. On x86 KVM
 * tells of a page with a hardware error by SIGBUS, whose handler has run when ioctl returns. */
static int pyvmm_run(int vcpu_fd)
{
	int result;

	is_in_run = 1;
	result = pyvmm_ioctl_value(vcpu_fd, KVM_RUN, 0);
	is_in_run = 0;
	if (is_poisoned) {
		is_poisoned = 0;
		return -EHWPOISON;
	}
	return result;
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

/* Python's os has neither: holes and zeroes in files, and what file system a file is on. */
static int pyvmm_fallocate(int fd, int mode, int64_t offset, int64_t length)
{
	return fallocate(fd, mode, offset, length) < 0 ? -errno : 0;
}

static int64_t pyvmm_fs_type(int fd)
{
	struct statfs status;

	return fstatfs(fd, &status) < 0 ? -errno : (int64_t)status.f_type;
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
 * with all signals blocked. What it reads (the list of descriptors, its stack) nobody frees. It
 * ends when release_fd (the read end of a pipe) reaches end of file: when the new image closes
 * the other end, or when nobody is left to do so. */

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
	int release_fd;
	size_t count;
	const int *keep; /* ascending */
};

static struct holder holder;
static char holder_stack[16384] __attribute__((aligned(16)));

static int hold(void *argument)
{
	struct holder *self = argument;
	unsigned int from = 0;
	char byte;

	/* A descriptor left open here would delay a peer's end of file. */
	for (size_t i = 0; i < self->count; i++) {
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
 * order, stay open in it and must contain release_fd; the task reads the list at any time
 * until it ends. One holder at a time. The child is reaped with __WALL; it sends no signal
 * when it ends. */
static int pyvmm_hold_memory(const int *keep_fds, size_t count, int release_fd)
{
	sigset_t all, old;
	int pid, error;

	holder.keep = keep_fds;
	holder.count = count;
	holder.release_fd = release_fd;
	sigfillset(&all);
	pthread_sigmask(SIG_SETMASK, &all, &old);
	pid = clone(hold, holder_stack + sizeof(holder_stack), CLONE_VM, &holder);
	error = errno;
	pthread_sigmask(SIG_SETMASK, &old, NULL);
	return pid < 0 ? -error : pid;
}

/* ---- frames and blocks between queues and the host ----------------------------------------
 *
 * A frame of 64 KiB goes into dozens of small buffers, at a few microseconds of Python each, and
 * small frames and blocks are many. Here is only what drivers do all the time (virtio 1.3, 5.1.6
 * and 5.2.6): buffers in RAM; to receive frames, one direct descriptor each; otherwise a chain of
 * a few. All else, broken rings and memory that the host cannot back included, is left to Python,
 * which takes the same chain again and judges it.
 *
 * The driver may change all of it meanwhile: what is looked at is read once. Loads and stores
 * of rings stay in their order: volatile for the compiler, and x86 keeps it. */

typedef uint64_t __attribute__((aligned(1))) unaligned_u64;

enum { MAX_BUFFERS = 64, NET_HEADER = sizeof(struct virtio_net_hdr_mrg_rxbuf) };

struct pyvmm_span {
	uint64_t start, end; /* guest-physical, not empty */
	uint8_t *host;	     /* where start is */
};

struct pyvmm_ring {
	struct pyvmm_span *spans;  /* what the driver may give for writing */
	uint32_t span_count, size; /* size: a power of two */
	int indirect;		   /* whether VIRTIO_F_INDIRECT_DESC was negotiated */
	uint64_t *desc;		   /* two for each descriptor */
	uint16_t *avail;	   /* flags, idx, ring[size] */
	uint32_t *used;		   /* flags and idx, then two for each element */
};

struct pyvmm_received {
	uint32_t spent, chains; /* of the budget; returned */
	uint32_t held;		/* bytes of the frame in the buffer; 0 for none */
};

static uint8_t *guest_buffer(const struct pyvmm_ring *ring, uint64_t gpa, uint32_t length)
{
	for (uint32_t i = 0; i < ring->span_count; i++) {
		const struct pyvmm_span *span = &ring->spans[i];

		if (gpa >= span->start && gpa < span->end && length <= span->end - gpa)
			return span->host + (gpa - span->start);
	}
	return NULL;
}

static void put_used(const struct pyvmm_ring *ring, uint16_t at, uint32_t head, uint32_t written)
{
	volatile uint32_t *element = ring->used + 1 + 2 * (at & (ring->size - 1));

	element[0] = head;
	element[1] = written;
}

static int spread(const struct pyvmm_ring *ring, uint16_t last_avail, uint16_t used_idx,
		  const uint8_t *frame, uint32_t length, int mergeable)
{
	const volatile uint16_t *avail = ring->avail;
	uint16_t waiting = avail[1] - last_avail;
	uint8_t *header = NULL;
	uint32_t done = 0;
	uint16_t count = 0;

	if (waiting > ring->size || length < NET_HEADER)
		return 0;
	while (done < length) {
		if (count == waiting)
			/* With a whole ring of them there will never be more. */
			return count == ring->size ? 0 : ~(int)count;
		uint16_t head = avail[2 + ((last_avail + count) & (ring->size - 1))];
		if (head >= ring->size)
			return 0;
		const volatile uint64_t *desc = ring->desc + 2 * head;
		uint64_t gpa = desc[0], rest = desc[1];
		uint32_t room = (uint32_t)rest, part = length - done;
		uint8_t *buffer = guest_buffer(ring, gpa, room);
		if ((uint16_t)(rest >> 32) != VRING_DESC_F_WRITE || !room || !buffer)
			return 0;
		if (part > room) {
			if (!mergeable)
				return 0;
			part = room;
		}
		if (!count) {
			if (part < NET_HEADER)
				return 0;
			header = buffer;
		}
		memcpy(buffer, frame + done, part);
		put_used(ring, used_idx + count, head, part);
		done += part;
		count++;
	}
	memcpy(header + offsetof(struct virtio_net_hdr_mrg_rxbuf, num_buffers), &count, 2);
	return count;
}

/* Put a frame, which begins with its header, into the next chains of a queue, and their
 * elements into the used ring, without returning them: the caller moves the index.
 *
 * How many chains that took; 0 if it cannot be done here; ~N if only N chains are there, and
 * they are too few. */
static int pyvmm_spread(const struct pyvmm_ring *ring, uint16_t last_avail, uint16_t used_idx,
			const uint8_t *frame, uint32_t length, int mergeable)
{
	volatile int count = 0;

	GUARDED(count = spread(ring, last_avail, used_idx, frame, length, mergeable));
	return count;
}

/* Read frames, headers first, from a descriptor that gives one each time, spread them and
 * return their chains. Shorter ones than that are dropped. It ends when there is no frame, when
 * one cannot be spread, which is then left in the buffer, or when the budget is spent: of each
 * frame its bytes, but no less than least. */
static void pyvmm_receive(const struct pyvmm_ring *ring, uint16_t last_avail, uint16_t used_idx,
			  int fd, uint8_t *buffer, uint32_t size, uint32_t shortest,
			  int mergeable, uint32_t budget, uint32_t least,
			  struct pyvmm_received *received)
{
	volatile uint16_t *used = (volatile uint16_t *)ring->used;

	*received = (struct pyvmm_received){ 0 };
	while (received->spent < budget) {
		ssize_t length = read(fd, buffer, size);
		if (length < 0)
			break;
		if (length >= shortest) {
			int count = pyvmm_spread(ring, last_avail, used_idx, buffer,
						 (uint32_t)length, mergeable);
			if (count <= 0 || !GUARDED(used[1] = used_idx + count)) {
				received->held = (uint32_t)length;
				break;
			}
			last_avail += count;
			used_idx += count;
			received->chains += count;
		}
		received->spent += length > least ? (uint32_t)length : least;
	}
}

struct chain {
	struct iovec buffers[MAX_BUFFERS]; /* those for reading come first */
	int readable, count;
	uint64_t readable_size, writable_size; /* bytes */
};

/* Read a chain: whether it is one that can be served here. */
static int gather(const struct pyvmm_ring *ring, uint32_t index, struct chain *chain)
{
	const volatile unaligned_u64 *table = ring->desc;
	uint32_t entries = ring->size;
	int may_jump = ring->indirect;

	chain->readable = chain->count = 0;
	chain->readable_size = chain->writable_size = 0;
	while (chain->count < MAX_BUFFERS && index < entries) {
		uint64_t gpa = table[2 * index], rest = table[2 * index + 1];
		uint32_t size = (uint32_t)rest;
		uint16_t flags = rest >> 32;
		uint8_t *at = guest_buffer(ring, gpa, size);
		if (!size || !at)
			return 0;
		if (flags == VRING_DESC_F_INDIRECT && may_jump) {
			if (size % sizeof(struct vring_desc))
				return 0;
			table = (const volatile unaligned_u64 *)at;
			entries = size / sizeof(struct vring_desc);
			index = 0;
			may_jump = 0;
			continue;
		}
		if (flags & ~(VRING_DESC_F_NEXT | VRING_DESC_F_WRITE))
			return 0;
		chain->buffers[chain->count++] = (struct iovec){ at, size };
		if (flags & VRING_DESC_F_WRITE) {
			chain->writable_size += size;
		} else {
			if (chain->writable_size)
				return 0;
			chain->readable_size += size;
			chain->readable++;
		}
		if (!(flags & VRING_DESC_F_NEXT))
			return 1;
		index = rest >> 48;
	}
	return 0;
}

/* The next chain that waits in a queue: whether there is one that can be served here. */
static int take(const struct pyvmm_ring *ring, uint16_t last_avail, uint16_t *head,
		struct chain *chain)
{
	const volatile uint16_t *avail = ring->avail;
	uint16_t waiting = avail[1] - last_avail;

	if (!waiting || waiting > ring->size)
		return 0;
	*head = avail[2 + (last_avail & (ring->size - 1))];
	return gather(ring, *head, chain);
}

static void give_back(const struct pyvmm_ring *ring, uint16_t used_idx, uint32_t head,
		      uint32_t written)
{
	put_used(ring, used_idx, head, written);
	((volatile uint16_t *)ring->used)[1] = used_idx + 1;
}

static int send_next(const struct pyvmm_ring *ring, uint16_t last_avail, uint16_t used_idx, int fd,
		     uint32_t shortest, uint32_t longest)
{
	struct chain chain;
	uint16_t head;

	if (!take(ring, last_avail, &head, &chain) || chain.writable_size)
		return 0;
	if (chain.readable_size < shortest || chain.readable_size > longest)
		return 0;
	if (writev(fd, chain.buffers, chain.count) < 0 &&
	    (errno == EAGAIN || errno == EINTR || errno == EFAULT))
		return 0;
	give_back(ring, used_idx, head, 0);
	return 1;
}

/* Write the frames that wait in a queue, headers first, each with one call, and return them.
 * Frames shorter or longer than that are left, as is one that the descriptor does not take yet;
 * one that it never takes is dropped. How many were done, most of them at once. */
static int pyvmm_send(const struct pyvmm_ring *ring, uint16_t last_avail, uint16_t used_idx,
		      int fd, uint32_t shortest, uint32_t longest, int most)
{
	volatile int sent = 1;
	int done;

	for (done = 0; done < most; done++) {
		if (!GUARDED(sent = send_next(ring, last_avail + done, used_idx + done, fd,
					      shortest, longest)) || !sent)
			break;
	}
	return done;
}

enum { SECTOR = 512, BLK_HEADER = sizeof(struct virtio_blk_outhdr) };

struct pyvmm_image {
	int fd;
	int read_flags; /* of preadv2, with which it does not wait; negative: none are read here */
	int writable;	/* whether writes are for here */
	uint32_t block, longest; /* bytes: of which requests are multiples; of a request */
	uint64_t capacity;	 /* bytes */
};

/* Read or write what a request asks for, all of it: whether that was done. */
static int transfer(const struct pyvmm_image *image, struct chain *chain)
{
	struct iovec *first = chain->buffers, *last = first + chain->count - 1;
	ssize_t done = -1;

	if (!chain->readable || first->iov_len < BLK_HEADER || !chain->writable_size ||
	    chain->readable_size + chain->writable_size > BLK_HEADER + image->longest + 1)
		return 0;
	const volatile unaligned_u64 *header = first->iov_base;
	uint32_t type = (uint32_t)header[0];
	uint64_t sector = header[1];
	uint64_t size = type == VIRTIO_BLK_T_IN ? chain->writable_size - 1 :
						  chain->readable_size - BLK_HEADER;
	if (sector > image->capacity / SECTOR || size > image->capacity - sector * SECTOR ||
	    (sector * SECTOR | size) % image->block)
		return 0;
	first->iov_base = (uint8_t *)first->iov_base + BLK_HEADER;
	first->iov_len -= BLK_HEADER;
	volatile uint8_t *status = (uint8_t *)last->iov_base + --last->iov_len;
	if (type == VIRTIO_BLK_T_IN && image->read_flags >= 0)
		done = preadv2(image->fd, first + chain->readable, chain->count - chain->readable,
			       sector * SECTOR, image->read_flags);
	else if (type == VIRTIO_BLK_T_OUT && image->writable)
		done = pwritev(image->fd, first, chain->readable, sector * SECTOR);
	if (done < 0 || (uint64_t)done != size)
		return 0;
	*status = VIRTIO_BLK_S_OK;
	return 1;
}

static int serve_next(const struct pyvmm_ring *ring, uint16_t last_avail, uint16_t used_idx,
		      const struct pyvmm_image *image)
{
	struct chain chain;
	uint16_t head;

	if (!take(ring, last_avail, &head, &chain) || !transfer(image, &chain))
		return 0;
	give_back(ring, used_idx, head, (uint32_t)chain.writable_size);
	return 1;
}

/* Serve the requests that wait in a queue, up to the first that this is nothing for, or that
 * the host does not do at once: that one is left, and begun anew by Python. How many were done,
 * most of them at once. */
static int pyvmm_serve(const struct pyvmm_ring *ring, uint16_t last_avail, uint16_t used_idx,
		       const struct pyvmm_image *image, int most)
{
	volatile int served = 1;
	int done;

	/* No more may be under way than there are elements in the used ring. */
	if ((uint16_t)(last_avail - used_idx) >= ring->size)
		return 0;
	for (done = 0; done < most; done++) {
		if (!GUARDED(served = serve_next(ring, last_avail + done, used_idx + done, image)) ||
		    !served)
			break;
	}
	return done;
}
