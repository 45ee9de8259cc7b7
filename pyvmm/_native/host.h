/* What Python's os and time lack of the host. */
#pragma once

#ifndef FOR_CFFI
#include <stddef.h>
#include <stdint.h>
#endif

int pyvmm_fallocate(int fd, int mode, int64_t offset, int64_t length);
int64_t pyvmm_fs_type(int fd);
int pyvmm_map_over(void *address, size_t size, int fd, int is_shared);
int pyvmm_forget_page(void *page, size_t size);
int pyvmm_name_thread(const char *name);
uint64_t pyvmm_rdtsc(void);
void pyvmm_barrier(void);
