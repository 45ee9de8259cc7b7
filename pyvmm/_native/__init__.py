"""The cffi boundary: the only importer of the compiled module.

Everything that takes a pointer into guest RAM or a KVM structure goes through here; the
system calls release the interpreter lock while they last.
"""

from __future__ import annotations

import errno
import os
import sys

from pyvmm.errors import HostError, InternalError, KvmError

try:
    from pyvmm._native._kvm import ffi, lib
except ImportError as error:
    raise HostError(
        f"The compiled module pyvmm._native._kvm cannot be loaded ({error}): install pyvmm "
        "with pip, or run 'make build' in a checkout"
    ) from None

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    Buffer = bytes | bytearray | memoryview

    # All of them touch guest memory, by host address, and raise OSError with EFAULT where the
    # host cannot back it. An access of 2, 4 or 8 bytes is one load or store.
    def peek(address: int, size: int) -> bytes: ...
    def poke(address: int, data: Buffer) -> None: ...
    def load(address: int, size: int) -> int: ...
    def store(address: int, size: int, value: int) -> None: ...
    def fill(address: int, size: int, value: int) -> None: ...
    def touch(address: int, size: int) -> None:
        """Write to each page without changing it."""

    def copy(to: Buffer, source: Buffer) -> None:
        """Copy between buffers of one size; either may be guest memory."""

    # Words that native code changes at the same time, by host address.
    class SharedLock:
        """A lock that native code tries: while a thread has it here, it gets no answer there, and
        whoever is in there is out again in a moment."""

        def __init__(self, address: int) -> None: ...
        def __enter__(self) -> None: ...
        def __exit__(self, *_: object) -> None: ...
        def locked(self) -> bool: ...

    def set_bits(address: int, mask: int) -> None: ...
    def clear_bits(address: int, mask: int) -> None: ...


__all__ = ["ffi", "ioctl", "ioctl_value", "lib", "memory_barrier"]

lib.pyvmm_install_guard()
_module = ffi.cast("void *", id(sys.modules[__name__]))
lib.pyvmm_add_functions(_module)
lib.pyvmm_add_word_functions(_module)

#: A full barrier: no load after it is done before the other CPUs see all stores before it.
memory_barrier = lib.pyvmm_barrier


def ioctl(fd: int, name: str, argument: Any, detail: str = "") -> int:
    """Call an ioctl that takes a pointer (a cffi object, which the caller keeps alive).

    :param name: the request's name, e.g. ``KVM_SET_REGS``
    :returns: the ioctl's result, 0 or more
    :raises KvmError: with the name and the error number
    """
    # KVM_CREATE_VM gives up for any signal, also for one that a tracer makes.
    while (result := lib.pyvmm_ioctl(fd, getattr(lib, name), argument)) == -errno.EINTR:
        pass
    if result < 0:
        raise KvmError(name, -result, detail)
    return result


def ioctl_value(fd: int, name: str, argument: int = 0, detail: str = "") -> int:
    """Call an ioctl that takes a number; return its result, 0 or more.

    :raises KvmError: with the name and the error number
    """
    while (result := lib.pyvmm_ioctl_value(fd, getattr(lib, name), argument)) == -errno.EINTR:
        pass
    if result < 0:
        raise KvmError(name, -result, detail)
    return result


def name_thread(name: str) -> None:
    """Name the calling thread as ``top -H`` shows it (15 bytes are kept)."""
    lib.pyvmm_name_thread(name.encode()[:15])


def install_kick(signum: int) -> None:
    """Give ``signum`` a handler that does nothing but end system calls with EINTR."""
    result = lib.pyvmm_install_kick(signum)
    if result < 0:
        raise InternalError(f"sigaction for signal {signum}: {os.strerror(-result)}")


def rdtsc() -> int:
    """Return the host's time stamp counter."""
    return lib.pyvmm_rdtsc()


# The list that a holder reads, for as long as there may be one.
_held: Any = None


def hold_memory(keep_fds: list[int], release_fd: int) -> int:
    """Start a task that keeps this address space and ``keep_fds`` alive over an execve.

    There is one at a time, with any number of descriptors. It ends when ``release_fd``, the
    read end of a pipe, reaches end of file. The caller (or the image that replaces it) reaps it
    with ``os.waitpid(pid, os.__WALL)`` semantics.

    :returns: its process id
    :raises HostError: if the host does not allow it
    """
    global _held
    fds = sorted({*keep_fds, release_fd})
    _held = ffi.new("int[]", fds)
    result = lib.pyvmm_hold_memory(_held, len(fds), release_fd)
    if result < 0:
        raise HostError(f"clone for the memory holder: {os.strerror(-result)}")
    return result
