#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include "host.h"

#include <errno.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/vfs.h>
#include <x86intrin.h>

/* fallocate(2), for holes and zeroes in files: 0, or the negative error number. */
int pyvmm_fallocate(int fd, int mode, int64_t offset, int64_t length)
{
	return fallocate(fd, mode, offset, length) < 0 ? -errno : 0;
}

/* fstatfs(2): the magic number of the file system that a file is on, or the negative error
 * number. */
int64_t pyvmm_fs_type(int fd)
{
	struct statfs status;

	return fstatfs(fd, &status) < 0 ? -errno : (int64_t)status.f_type;
}

/* Map a file, or with -1 private anonymous memory, readable and writable at an address of the caller's
 * own, in place of what was mapped there: 0, or the negative error number, and then what was there is
 * gone. Private memory is not reserved. */
int pyvmm_map_over(void *address, size_t size, int fd, int is_shared)
{
	int flags = MAP_FIXED | (is_shared ? MAP_SHARED : MAP_PRIVATE | MAP_NORESERVE);

	if (fd < 0)
		flags |= MAP_ANONYMOUS;
	return mmap(address, size, PROT_READ | PROT_WRITE, flags, fd, 0) == MAP_FAILED ? -errno : 0;
}

/* Have the kernel, and with it KVM, look up anew where a page is: what may be done with it changes, and
 * changes back. At no moment is it less than before, so nobody who uses it notices. */
int pyvmm_forget_page(void *page, size_t size)
{
	if (mprotect(page, size, PROT_READ | PROT_WRITE | PROT_EXEC) ||
	    mprotect(page, size, PROT_READ | PROT_WRITE))
		return -errno;
	return 0;
}

/* Name the calling thread: 0, or the negative error number. Linux keeps 15 bytes. */
int pyvmm_name_thread(const char *name)
{
	return prctl(PR_SET_NAME, name) < 0 ? -errno : 0;
}

/* The processor's time stamp counter. RDTSC waits for no earlier instruction (SDM volume 2):
 * what has to be measured exactly is a system call, which does. */
uint64_t pyvmm_rdtsc(void)
{
	return __rdtsc();
}

/* A full barrier: every store in front of it is seen by all processors before a load behind it
 * is done. It is the one order that x86 does not keep by itself, and that a ring needs where each
 * side writes an index and then reads what the other side has written (virtio 1.3, 2.7.7 and
 * 2.7.10). */
void pyvmm_barrier(void)
{
	__sync_synchronize();
}
