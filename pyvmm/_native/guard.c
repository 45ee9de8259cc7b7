/* Accesses to guest memory, which the host may be unable to back: a full tmpfs, no huge page left,
 * a file that was cut, a disk with errors. Each of these is SIGBUS; here it ends the access with
 * EFAULT, as it does a system call's. What is not guarded dies of it as before.
 *
 * The functions for Python are not cffi's: those release the interpreter lock around each call,
 * and getting it back from a busy thread takes longer than a thousand such accesses. */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <errno.h>
#include <setjmp.h>
#include <signal.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <sys/mman.h>

enum { POPULATE_WRITE = 23 }; /* MADV_POPULATE_WRITE, which Debian 11's headers lack */

/* Where this thread goes on after SIGBUS. Initial-exec: the handler must not allocate it. */
static __thread sigjmp_buf *guard __attribute__((tls_model("initial-exec")));

/* Do something that touches guest memory: whether it came to its end. It changes no local
 * variable of the function around it that is looked at afterwards. */
#define GUARDED(...)                                        \
	({                                                  \
		sigjmp_buf jump;                            \
		volatile int whole = 0;                     \
		if (!sigsetjmp(jump, 0)) {                  \
			guard = &jump;                      \
			__asm__ volatile("" ::: "memory"); \
			__VA_ARGS__;                        \
			__asm__ volatile("" ::: "memory"); \
			whole = 1;                          \
		}                                           \
		guard = NULL;                               \
		whole;                                      \
	})

/* Whether this thread is in KVM_RUN, and was told there that a page of the guest's is broken. */
static __thread volatile sig_atomic_t is_in_run, is_poisoned
	__attribute__((tls_model("initial-exec")));

/* What SIGBUS did before. */
static struct sigaction unguarded = { .sa_handler = SIG_DFL };

static void handle_sigbus(int signum, siginfo_t *info, void *context)
{
	(void)context;
	/* A page that the host lost and that nobody is touching: whoever does will hear of it. */
	if (info->si_code == BUS_MCEERR_AO)
		return;
	if (guard && info->si_code > 0)
		siglongjmp(*guard, 1);
	if (is_in_run && info->si_code == BUS_MCEERR_AR) {
		is_poisoned = 1;
		return;
	}
	sigaction(signum, &unguarded, NULL);
	raise(signum);
}

/* SA_NODEFER: the jump out of the handler leaves the signal mask as it is. */
static int pyvmm_install_guard(void)
{
	struct sigaction action = { .sa_sigaction = handle_sigbus, .sa_flags = SA_SIGINFO | SA_NODEFER };
	struct sigaction before;

	if (sigaction(SIGBUS, &action, &before) < 0)
		return -errno;
	if (before.sa_sigaction != handle_sigbus)
		unguarded = before;
	return 0;
}

typedef uint16_t __attribute__((aligned(1), may_alias)) any_u16;
typedef uint32_t __attribute__((aligned(1), may_alias)) any_u32;
typedef uint64_t __attribute__((aligned(1), may_alias)) any_u64;

/* Sizes that a processor moves at once are moved at once: another vCPU must not see a half. */
static void copy_bytes(void *to, const void *from, size_t size)
{
	if (size == 8)
		*(volatile any_u64 *)to = *(const volatile any_u64 *)from;
	else if (size == 4)
		*(volatile any_u32 *)to = *(const volatile any_u32 *)from;
	else if (size == 2)
		*(volatile any_u16 *)to = *(const volatile any_u16 *)from;
	else
		memcpy(to, from, size);
}

static int guarded_copy(void *to, const void *from, size_t size)
{
	return GUARDED(copy_bytes(to, from, size));
}

static int guarded_fill(void *to, int value, size_t size)
{
	return GUARDED(memset(to, value, size));
}

/* A write that changes nothing, whoever else is writing. */
static int guarded_touch(uint8_t *start, size_t size)
{
	enum { PAGE = 4096, MANY = 16 * PAGE };
	uintptr_t first = (uintptr_t)start & -PAGE;

	/* One call for all of them, Linux 5.14. What it cannot do the processor may say better. */
	if (size >= MANY && !madvise((void *)first, (uintptr_t)start + size - first, POPULATE_WRITE))
		return 1;
	return GUARDED({
		for (size_t at = 0; at < size; at += PAGE - ((uintptr_t)(start + at) & (PAGE - 1)))
			__atomic_fetch_or(start + at, 0, __ATOMIC_RELAXED);
	});
}

static PyObject *fail(void)
{
	errno = EFAULT;
	return PyErr_SetFromErrno(PyExc_OSError);
}

static PyObject *result(int whole)
{
	if (!whole)
		return fail();
	Py_RETURN_NONE;
}

/* The first two arguments, which are an address and a number of bytes: whether they are. */
static int parse(PyObject *const *arguments, Py_ssize_t count, Py_ssize_t wanted, void **address,
		 Py_ssize_t *size)
{
	if (count != wanted) {
		PyErr_SetString(PyExc_TypeError, "wrong number of arguments");
		return 0;
	}
	unsigned long long number = PyLong_AsUnsignedLongLong(arguments[0]);
	if (number == (unsigned long long)-1 && PyErr_Occurred())
		return 0;
	*address = (void *)(uintptr_t)number;
	if (!size)
		return 1;
	*size = PyLong_AsSsize_t(arguments[1]);
	if (*size < 0 && !PyErr_Occurred())
		PyErr_SetString(PyExc_ValueError, "negative size");
	return *size >= 0;
}

static PyObject *peek(PyObject *self, PyObject *const *arguments, Py_ssize_t count)
{
	void *address;
	Py_ssize_t size;
	PyObject *bytes;

	if (!parse(arguments, count, 2, &address, &size))
		return NULL;
	bytes = PyBytes_FromStringAndSize(NULL, size);
	if (bytes && !guarded_copy(PyBytes_AsString(bytes), address, size)) {
		Py_DECREF(bytes);
		return fail();
	}
	return bytes;
}

static PyObject *poke(PyObject *self, PyObject *const *arguments, Py_ssize_t count)
{
	void *address;
	Py_buffer data;
	int whole;

	if (!parse(arguments, count, 2, &address, NULL) ||
	    PyObject_GetBuffer(arguments[1], &data, PyBUF_SIMPLE) < 0)
		return NULL;
	whole = guarded_copy(address, data.buf, data.len);
	PyBuffer_Release(&data);
	return result(whole);
}

static PyObject *load(PyObject *self, PyObject *const *arguments, Py_ssize_t count)
{
	void *address;
	Py_ssize_t size;
	uint64_t value = 0;

	if (!parse(arguments, count, 2, &address, &size))
		return NULL;
	if (!guarded_copy(&value, address, size <= 8 ? size : 8))
		return fail();
	return PyLong_FromUnsignedLongLong(value);
}

static PyObject *store(PyObject *self, PyObject *const *arguments, Py_ssize_t count)
{
	void *address;
	Py_ssize_t size;
	uint64_t value;

	if (!parse(arguments, count, 3, &address, &size))
		return NULL;
	value = PyLong_AsUnsignedLongLongMask(arguments[2]);
	if (value == (uint64_t)-1 && PyErr_Occurred())
		return NULL;
	return result(guarded_copy(address, &value, size <= 8 ? size : 8));
}

static PyObject *fill(PyObject *self, PyObject *const *arguments, Py_ssize_t count)
{
	void *address;
	Py_ssize_t size;
	long value;

	if (!parse(arguments, count, 3, &address, &size))
		return NULL;
	value = PyLong_AsLong(arguments[2]);
	if (PyErr_Occurred())
		return NULL;
	return result(guarded_fill(address, (int)value, size));
}

static PyObject *touch(PyObject *self, PyObject *const *arguments, Py_ssize_t count)
{
	void *address;
	Py_ssize_t size;

	if (!parse(arguments, count, 2, &address, &size))
		return NULL;
	return result(guarded_touch(address, size));
}

static PyObject *copy(PyObject *self, PyObject *const *arguments, Py_ssize_t count)
{
	Py_buffer to, from;
	int whole = 0, fits;

	if (count != 2) {
		PyErr_SetString(PyExc_TypeError, "wrong number of arguments");
		return NULL;
	}
	if (PyObject_GetBuffer(arguments[0], &to, PyBUF_WRITABLE) < 0)
		return NULL;
	if (PyObject_GetBuffer(arguments[1], &from, PyBUF_SIMPLE) < 0) {
		PyBuffer_Release(&to);
		return NULL;
	}
	fits = to.len == from.len;
	if (fits)
		whole = guarded_copy(to.buf, from.buf, to.len);
	PyBuffer_Release(&to);
	PyBuffer_Release(&from);
	if (!fits) {
		PyErr_SetString(PyExc_ValueError, "buffers of different sizes");
		return NULL;
	}
	return result(whole);
}

#define METHOD(name) { #name, (PyCFunction)(void (*)(void))name, METH_FASTCALL, NULL }
static PyMethodDef functions[] = {
	METHOD(peek), METHOD(poke), METHOD(load), METHOD(store), METHOD(fill), METHOD(touch),
	METHOD(copy), { NULL, NULL, 0, NULL },
};

/* Add them to a Python module: whether that was possible. */
static int pyvmm_add_functions(void *module)
{
	PyGILState_STATE state = PyGILState_Ensure();
	int failed = PyModule_AddFunctions(module, functions);

	PyGILState_Release(state);
	return !failed;
}
