"""stdio: the terminal's modes on every way out, and nothing that leaks to the shell."""

import errno
import os
import resource
import socket
import struct
import termios
import threading

import pytest

from pyvmm.chardev import stdio
from pyvmm.chardev.base import CLOSED, OPENED, RESIZED
from pyvmm.chardev.mux import MuxChardev
from pyvmm.chardev.stdio import StdioChardev, restore_terminal
from pyvmm.errors import VmStateError


@pytest.fixture
def terminal():
    """Master and slave of a pseudo terminal."""
    master, slave = os.openpty()
    yield master, slave
    for fd in (master, slave):
        try:
            os.close(fd)
        except OSError:
            pass


@pytest.fixture
def pipe():
    """Both ends, each closed by the test or here."""
    made = []

    def make():
        made.append(os.pipe())
        return made[-1]

    yield make
    for fds in made:
        for fd in fds:
            try:
                os.close(fd)
            except OSError:
                pass


def on_terminal(image, slave, **options):
    return image.make(StdioChardev, stdin=slave, stdout=slave, **options)


def flag(fd, index, bit):
    return bool(termios.tcgetattr(fd)[index] & bit)


def test_raw_and_back(image, terminal):
    _master, slave = terminal
    before = termios.tcgetattr(slave)
    chardev = on_terminal(image, slave)
    assert chardev.is_terminal
    assert chardev.filename == "stdio"
    assert not flag(slave, 3, termios.ECHO)
    assert not flag(slave, 3, termios.ICANON)
    assert not flag(slave, 0, termios.ICRNL)
    assert flag(slave, 3, termios.ISIG)
    assert flag(slave, 1, termios.OPOST)
    chardev.close()
    assert termios.tcgetattr(slave) == before
    chardev.close()


def test_signal_off(image, terminal):
    on_terminal(image, terminal[1], signal=False)
    assert not flag(terminal[1], 3, termios.ISIG)


def test_front_end_takes_the_keys(images, terminal):
    """And they do not act on the process before that of the next image is there."""
    slave = terminal[1]
    image = images()
    chardev = on_terminal(image, slave)
    chardev.take_keys(True)
    assert not flag(slave, 3, termios.ISIG)
    state = chardev.save_state()
    image = images(image.exec())
    chardev = on_terminal(image, slave)
    chardev.load_state(state)
    assert not flag(slave, 3, termios.ISIG)
    chardev.take_keys(False)
    assert flag(slave, 3, termios.ISIG)


@pytest.mark.parametrize("signal", [False, True])
def test_front_end_does_not_take_keys_that_are_given_away(image, terminal, signal):
    chardev = on_terminal(image, terminal[1], signal=signal)
    for taken in (True, False):
        chardev.take_keys(taken)
        assert flag(terminal[1], 3, termios.ISIG) == signal


def test_behind_a_mux_who_has_the_input_takes_the_keys(image, terminal):
    mux = MuxChardev("mux", on_terminal(image, terminal[1]), lambda: None)
    console, monitor = (mux.frontend_chardev(index) for index in range(2))
    monitor.take_keys(True)
    assert flag(terminal[1], 3, termios.ISIG)
    mux.set_focus(1)
    monitor.take_keys(True)
    console.take_keys(False)
    assert not flag(terminal[1], 3, termios.ISIG)


def test_there_and_back(image, terminal, recorder):
    master, slave = terminal
    chardev = on_terminal(image, slave)
    frontend = recorder()
    chardev.attach(frontend)
    assert frontend.events == [OPENED]
    os.write(master, b"keys\x01x")
    image.until(lambda: frontend.data == b"keys\x01x")
    assert chardev.write(b"line\n") == 5
    assert os.read(master, 100) == b"line\r\n"


def test_the_shells_descriptors_stay_blocking(image, terminal, pipe):
    on_terminal(image, terminal[1])
    reading, writing = pipe()
    image.make(StdioChardev, "c1", stdin=reading, stdout=writing)
    for fd in (terminal[1], reading, writing):
        assert os.get_blocking(fd)


def test_terminal_that_cannot_be_opened_again(images, terminal, monkeypatch):
    """As after su: it belongs to another user."""
    slave = terminal[1]
    before = termios.tcgetattr(slave)
    refuse = os.open

    def refusing(path, *arguments, **options):
        if str(path).startswith("/proc/self/fd/"):
            raise PermissionError(13, "Permission denied")
        return refuse(path, *arguments, **options)

    monkeypatch.setattr(stdio.os, "open", refusing)
    old = images()
    chardev = on_terminal(old, slave)
    assert not os.get_blocking(slave)
    state = chardev.save_state()
    new = images(old.exec())
    chardev = on_terminal(new, slave)
    chardev.load_state(state)
    assert not os.get_blocking(slave)
    chardev.close()
    assert os.get_blocking(slave)
    assert termios.tcgetattr(slave) == before


def test_raw_again_after_sigcont(image, terminal):
    slave = terminal[1]
    before = termios.tcgetattr(slave)
    chardev = on_terminal(image, slave)
    termios.tcsetattr(slave, termios.TCSANOW, before)  # the shell's, meanwhile
    chardev.handle_cont()
    assert not flag(slave, 3, termios.ICANON)
    chardev.close()
    assert termios.tcgetattr(slave) == before


def test_window_size(image, terminal, recorder):
    chardev = on_terminal(image, terminal[1])
    assert chardev.window_size() == (24, 80)
    stdio.terminal.fcntl.ioctl(terminal[0], termios.TIOCSWINSZ, struct.pack("4H", 50, 132, 0, 0))
    assert chardev.window_size() == (50, 132)
    frontend = recorder()
    chardev.attach(frontend)
    chardev.handle_resize()
    assert frontend.events == [OPENED, RESIZED]


def test_hang_up_of_the_terminal(image, terminal, recorder):
    chardev = on_terminal(image, terminal[1])
    frontend = recorder()
    chardev.attach(frontend)
    os.close(terminal[0])
    image.until(lambda: frontend.events == [OPENED, CLOSED])
    assert chardev.write(b"x") == 1
    chardev.close()


def test_terminal_that_refuses_input_is_still_written(image, terminal, recorder, monkeypatch):
    """It gives EIO to a process in the background whose shell is gone."""
    chardev = on_terminal(image, terminal[1])
    frontend = recorder()
    chardev.attach(frontend)

    def refuse(_fd, _count):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(chardev, "_read_fd", refuse)
    os.write(terminal[0], b"x")
    image.until(lambda: chardev._in < 0)
    assert chardev.write(b"still here") == 10
    assert os.read(terminal[0], 100) == b"still here"
    assert frontend.events == [OPENED]


# Pipes, files and what else a shell connects.


def test_end_of_input_is_not_the_end_of_output(image, pipe, recorder):
    in_reading, in_writing = pipe()
    out_reading, out_writing = pipe()
    chardev = image.make(StdioChardev, stdin=in_reading, stdout=out_writing)
    frontend = recorder(room=3)
    chardev.attach(frontend)
    os.write(in_writing, b"script")
    os.close(in_writing)
    image.until(lambda: frontend.data == b"scr")
    image.settle()
    frontend.room = 100
    chardev.accept_input()
    image.until(lambda: chardev._in < 0)
    assert frontend.data == b"script"
    assert frontend.events == [OPENED]
    assert not chardev.is_terminal
    chardev.write(b"still here")
    assert os.read(out_reading, 100) == b"still here"


@pytest.mark.parametrize("is_full", [False, True])
def test_loss_of_output_is_not_the_end_of_input(image, pipe, recorder, is_full):
    in_reading, in_writing = pipe()
    out_reading, out_writing = pipe()
    chardev = image.make(StdioChardev, stdin=in_reading, stdout=out_writing)
    frontend = recorder()
    chardev.attach(frontend)
    while is_full and chardev.write(b"x" * 4096) == 4096:
        pass
    image.settle()
    os.close(out_reading)
    image.until(lambda: frontend.writable == is_full)
    assert chardev.write(b"x") == 1
    image.settle()
    os.write(in_writing, b"quit")
    image.until(lambda: frontend.data == b"quit")
    assert frontend.events == [OPENED]
    assert chardev.dropped == 1
    assert chardev.write(b"yz") == 2
    assert chardev.dropped == 3
    check_idle(image)


def check_idle(image):
    """The loop is woken by nothing but its timers."""
    wakes = []
    image.loop.call_later(0.02, lambda: wakes.append("timer"))
    image.loop.run_once(5)
    assert wakes == ["timer"]


def test_file_without_room_is_written_again_when_there_is_some(image, pipe, recorder, tmp_path):
    """A size limit stands in for a full disk and a quota; SIGXFSZ would end a process."""
    in_reading, in_writing = pipe()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    with open(tmp_path / "out", "wb") as file:
        chardev = image.make(StdioChardev, stdin=in_reading, stdout=file.fileno())
        frontend = recorder()
        chardev.attach(frontend)
        resource.setrlimit(resource.RLIMIT_FSIZE, (6, before[1]))
        try:
            assert chardev.write(b"before, ") == 6
            assert chardev.write(b"e, ") == 3
            image.settle()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert chardev.write(b", after") == 7
        os.write(in_writing, b"input")
        image.until(lambda: frontend.data == b"input")
    assert (tmp_path / "out").read_bytes() == b"before, after"
    assert chardev.dropped == 3
    assert frontend.events == [OPENED]


def test_device_that_is_always_full(image, pipe, recorder):
    in_reading, in_writing = pipe()
    with open("/dev/full", "wb", buffering=0) as full:
        chardev = image.make(StdioChardev, stdin=in_reading, stdout=full.fileno())
        frontend = recorder()
        chardev.attach(frontend)
        for _ in range(3):
            assert chardev.write(b"xyz") == 3
        image.settle()
        os.write(in_writing, b"input")
        image.until(lambda: frontend.data == b"input")
        assert chardev.dropped == 9
        check_idle(image)


def test_slow_reader_of_output(image, pipe, recorder):
    reading, writing = pipe()
    chardev = image.make(StdioChardev, stdin=-1, stdout=writing)
    frontend = recorder()
    chardev.attach(frontend)
    data = os.urandom(1 << 18)
    sent = chardev.write(data)
    assert 0 < sent < len(data)
    image.settle()
    assert frontend.writable == 0
    received = bytearray()
    while len(received) < len(data):
        received += os.read(reading, 1 << 16)
        image.settle()
        if sent < len(data):
            sent += chardev.write(data[sent:])
    assert received == data
    assert frontend.writable >= 1


def test_files(image, tmp_path, recorder):
    (tmp_path / "in").write_bytes(b"from a file")
    with open(tmp_path / "in", "rb") as source, open(tmp_path / "out", "wb") as sink:
        chardev = image.make(StdioChardev, stdin=source.fileno(), stdout=sink.fileno())
        frontend = recorder(room=4)
        chardev.attach(frontend)
        image.until(lambda: frontend.data == b"from")
        # What was not taken is still there for whoever reads next.
        assert os.lseek(source.fileno(), 0, os.SEEK_CUR) == 4
        chardev.write(b"to a file")
    assert (tmp_path / "out").read_bytes() == b"to a file"


def test_dev_null(image, recorder):
    with open("/dev/null", "r+b", buffering=0) as null:
        chardev = image.make(StdioChardev, stdin=null.fileno(), stdout=null.fileno())
        frontend = recorder()
        chardev.attach(frontend)
        assert chardev.write(b"x" * 100000) == 100000
        image.until(lambda: chardev._in < 0)
        assert frontend.events == [OPENED]


def test_sockets_stay_blocking_for_others(image, recorder):
    ours, theirs = socket.socketpair()
    with ours, theirs:
        chardev = image.make(StdioChardev, stdin=ours.fileno(), stdout=ours.fileno())
        frontend = recorder()
        chardev.attach(frontend)
        theirs.sendall(b"in")
        image.until(lambda: frontend.data == b"in")
        assert chardev.pour(lambda fd: (1, True)) == (0, False)  # it would block there
        while chardev.write(b"x" * 65536) == 65536:
            pass
        assert os.get_blocking(ours.fileno())
        theirs.setblocking(False)
        assert theirs.recv(10) == b"x" * 10


def test_closed_descriptors(image, recorder):
    chardev = image.make(StdioChardev, stdin=-1, stdout=-1)
    chardev.attach(recorder())
    assert chardev.write(b"x") == 1
    assert chardev.window_size() == (24, 80)


# Live update.


def test_modes_travel_over_an_exec(images, terminal, recorder):
    master, slave = terminal
    before = termios.tcgetattr(slave)
    image = images()
    chardev = on_terminal(image, slave)
    os.write(master, b"typed meanwhile")
    for _ in range(3):
        state = chardev.save_state()
        image = images(image.exec())
        chardev = on_terminal(image, slave)
        chardev.load_state(state)
        assert chardev.is_inherited
        assert not flag(slave, 3, termios.ICANON)
    frontend = recorder()
    chardev.attach(frontend)
    image.until(lambda: frontend.data == b"typed meanwhile")
    chardev.close()
    assert termios.tcgetattr(slave) == before


def test_no_longer_resumed_once_it_is_gone(images, terminal, recorder):
    old = images()
    on_terminal(old, terminal[1])
    new = images(old.exec())
    chardev = on_terminal(new, terminal[1])
    frontend = recorder()
    chardev.attach(frontend)
    assert chardev.is_inherited
    os.close(terminal[0])
    new.until(lambda: CLOSED in frontend.events)
    assert not chardev.is_inherited


def test_terminal_restored_without_a_chardev(images, terminal, monkeypatch):
    slave = terminal[1]
    before = termios.tcgetattr(slave)
    old = images()
    state = on_terminal(old, slave).save_state()
    for fd in old.exec().values():
        os.close(fd)
    assert termios.tcgetattr(slave) != before
    saved = os.dup(0)
    try:
        os.dup2(slave, 0)
        restore_terminal(state)
    finally:
        os.dup2(saved, 0)
        os.close(saved)
    assert termios.tcgetattr(slave) == before


@pytest.mark.parametrize("state", [b"", b"\4", b"\0x", b"\0" * 56, b"\0" * 58])
def test_state_that_cannot_be(image, terminal, state):
    chardev = on_terminal(image, terminal[1])
    with pytest.raises(VmStateError, match=r"^chardev/c0: "):
        chardev.load_state(state)
    restore_terminal(state)


def test_restore_on_what_is_no_terminal():
    reading, writing = os.pipe()
    os.close(writing)
    saved = os.dup(0)
    try:
        os.dup2(reading, 0)
        restore_terminal(b"\0" + bytes(56))
    finally:
        os.dup2(saved, 0)
        os.close(saved)
        os.close(reading)


def test_write_from_many_threads(image, pipe):
    reading, writing = pipe()
    chardev = image.make(StdioChardev, stdin=-1, stdout=writing)
    threads = [
        threading.Thread(target=lambda byte=byte: [chardev.write(byte) for _ in range(500)])
        for byte in (b"a", b"b", b"c", b"d")
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    data = os.read(reading, 10000)
    assert sorted(data) == sorted(b"abcd" * 500)
