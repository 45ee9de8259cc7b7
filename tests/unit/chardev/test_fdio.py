"""What any stream does when one direction fails: the other goes on, and nothing spins."""

import errno
import os
import socket

import pytest

from pyvmm.chardev.base import CLOSED, OPENED, Outbox
from pyvmm.chardev.fdio import FdChardev
from pyvmm.chardev.mux import MuxChardev


class Failing(FdChardev):
    """A stream whose next calls fail with these error numbers, one after the other."""

    def __init__(self, *arguments, is_one=True):
        super().__init__(*arguments)
        self.write_errors = []
        self.read_errors = []
        self.calls = 0
        ours, self.peer = socket.socketpair()
        ours.setblocking(False)
        self.peer.settimeout(20)
        fd = ours.detach()
        self._open_stream(fd, fd if is_one else os.dup(fd))

    def _write_fd(self, fd, data):
        self.calls += 1
        if self.write_errors:
            number = self.write_errors.pop(0)
            raise OSError(number, os.strerror(number))
        return super()._write_fd(fd, data)

    def _read_fd(self, fd, count):
        self.calls += 1
        if self.read_errors:
            number = self.read_errors.pop(0)
            raise OSError(number, os.strerror(number))
        return super()._read_fd(fd, count)

    def close(self):
        self.peer.close()
        super().close()


@pytest.fixture
def chardev(image):
    return image.make(Failing)


@pytest.fixture
def frontend(chardev, recorder):
    chardev.attach(recorder())
    return chardev.frontend


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO])
def test_write_that_fails_is_lost_and_counted(image, recorder, capfd, number):
    chardev = image.make(Failing, is_one=False)
    frontend = recorder()
    chardev.attach(frontend)
    chardev.write_errors = [number, number]
    assert chardev.write(b"lost") == 4
    assert chardev.write(b"lost too") == 8
    assert chardev.write(b"taken") == 5
    image.settle()
    assert chardev.peer.recv(100) == b"taken"
    chardev.peer.sendall(b"input")
    image.until(lambda: frontend.data == b"input")
    assert chardev.dropped == 12
    assert frontend.events == [OPENED]
    text = f"pyvmm: chardev c0: {os.strerror(number)}; output is dropped until that changes\n"
    assert capfd.readouterr().err == text


@pytest.mark.parametrize("number", [errno.ENOBUFS, errno.ENOMEM])
def test_memory_that_is_short_is_waited_for(image, chardev, frontend, number):
    chardev.write_errors = [number] * 3
    outbox = Outbox(chardev)
    frontend.handle_writable = outbox.flush
    outbox.send(b"late, but whole")
    image.until(lambda: not outbox.pending())
    assert chardev.peer.recv(100) == b"late, but whole"
    assert chardev.dropped == 0
    # A socket has room all the time, and its loop waits all the same.
    assert chardev.calls == 4


def test_stream_is_given_to_others_until_it_is_full(image, chardev, frontend):
    def move(fd):
        return os.write(fd, b"natively"), False

    assert chardev.pour(move) == (8, False)
    assert chardev.peer.recv(100) == b"natively"
    assert chardev.pour(lambda fd: (3, True)) == (3, True)
    image.until(lambda: frontend.writable == 1)
    image.settle()
    assert frontend.writable == 1


def test_stream_without_a_peer_is_given_to_nobody(image, chardev, frontend):
    chardev.peer.close()
    image.until(lambda: CLOSED in frontend.events)
    assert chardev.pour(lambda fd: (1, True)) == (0, False)


def test_input_waits_for_memory(image, chardev, frontend):
    chardev.read_errors = [errno.ENOMEM, errno.ENOBUFS]
    chardev.peer.sendall(b"input")
    image.until(lambda: frontend.data == b"input")
    assert chardev.calls == 3
    assert frontend.events == [OPENED]


def test_who_reads_no_more_may_still_write(image, chardev, frontend):
    chardev.peer.shutdown(socket.SHUT_RD)
    assert chardev.write(b"lost") == 4
    image.settle()
    chardev.peer.sendall(b"input")
    image.until(lambda: frontend.data == b"input")
    assert frontend.events == [OPENED]


@pytest.mark.parametrize("reads_on", [True, False])
def test_who_writes_no_more_gets_what_is_owed(image, chardev, frontend, reads_on):
    outbox = Outbox(chardev)
    frontend.handle_writable = outbox.flush
    chardev.peer.sendall(b"help")
    chardev.peer.shutdown(socket.SHUT_WR)
    outbox.send(bytes(1 << 20))
    image.until(lambda: frontend.data == b"help")
    image.settle()
    assert frontend.events == [OPENED]
    if reads_on:
        received = 0
        while data := chardev.peer.recv(1 << 16):
            received += len(data)
            image.settle()
        assert received == 1 << 20
    else:
        chardev.peer.close()
    image.until(lambda: frontend.events == [OPENED, CLOSED])


def test_peer_that_is_gone_is_noticed_without_reading(image, chardev, frontend):
    frontend.room = 0
    chardev.accept_input()
    image.settle()
    chardev.peer.close()
    chardev.write(b"x")
    image.until(lambda: frontend.events == [OPENED, CLOSED])


def test_outbox_of_a_client_that_does_not_read_is_bounded_and_counts(image, chardev, frontend):
    mux = MuxChardev("mux", chardev, lambda: None)
    outbox = Outbox(mux.frontend_chardev(0), 1000)
    while len(outbox.pending()) < 1000:
        outbox.send(b"x" * 300)
    dropped = mux.dropped
    outbox.send(b"more")
    assert (len(outbox.pending()), mux.dropped) == (1000, dropped + 4)
