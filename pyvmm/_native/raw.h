/* System calls without libc, for tasks that share the memory of a process and not its life.
 *
 * The other threads of that process go on, and at an exec are gone from one instruction to the
 * next. libc's state is theirs, not the task's: a lock that one of them held stays locked for
 * ever, and the thread pointer is that of the thread that made the task, so errno would be written
 * into that thread's. So the files that include this use no function of libc, no errno and no
 * thread-local storage; build.py compiles them so that the compiler adds no call or canary either,
 * and tests/unit/test_native.py sees that nothing is left. */
#pragma once

#include <asm/unistd.h>
#include <linux/errno.h>
#include <linux/futex.h>
#include <linux/sched.h>
#include <linux/time_types.h>
#include <stddef.h>
#include <stdint.h>

enum { SECOND_NS = 1000000000 };

static inline long raw_syscall(long number, long a, long b, long c, long d, long e)
{
	register long fourth __asm__("r10") = d;
	register long fifth __asm__("r8") = e;
	long result;

	__asm__ volatile("syscall"
			 : "=a"(result)
			 : "a"(number), "D"(a), "S"(b), "d"(c), "r"(fourth), "r"(fifth)
			 : "rcx", "r11", "memory");
	return result;
}

/* clone(2) of a task that runs a function, which does not return, on a stack of its own: its
 * process id, or the negative error number. The system call is a full barrier: the task finds what
 * was stored before. All that it finds later has to be left alone. */
static inline long start_task(long flags, void (*run)(void *), void *argument, void *stack_end)
{
	register void (*function)(void *) __asm__("r12") = run;
	register void *parameter __asm__("r13") = argument;
	register long tls __asm__("r8") = 0;
	register long child_tid __asm__("r10") = 0;
	long result;

	/* The registers are copied, but for rax and the stack. A frame of 0 is the outermost. */
	__asm__ volatile("syscall\n\t"
			 "test %%rax, %%rax\n\t"
			 "jnz 1f\n\t"
			 "xor %%ebp, %%ebp\n\t"
			 "mov %%r13, %%rdi\n\t"
			 "call *%%r12\n\t"
			 "ud2\n"
			 "1:"
			 : "=a"(result)
			 : "a"((long)__NR_clone), "D"(flags), "S"(stack_end), "d"(0L), "r"(child_tid),
			   "r"(tls), "r"(function), "r"(parameter)
			 : "rcx", "r11", "memory", "cc");
	return result;
}

static inline int raw_ioctl(int fd, unsigned long request, const void *argument)
{
	return (int)raw_syscall(__NR_ioctl, fd, (long)request, (long)argument, 0, 0);
}

static inline int64_t raw_clock(int clock)
{
	struct __kernel_timespec now = { 0 };

	raw_syscall(__NR_clock_gettime, clock, (long)&now, 0, 0, 0);
	return now.tv_sec * SECOND_NS + now.tv_nsec;
}

/* Words that two address spaces share: not FUTEX_PRIVATE_FLAG. What is stored before a word is
 * seen by whoever has seen the word. */

static inline uint32_t load_word(const uint32_t *word)
{
	return __atomic_load_n(word, __ATOMIC_SEQ_CST);
}

static inline void store_word(uint32_t *word, uint32_t value)
{
	__atomic_store_n(word, value, __ATOMIC_SEQ_CST);
}

static inline int change_word(uint32_t *word, uint32_t from, uint32_t to)
{
	return __atomic_compare_exchange_n(word, &from, to, 0, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);
}

/* Wait while a word has a value, at most that long (ns; 0: for ever), or until something else ends
 * the wait: the caller looks at the word again. */
static inline void wait_word(const uint32_t *word, uint32_t value, int64_t timeout_ns)
{
	struct __kernel_timespec timeout = { timeout_ns / SECOND_NS, timeout_ns % SECOND_NS };

	raw_syscall(__NR_futex, (long)word, FUTEX_WAIT, value, timeout_ns ? (long)&timeout : 0, 0);
}

static inline void wake_word(const uint32_t *word)
{
	raw_syscall(__NR_futex, (long)word, FUTEX_WAKE, 0x7FFFFFFF, 0, 0);
}
