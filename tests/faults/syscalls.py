"""A supervisor of a VMM's system calls, which can make one of them fail.

It runs on a thread of the test. The VMM is started by ``launch_filtered.py``. What counts is what
the new image of an update does once its way back is open, which is when it handles SIGALRM: call
0 is the first one behind that. The way back is given up when the timer is stopped.
"""

import errno
import fcntl
import os
import select
import socket
import struct
import sys
import threading
from pathlib import Path

LAUNCHER = Path(__file__).with_name("launch_filtered.py")
RECEIVE, SEND = 0xC0502100, 0xC0182101  # SECCOMP_IOCTL_NOTIF_RECV and _SEND
CONTINUE = 1
_NOTICE = struct.Struct("QIIiIQ6Q")
_ANSWER = struct.Struct("QqiI")

NO_ANSWER = -1
EXECVE, EXECVEAT, SIGACTION, BRK = 59, 322, 13, 12
SIGALRM, ITIMER_REAL = 14, 0
NAMES = {
    0: "read", 1: "write", 2: "open", 3: "close", 4: "stat", 5: "fstat", 6: "lstat", 7: "poll",
    8: "lseek", 9: "mmap", 10: "mprotect", 11: "munmap", 12: "brk", 13: "rt_sigaction",
    14: "rt_sigprocmask", 16: "ioctl", 17: "pread64", 18: "pwrite64", 21: "access", 25: "mremap",
    28: "madvise", 32: "dup", 33: "dup2", 35: "nanosleep", 38: "setitimer", 39: "getpid",
    41: "socket", 42: "connect", 43: "accept", 44: "sendto", 45: "recvfrom", 47: "recvmsg",
    49: "bind", 50: "listen", 51: "getsockname", 52: "getpeername", 54: "setsockopt",
    55: "getsockopt", 56: "clone", 72: "fcntl", 77: "ftruncate", 79: "getcwd", 82: "rename",
    83: "mkdir", 87: "unlink", 89: "readlink", 102: "getuid", 107: "geteuid", 137: "statfs",
    138: "fstatfs", 157: "prctl", 158: "arch_prctl", 186: "gettid", 203: "sched_setaffinity",
    204: "sched_getaffinity", 217: "getdents64", 218: "set_tid_address",
    228: "clock_gettime", 230: "clock_nanosleep",
    234: "tgkill", 257: "openat", 262: "newfstatat", 273: "set_robust_list", 288: "accept4",
    290: "eventfd2", 291: "epoll_create1", 292: "dup3", 293: "pipe2", 302: "prlimit64",
    318: "getrandom", 319: "memfd_create", 322: "execveat", 334: "rseq", 434: "pidfd_open",
    435: "clone3", 436: "close_range",
}  # fmt: skip
#: What a host short of something answers; all else fails with ENOMEM.
ERRORS = {
    "read": errno.EIO,
    "pread64": errno.EIO,
    "write": errno.ENOSPC,
    "openat": errno.EMFILE,
    "socket": errno.EMFILE,
    "dup": errno.EMFILE,
    "eventfd2": errno.EMFILE,
    "pipe2": errno.EMFILE,
    "memfd_create": errno.EMFILE,
    "clone": errno.EAGAIN,
    "clone3": errno.EAGAIN,
    "close": errno.EIO,
}


class Call:
    """A system call of the new image: thread, number, arguments."""

    def __init__(self, thread, number, arguments):
        self.thread = thread
        self.name = NAMES.get(number, str(number))
        self.arguments = arguments

    def __repr__(self):
        return f"{self.name}({', '.join(f'{value:#x}' for value in self.arguments[:3])})"

    @property
    def kind(self):
        """Name, and of an ioctl the request."""
        return (self.name, self.arguments[1] if self.name == "ioctl" else 0)

    @property
    def gives_up(self):
        """Whether the way back is given up with it."""
        return self.name == "setitimer" and self.arguments[0] == ITIMER_REAL


class Supervisor:
    """Answers the VMM's system calls; one VMM.

    :param folder: where the socket for the launcher goes
    """

    def __init__(self, folder):
        self._listener = socket.socket(socket.AF_UNIX)
        self._path = Path(folder) / "seccomp.sock"
        self._listener.bind(str(self._path))
        self._listener.listen(1)
        self._stop_fd = os.eventfd(0)
        self._pid = 0
        self._threads = set()
        self._fail_at = None
        self._executed = self._armed = False
        #: What the new image called since it was armed, until it was executed again.
        self.calls = []
        #: The call that was made to fail.
        self.failed = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def program(self, *words):
        """The command that starts ``words`` under supervision."""
        return [sys.executable, str(LAUNCHER), str(self._path), *words]

    def watch(self, pid, fail_at=None):
        """Look at the next update of the VMM ``pid``; have its call ``fail_at`` fail."""
        self.calls, self.failed = [], None
        self._executed = self._armed = False
        self._fail_at = fail_at
        self._pid = pid

    def end(self):
        """The update is over: let everything pass."""
        self._pid = 0

    def close(self):
        """Stop; whoever still makes calls has them fail with ENOSYS."""
        os.eventfd_write(self._stop_fd, 1)
        self._thread.join()
        self._listener.close()
        os.close(self._stop_fd)

    def _run(self):
        if not _readable(self._listener, self._stop_fd):
            return
        connection, _ = self._listener.accept()
        _, fds, _, _ = socket.recv_fds(connection, 1, 1)
        connection.close()
        while _readable(fds[0], self._stop_fd):
            self._answer(fds[0])
        os.close(fds[0])

    def _answer(self, fd):
        notice = bytearray(_NOTICE.size)
        try:
            fcntl.ioctl(fd, RECEIVE, notice)
            id, thread, _, number, _, _, *arguments = _NOTICE.unpack(notice)
            error = self._decide(Call(thread, number, arguments), number)
            if error == NO_ANSWER:
                return
            value = 0
            if error and number == BRK:
                # This one has no error: the break stays where it is.
                error, value = 0, _program_break(thread)
            flags = 0 if error or value else CONTINUE
            fcntl.ioctl(fd, SEND, _ANSWER.pack(id, value, -error, flags))
        except OSError as problem:
            if problem.errno not in (errno.ENOENT, errno.EINTR):  # it has died
                raise

    def _decide(self, call, number):
        """The error number that a call is answered with; 0 to let the kernel do it; NO_ANSWER to
        have it wait until the process is killed."""
        pid = self._pid
        if not pid:
            return 0
        if number in (EXECVE, EXECVEAT) and call.thread == pid:
            # The second one leads back, and is none of the new image's steps.
            if self._executed:
                self._pid = 0
            self._executed = True
            self._threads = {pid}
            return 0
        if not self._executed or not self._is_its(call.thread, pid):
            return 0
        if not self._armed:
            # The interpreter only asks how each signal is handled.
            self._armed = number == SIGACTION and call.arguments[0] == SIGALRM and call.arguments[1]
            return 0
        self.calls.append(call)
        if len(self.calls) - 1 != self._fail_at:
            return 0
        self.failed = call
        return ERRORS.get(call.name, errno.ENOMEM)

    def _is_its(self, thread, pid):
        if thread not in self._threads and os.path.exists(f"/proc/{pid}/task/{thread}"):
            self._threads.add(thread)
        return thread in self._threads


def _program_break(pid):
    lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
    heap = next(line for line in lines if line.endswith("[heap]"))
    return int(heap.partition("-")[2].partition(" ")[0], 16)


def _readable(source, stop_fd):
    """Wait for ``source``; False if it is at an end or the supervisor is to stop."""
    poll = select.poll()
    poll.register(source, select.POLLIN)
    poll.register(stop_fd, select.POLLIN)
    ready = dict(poll.poll())
    fd = source if isinstance(source, int) else source.fileno()
    return stop_fd not in ready and bool(ready.get(fd, 0) & select.POLLIN)
