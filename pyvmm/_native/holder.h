/* A task that outlives an execve of the process, with its memory. */
#pragma once

#ifndef FOR_CFFI
#include <stddef.h>
#endif

int pyvmm_hold_memory(const int *keep_fds, size_t count, int release_fd);
