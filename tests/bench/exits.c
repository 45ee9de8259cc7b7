/* Preloaded by bench/exit_loop.py: KVM_RUN without KVM. It comes back at once, with the exit that
 * lies in the kvm_run mapping, for as often as was asked; then as if it had been kicked. */
#define _GNU_SOURCE
#include <errno.h>
#include <linux/kvm.h>
#include <stdarg.h>
#include <sys/ioctl.h>
#include <sys/syscall.h>
#include <unistd.h>
#if __has_include(<valgrind/callgrind.h>)
#include <valgrind/callgrind.h>
#else
#define CALLGRIND_TOGGLE_COLLECT (void)0
#endif

long exits_left;

int ioctl(int fd, unsigned long request, ...)
{
	va_list arguments;
	void *argument;

	if (request == KVM_RUN) {
		if (exits_left-- > 0)
			return 0;
		errno = EINTR;
		return -1;
	}
	va_start(arguments, request);
	argument = va_arg(arguments, void *);
	va_end(arguments);
	return (int)syscall(SYS_ioctl, fd, request, argument);
}

/* Call a function, and have callgrind count what it does. */
void exits_measure(void (*function)(void))
{
	CALLGRIND_TOGGLE_COLLECT;
	function();
	CALLGRIND_TOGGLE_COLLECT;
}
