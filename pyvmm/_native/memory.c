/* Python's own accesses to guest memory, which raise OSError with EFAULT where the host cannot
 * back it. They are not cffi's: its functions release the interpreter lock around each call, and
 * getting it back from a busy thread takes longer than a thousand such accesses. */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include "memory.h"

#include <errno.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <sys/mman.h>

#include "guard.h"

enum { POPULATE_WRITE = 23 }; /* MADV_POPULATE_WRITE, which Debian 11's headers lack */

typedef uint16_t __attribute__((aligned(1), may_alias)) any_u16;
typedef uint32_t __attribute__((aligned(1), may_alias)) any_u32;
typedef uint64_t __attribute__((aligned(1), may_alias)) any_u64;

/* Sizes that a processor moves at once are moved at once: a vCPU must not see a half, nor write one.
 * x86 keeps loads in the order of the program, and stores as well, and a function that Python calls
 * is nothing that the compiler looks into: in that order the guest sees them, which is what rings
 * need. A load may overtake an earlier store: pyvmm_barrier. In other sizes no order is kept
 * between the bytes of one access; a store behind it is seen after all of them. */
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

/* A write that changes nothing, whoever else is writing: an atomic one, which takes no part in any
 * order. */
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
int pyvmm_add_functions(void *module)
{
	PyGILState_STATE state = PyGILState_Ensure();
	int failed = PyModule_AddFunctions(module, functions);

	PyGILState_Release(state);
	return !failed;
}
