"""A machine's serial port on each kind of connection, and who talks to the guest's shell there."""

import contextlib
import os
import pty
import re
import select
import socket
import tty

from harness.process import Deadline, wait_until


class Stream:
    """Both ends of a byte stream to a VM, whatever it is made of."""

    def __init__(self, read, write):
        self.read, self.write, self.seen = read, write, b""

    def send(self, text):
        """Send all of it."""
        os.write(self.write, text.encode())

    def expect(self, pattern):
        """Wait for what matches, which is used up."""
        deadline = Deadline()
        while not (match := re.search(pattern.encode(), self.seen)):
            assert select.select([self.read], [], [], deadline.left)[0], (pattern, self.seen)
            data = os.read(self.read, 65536)
            assert data, f"end of file before {pattern}: {self.seen}"
            self.seen += data
        self.seen = self.seen[match.end() :]


def connected(path, family=socket.AF_UNIX):
    """A descriptor that is connected to who listens there, or soon will."""
    sock = socket.socket(family)
    wait_until(lambda: sock.connect_ex(path) == 0, f"a connection to {path}")
    return sock.detach()


def open_unix(vm):
    """A client of a Unix socket."""
    machine = vm("-serial", "unix:s.sock,server=on,wait=off", serial=False)
    fd = connected(str(machine.folder / "s.sock"))
    return machine, Stream(fd, fd)


def tcp_address(machine):
    """Where the one TCP server of the VM listens: the kernel has chosen the port."""
    port = re.search(r"tcp:127\.0\.0\.1:(\d+),server=on", machine.hmp("info chardev"))[1]
    return "127.0.0.1", int(port)


def open_tcp(vm):
    """A client of a TCP socket."""
    machine = vm("-serial", "tcp:127.0.0.1:0,server=on,wait=off", serial=False)
    fd = connected(tcp_address(machine), socket.AF_INET)
    return machine, Stream(fd, fd)


def open_pty(vm):
    """The other side of a pseudo terminal that pyvmm has made."""
    machine = vm("-serial", "pty", serial=False)
    path = re.search(r"pty:(\S+)", machine.hmp("info chardev")).group(1)
    fd = os.open(path, os.O_RDWR | os.O_NOCTTY)
    tty.setraw(fd)
    return machine, Stream(fd, fd)


def open_stdio(vm):
    """A pipe on standard input, a file on standard output."""
    read_fd, write_fd = os.pipe()
    machine = vm("-serial", "stdio", serial=False, stdin=read_fd)
    os.close(read_fd)
    return machine, Stream(os.open(machine.folder / "stderr", os.O_RDONLY), write_fd)


def open_terminal(vm):
    """A terminal on standard input, a file on standard output."""
    master, slave = pty.openpty()
    machine = vm("-serial", "stdio", serial=False, stdin=slave)
    os.close(slave)
    return machine, Stream(os.open(machine.folder / "stderr", os.O_RDONLY), master)


class Follow(Stream):
    """One that is read from a file which grows."""

    def expect(self, pattern):
        def found():
            self.seen += os.read(self.read, 65536)
            return re.search(pattern.encode(), self.seen)

        self.seen = self.seen[wait_until(found, f"{pattern!r}").end() :]


OPENERS = [open_unix, open_tcp, open_pty, open_stdio, open_terminal]


@contextlib.contextmanager
def opened(opener, vm):
    """The machine that an opener makes, and a stream that its guest's shell answers on.

    :param vm: makes a :class:`harness.Vm`
    """
    machine, stream = opener(vm)
    if opener in (open_stdio, open_terminal):
        stream = Follow(stream.read, stream.write)
    try:
        stream.send("\n")
        stream.expect("guest> ")
        yield machine, stream
    finally:
        for fd in {stream.read, stream.write}:
            os.close(fd)
