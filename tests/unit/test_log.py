"""Standard error: whatever its reader does, saying something neither raises nor waits."""

import ast
import errno
import os
import signal
import socket
import sys
import termios
import threading
from pathlib import Path

import pytest

from pyvmm._util import log
from pyvmm._util.log import Sink, Stream


@pytest.fixture(autouse=True)
def _promptly():
    """A write that waits fails its test."""

    def expired(_number, _frame):
        raise AssertionError("it waits for a reader")

    before = signal.signal(signal.SIGALRM, expired)
    signal.alarm(20)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture
def opened():
    """Keeps descriptors that are closed in the end."""
    fds = []

    def keep(*more):
        fds.extend(more)
        return more

    yield keep
    for fd in fds:
        try:
            os.close(fd)
        except OSError:
            pass


@pytest.fixture
def pipe(opened):
    return opened(*os.pipe())


@pytest.fixture
def terminal(opened):
    return opened(*os.openpty())


def fill(fd):
    """Write until nothing more is taken."""
    os.set_blocking(fd, False)
    try:
        while True:
            os.write(fd, b"x" * 4096)
    except BlockingIOError:
        os.set_blocking(fd, True)


def drained(fd):
    """All that is there."""
    os.set_blocking(fd, False)
    data = bytearray()
    try:
        while chunk := os.read(fd, 65536):
            data += chunk
    except BlockingIOError:
        pass
    return bytes(data)


@pytest.fixture(params=["opened anew", "not opened anew"])
def access(request, monkeypatch):
    """Whether the host lets a descriptor be opened anew: it does not after su."""
    if request.param == "opened anew":
        return
    original = os.open

    def refusing(path, *arguments, **options):
        if str(path).startswith("/proc/self/fd/"):
            raise PermissionError(errno.EACCES, "Permission denied")
        return original(path, *arguments, **options)

    monkeypatch.setattr(log.os, "open", refusing)


@pytest.mark.usefixtures("access")
def test_full_pipe(pipe):
    reading, writing = pipe
    sink = Sink(writing)
    calls = []
    sink.on_drop = lambda: calls.append(sink.dropped)
    assert sink.write("before\n")
    fill(writing)
    assert not sink.write("lost\n")
    assert not sink.write("lost too\n")
    assert not sink.catch_up()
    assert (sink.dropped, calls) == (2, [1])
    assert drained(reading).startswith(b"before\nx")
    assert sink.catch_up()
    assert sink.write("after\n")
    assert drained(reading) == b"pyvmm: 2 messages were dropped\nafter\n"
    assert sink.dropped == 2
    assert os.get_blocking(writing)


@pytest.mark.usefixtures("access")
def test_count_stands_before_the_next_message(pipe):
    reading, writing = pipe
    sink = Sink(writing)
    fill(writing)
    sink.write("lost\n")
    drained(reading)
    sink.write("after\n")
    assert drained(reading) == b"pyvmm: 1 message was dropped\nafter\n"


@pytest.mark.usefixtures("access")
def test_reader_that_is_gone(pipe):
    reading, writing = pipe
    os.close(reading)
    sink = Sink(writing)
    assert not sink.write("lost\n")
    assert sink.dropped == 1
    assert sink.catch_up()  # there is nothing to wait for


def test_descriptor_that_is_closed(pipe):
    os.close(pipe[1])
    sink = Sink(pipe[1])
    assert not sink.write("lost\n", patience_s=0.01)
    assert sink.catch_up()


@pytest.mark.usefixtures("access")
def test_terminal_gets_whole_lines_when_it_is_raw(terminal):
    master, slave = terminal
    modes = termios.tcgetattr(slave)
    modes[1] &= ~termios.OPOST
    termios.tcsetattr(slave, termios.TCSANOW, modes)
    Sink(slave).write("one\ntwo\n")
    assert drained(master) == b"one\r\ntwo\r\n"


@pytest.mark.usefixtures("access")
def test_terminal_that_holds_its_output_back(terminal):
    """As after Ctrl-S."""
    master, slave = terminal
    termios.tcflow(slave, termios.TCOOFF)
    sink = Sink(slave)
    assert not sink.write("lost\n")
    assert not sink.catch_up()
    termios.tcflow(slave, termios.TCOON)
    assert sink.catch_up()
    assert b"1 message was dropped" in drained(master)


@pytest.mark.usefixtures("access")
def test_terminal_that_takes_a_part(terminal):
    master, slave = terminal
    sink = Sink(slave)
    while sink.write("x" * 3000 + "\n"):
        pass
    count = sink.dropped
    drained(master)
    assert sink.write("after\n")
    shown = drained(master).replace(b"\r", b"")
    assert shown.lstrip(b"\n") == b"pyvmm: %d message was dropped\nafter\n" % count


@pytest.mark.usefixtures("access")
def test_terminal_that_was_hung_up(terminal):
    master, slave = terminal
    os.close(master)
    sink = Sink(slave)
    assert not sink.write("lost\n")
    assert sink.catch_up()


@pytest.mark.parametrize("kind", [socket.SOCK_STREAM, socket.SOCK_DGRAM])
def test_socket(kind):
    ours, theirs = socket.socketpair(socket.AF_UNIX, kind)
    with ours, theirs:
        sink = Sink(ours.fileno())
        assert sink.write("taken\n")
        assert theirs.recv(100) == b"taken\n"
        while sink.write("x" * 4000):
            pass
        assert not sink.catch_up()
        theirs.close()
        assert not sink.write("lost\n")
        assert ours.getblocking()


def test_full_disk():
    with open("/dev/full", "wb", buffering=0) as file:
        sink = Sink(file.fileno())
        assert not sink.write("lost\n")
        assert not sink.catch_up()  # there may be room later


def test_file_is_written_where_it_was(tmp_path):
    with open(tmp_path / "log", "wb") as file:
        sink = Sink(file.fileno())
        sink.write("one\n")
        file.write(b"two\n")
        file.flush()
        sink.write("three\n")
    assert (tmp_path / "log").read_bytes() == b"one\ntwo\nthree\n"


def test_any_text_is_bounded_and_encoded(pipe):
    sink = Sink(pipe[1])
    sink.write("\udcff\n")
    assert drained(pipe[0]) == b"\\udcff\n"
    sink.write("x" * 100000 + "\n")
    shown = drained(pipe[0])
    assert len(shown) == log.LONGEST
    assert shown.endswith(b"x...\r\n")


def test_patience_is_for_a_reader_that_comes(pipe):
    reading, writing = pipe
    fill(writing)
    sink = Sink(writing)
    reader = threading.Timer(0.05, lambda: os.read(reading, 1 << 20))
    reader.start()
    assert sink.write("last words\n", patience_s=20)
    reader.join()
    assert drained(reading).endswith(b"last words\n")


def test_what_python_prints_itself(pipe, monkeypatch):
    reading, writing = pipe
    monkeypatch.setattr(sys, "stderr", Stream(Sink(writing)))
    print("one", "line", file=sys.stderr, flush=True)
    assert drained(reading) == b"one line\n"

    class Unraisable:
        def __del__(self):
            raise RuntimeError("in a finalizer")

    with monkeypatch.context() as patched:
        patched.setattr(sys, "unraisablehook", sys.__unraisablehook__)
        Unraisable()
    assert drained(reading).endswith(b"RuntimeError: in a finalizer\n")
    fill(writing)
    error = ValueError("nobody reads")
    sys.__excepthook__(ValueError, error, None)
    drained(reading)
    sys.__excepthook__(ValueError, error, None)
    assert drained(reading) == (b"pyvmm: 1 message was dropped\nValueError: nobody reads\n")


def test_threads_do_not_mix_their_lines(pipe):
    reading, writing = pipe
    sink = Sink(writing)
    threads = [
        threading.Thread(target=lambda name=name: [sink.write(name * 30 + "\n") for _ in range(50)])
        for name in "abcd"
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    lines = drained(reading).splitlines()
    assert sink.dropped == 0
    assert sorted(lines) == sorted(
        name * 30 for name in (b"a", b"b", b"c", b"d") for _ in range(50)
    )


def test_messages_lost_by_many_threads_are_all_counted(pipe):
    fill(pipe[1])
    sink = Sink(pipe[1])
    threads = [
        threading.Thread(target=lambda: [sink.write("lost\n") for _ in range(100)])
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sink.dropped == 400


#: Programs that end, and whose reader is waited for, beside the three places that are meant.
ELSEWHERE = (
    *("_native/build.py", "_util/log.py", "cli.py", "core/threads.py", "state/", "verbs/"),
    "wayback.py",  # sets the hook
)
WRITERS = {
    f"sys.{name}" for name in ("stdout", "stderr", "__stderr__", "excepthook", "unraisablehook")
}


def writers(source):
    """Lines that print, or write to what Python prints on."""
    for node in ast.walk(ast.parse(source)):
        called = isinstance(node, ast.Call) and ast.unparse(node.func) == "print"
        named = isinstance(node, ast.Attribute) and ast.unparse(node) in WRITERS
        if called or named:
            yield node.lineno


def test_nothing_beside_a_guest_writes_but_here():
    package = Path(log.__file__).parents[1]
    found = [
        f"{name}:{line}"
        for path in sorted(package.rglob("*.py"))
        if not (name := str(path.relative_to(package))).startswith(ELSEWHERE)
        for line in writers(path.read_bytes())
    ]
    assert found == []


def test_writers_are_found():
    assert list(writers("print('x')\nself._print('x')\nsys.stderr.write('x')\n")) == [1, 3]
