"""Tasks that share a process's memory and outlive its exec: they make the system calls that
somebody asks for, be it another image or another process (``servant.c``)."""

import ctypes
import functools
import mmap
import os
import signal
import subprocess
import tempfile
from pathlib import Path

from harness import wait_until
from harness.sources import PACKAGE
from pyvmm._native import install_kick, lib

FOLDER = Path(__file__).parent
KICK = signal.SIGURG
CLONE_SIGHAND, CLONE_THREAD = 0x800, 0x10000
WALL = 0x40000000  # waitpid(2): children of clone that send no signal, too
FUTEX_WAIT, FUTEX_WAKE = 0, 1
PR_SET_PDEATHSIG = 1
KVM_RUN = 0xAE80
CALLS = {
    "read": 0,
    "ioctl": 16,
    "prctl": 157,
    "futex": 202,
    "tgkill": 234,
    "ppoll": 271,
    "close_range": 436,
}
ASKED, DONE = 1, 2  # servant.c
STACK_SIZE = 65536
#: Of each servant in the page: what it is asked, and room for what its calls point to.
ROOM, DATA_AT, MAX_SERVANTS = 16384, 4096, 4
_libc = ctypes.CDLL(None, use_errno=True)
_stacks = []  # for as long as there may be a task


class Words(ctypes.Structure):
    """``struct servant``."""

    _fields_ = (
        ("turn", ctypes.c_uint32),
        ("pid", ctypes.c_int32),
        ("tid", ctypes.c_int32),
        ("kick_signal", ctypes.c_int32),
        ("number", ctypes.c_int64),
        ("arguments", ctypes.c_int64 * 5),
        ("result", ctypes.c_int64),
        ("begun", ctypes.c_int64),
        ("ended", ctypes.c_int64),
    )


def address_of(mapping, offset=0):
    """Where a byte of a writable mapping is in this process."""
    return ctypes.addressof(ctypes.c_char.from_buffer(mapping, offset))


def syscall(name, *arguments):
    """A system call of this process: its result, or the negative error number."""
    words = [ctypes.c_long(word) for word in arguments]
    result = _libc.syscall(ctypes.c_long(CALLS[name]), *words)
    return -ctypes.get_errno() if result < 0 else result


class Page:
    """The memory that servants are asked through.

    :param fd: its memfd, which stays the caller's; None makes one
    :param base: where the process that makes the servants has it; None if that is this one
    """

    def __init__(self, fd=None, base=None):
        size = MAX_SERVANTS * ROOM
        self.fd = os.memfd_create("servants") if fd is None else fd
        os.ftruncate(self.fd, size)
        self.memory = mmap.mmap(self.fd, size)
        self.base = address_of(self.memory) if base is None else base
        self.servants = [Servant(self, index) for index in range(MAX_SERVANTS)]


class Servant:
    """One task, in whatever process it was made."""

    def __init__(self, page, index):
        self._page = page
        self._at = index * ROOM
        #: Where :attr:`data` is in the page.
        self.data_at = self._at + DATA_AT
        self.words = Words.from_buffer(page.memory, self._at)

    @property
    def pid(self):
        return self.words.pid

    @property
    def data(self):
        """Room for what a call points to."""
        at = self.data_at
        return memoryview(self._page.memory)[at : at + ROOM - DATA_AT]

    @property
    def address(self):
        """Where the task finds :attr:`data`."""
        return self._page.base + self.data_at

    def start(self, flags=0):
        """Have the task, a child of this process that shares its memory; dies with its parent."""
        install_kick(KICK)
        stack = mmap.mmap(-1, STACK_SIZE)
        _stacks.append(stack)
        end = address_of(stack) + STACK_SIZE
        pid = _library().start_servant(ctypes.byref(self.words), flags, end, int(KICK))
        assert pid > 0, os.strerror(-pid)
        wait_until(lambda: self.words.tid, "the servant")
        assert self.call("prctl", PR_SET_PDEATHSIG, signal.SIGKILL) == 0
        return self

    def ask(self, name, *arguments):
        """Have a call begun."""
        assert self.words.turn != ASKED
        words = self.words
        words.number = CALLS[name]
        words.arguments[:] = [*arguments, *[0] * (5 - len(arguments))]
        words.turn = ASKED
        # The first member.
        syscall("futex", ctypes.addressof(words), FUTEX_WAKE, 1)

    def is_done(self):
        return self.words.turn == DONE

    def wait(self):
        """The result of a call: what the kernel said, errors negative."""
        wait_until(self.is_done, "a servant's system call")
        return self.words.result

    def call(self, name, *arguments):
        """A call, and its result."""
        self.ask(name, *arguments)
        return self.wait()

    def ioctl(self, fd, name, content=b""):
        """An ioctl with a structure, which :attr:`data` holds before and after."""
        self.data[: len(content)] = content
        return self.call("ioctl", fd, getattr(lib, name), self.address)

    def run(self, vcpu_fd):
        """Have it enter KVM_RUN."""
        self.ask("ioctl", vcpu_fd, KVM_RUN, 0)

    def kick(self):
        """End its call."""
        assert syscall("tgkill", self.words.pid, self.words.tid, KICK) == 0

    def end(self):
        """End it, a child of this process, with the thread group that it has."""
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, WALL)


@functools.cache
def _library():
    # No canary, no call of libc: raw.h says why.
    flags = "-O2 -shared -fPIC -ffreestanding -fno-stack-protector"
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder, "servant.so")
        source = FOLDER / "servant.c"
        include = PACKAGE / "_native"
        command = ["gcc", *flags.split(), "-I", include, "-o", target, source]
        subprocess.run(command, check=True)
        library = ctypes.CDLL(target)
    library.start_servant.argtypes = [
        ctypes.c_void_p,
        ctypes.c_long,
        ctypes.c_void_p,
        ctypes.c_int,
    ]
    return library
