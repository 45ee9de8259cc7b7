/* Functions of a module, and not cffi's, for the same reason as in memory.c: what they do takes
 * less time than giving up the interpreter lock and getting it back. */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include "words.h"

#include <sched.h>

enum { SPINS = 100 };

/* Wait for a lock, which native code holds for the time of one answer: without the interpreter
 * lock. */
void pyvmm_lock(uint32_t *lock)
{
	for (int turn = 0; !try_lock(lock); turn++)
		if (turn < SPINS)
			__builtin_ia32_pause();
		else
			sched_yield();
}

/* The word at an address, which is the first argument; NULL with an exception set. */
static uint32_t *word_at(PyObject *address)
{
	return (uint32_t *)PyLong_AsVoidPtr(address);
}

static PyObject *try_lock_word(PyObject *self, PyObject *address)
{
	uint32_t *word = word_at(address);

	(void)self;
	return word ? PyBool_FromLong(try_lock(word)) : NULL;
}

static PyObject *unlock_word(PyObject *self, PyObject *address)
{
	uint32_t *word = word_at(address);

	(void)self;
	if (!word)
		return NULL;
	unlock(word);
	Py_RETURN_NONE;
}

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

#define METHOD(name) { #name, (PyCFunction)(void (*)(void))name, METH_FASTCALL, NULL }
static PyMethodDef functions[] = {
	{ "try_lock", try_lock_word, METH_O, NULL },
	{ "unlock", unlock_word, METH_O, NULL },
	METHOD(set_bits),
	METHOD(clear_bits),
	{ NULL, NULL, 0, NULL },
};

/* Add them to a Python module: whether that was possible. */
int pyvmm_add_word_functions(void *module)
{
	PyGILState_STATE state = PyGILState_Ensure();
	int failed = PyModule_AddFunctions(module, functions);

	PyGILState_Release(state);
	return !failed;
}
