/* A type and functions of a module, and not cffi's functions, for the same reason as in memory.c: what
 * they do takes less time than giving up the interpreter lock and getting it back. */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include "words.h"

/* A lock whose word is in a device's structure. */
struct shared_lock {
	PyObject_HEAD
	uint32_t *word;
};

/* The word at an address, which is an argument; NULL with an exception set. */
static uint32_t *word_at(PyObject *address)
{
	uint32_t *word = PyLong_AsVoidPtr(address);

	if (!word && !PyErr_Occurred())
		PyErr_SetString(PyExc_ValueError, "no address");
	return word;
}

static PyObject *new_lock(PyTypeObject *type, PyObject *arguments, PyObject *keywords)
{
	struct shared_lock *lock;
	PyObject *address;
	uint32_t *word;

	(void)keywords;
	if (!PyArg_ParseTuple(arguments, "O", &address) || !(word = word_at(address)))
		return NULL;
	lock = (struct shared_lock *)((allocfunc)PyType_GetSlot(type, Py_tp_alloc))(type, 0);
	if (lock)
		lock->word = word;
	return (PyObject *)lock;
}

static void free_lock(PyObject *self)
{
	PyTypeObject *type = Py_TYPE(self);

	((freefunc)PyType_GetSlot(type, Py_tp_free))(self);
	Py_DECREF(type);
}

/* Take it; who has it is waited for without the interpreter lock. */
static PyObject *enter(PyObject *self, PyObject *unused)
{
	uint32_t *word = ((struct shared_lock *)self)->word;

	(void)unused;
	if (!try_lock(word)) {
		Py_BEGIN_ALLOW_THREADS;
		while (__atomic_exchange_n(word, LOCK_AWAITED, __ATOMIC_ACQUIRE) != LOCK_FREE)
			syscall(SYS_futex, word, FUTEX_WAIT_PRIVATE, LOCK_AWAITED, NULL, NULL, 0);
		Py_END_ALLOW_THREADS;
	}
	Py_RETURN_NONE;
}

static PyObject *leave(PyObject *self, PyObject *const *arguments, Py_ssize_t count)
{
	(void)arguments;
	(void)count;
	unlock(((struct shared_lock *)self)->word);
	Py_RETURN_NONE;
}

static PyObject *locked(PyObject *self, PyObject *unused)
{
	uint32_t *word = ((struct shared_lock *)self)->word;

	(void)unused;
	return PyBool_FromLong(__atomic_load_n(word, __ATOMIC_RELAXED) != LOCK_FREE);
}

#define METHOD(name, function, flags) { name, (PyCFunction)(void (*)(void))function, flags, NULL }
static PyMethodDef lock_methods[] = {
	METHOD("__enter__", enter, METH_NOARGS),
	METHOD("__exit__", leave, METH_FASTCALL),
	METHOD("locked", locked, METH_NOARGS),
	{ NULL, NULL, 0, NULL },
};
static PyType_Slot lock_slots[] = {
	{ Py_tp_new, new_lock },
	{ Py_tp_dealloc, free_lock },
	{ Py_tp_methods, lock_methods },
	{ 0, NULL },
};
static PyType_Spec lock_spec = {
	.name = "pyvmm._native.SharedLock",
	.basicsize = sizeof(struct shared_lock),
	.flags = Py_TPFLAGS_DEFAULT,
	.slots = lock_slots,
};

/* Address and mask: whether they are. */
static int parse(PyObject *const *arguments, Py_ssize_t count, uint32_t **word, uint32_t *mask)
{
	if (count != 2) {
		PyErr_SetString(PyExc_TypeError, "wrong number of arguments");
		return 0;
	}
	*word = word_at(arguments[0]);
	*mask = (uint32_t)PyLong_AsUnsignedLongMask(arguments[1]);
	return *word && !PyErr_Occurred();
}

static PyObject *set_bits(PyObject *self, PyObject *const *arguments, Py_ssize_t count)
{
	uint32_t *word, mask;

	(void)self;
	if (!parse(arguments, count, &word, &mask))
		return NULL;
	__atomic_fetch_or(word, mask, __ATOMIC_SEQ_CST);
	Py_RETURN_NONE;
}

static PyObject *clear_bits(PyObject *self, PyObject *const *arguments, Py_ssize_t count)
{
	uint32_t *word, mask;

	(void)self;
	if (!parse(arguments, count, &word, &mask))
		return NULL;
	__atomic_fetch_and(word, ~mask, __ATOMIC_SEQ_CST);
	Py_RETURN_NONE;
}

static PyMethodDef functions[] = {
	METHOD("set_bits", set_bits, METH_FASTCALL),
	METHOD("clear_bits", clear_bits, METH_FASTCALL),
	{ NULL, NULL, 0, NULL },
};

/* Add them to a Python module: whether that was possible. */
int pyvmm_add_word_functions(void *module)
{
	PyGILState_STATE state = PyGILState_Ensure();
	PyObject *type = PyType_FromSpec(&lock_spec);
	int failed = !type || PyModule_AddObjectRef(module, "SharedLock", type) < 0 ||
		     PyModule_AddFunctions(module, functions) < 0;

	Py_XDECREF(type);
	PyGILState_Release(state);
	return !failed;
}
