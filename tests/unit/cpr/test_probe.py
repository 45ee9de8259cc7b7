"""What a probe is told of the update to come, and how it sees that something is missing."""

import _socket
import os
import resource

import pytest
from harness.process import descriptors

from pyvmm.cpr import probe
from pyvmm.errors import MigrationError


@pytest.fixture
def pipe():
    """Descriptors as the old image puts them under the numbers of an update; their inode."""
    read_fd, write_fd = os.pipe()
    os.close(write_fd)
    fds = [read_fd, os.dup(read_fd), os.dup(read_fd)]
    yield fds, os.fstat(read_fd).st_ino
    for fd in fds:
        os.close(fd)


def told(monkeypatch, task):
    for name, value in task.environment().items():
        monkeypatch.setenv(name, value)
    return probe.Task.told()


@pytest.mark.parametrize("count", [1, 2, 4000])
def test_task_arrives(monkeypatch, count):
    fds = list(range(5, 5 + count))
    task = told(monkeypatch, probe.Task(fds, 1 << 40, 17, "1.2"))
    assert (task.fds, task.inode, task.fresh, task.name) == (fds, 1 << 40, 17, "1.2")


@pytest.mark.parametrize("text", ["", "3", "yes", "3 4"])
def test_version_that_tells_no_task(monkeypatch, text):
    monkeypatch.setenv(probe.ENVIRONMENT, text)
    assert probe.Task.told() is None


def test_all_is_there(monkeypatch, pipe):
    told(monkeypatch, probe.Task(*pipe, 8, "x")).check()


def test_descriptor_that_is_closed(monkeypatch, pipe):
    fds, inode = pipe
    closed = os.dup(0)
    os.close(closed)
    with pytest.raises(MigrationError, match=f"descriptor {closed} does not reach it"):
        told(monkeypatch, probe.Task([*fds, closed], inode, 8, "x")).check()


def test_descriptor_that_is_something_else(monkeypatch, pipe):
    fds, inode = pipe
    other = os.open(os.devnull, os.O_RDONLY)
    try:
        with pytest.raises(MigrationError, match=f"descriptor {other} does not reach it"):
            told(monkeypatch, probe.Task([*fds, other], inode, 8, "x")).check()
    finally:
        os.close(other)


def test_limit_of_descriptors(monkeypatch, pipe):
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    free = os.dup(0)
    os.close(free)
    opened = descriptors("self")
    task = told(monkeypatch, probe.Task(*pipe, 40, "x"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (free + 20, limits[1]))
    try:
        with pytest.raises(MigrationError, match="Too many open files: it needs 40 free desc"):
            task.check()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert descriptors("self") == opened


def test_no_threads(monkeypatch, pipe):
    def refuse(*_):
        raise RuntimeError("can't start new thread")

    task = told(monkeypatch, probe.Task(*pipe, 8, "x"))
    monkeypatch.setattr("_thread.start_new_thread", refuse)
    with pytest.raises(MigrationError, match="cannot start threads"):
        task.check()


def child(prepare):
    """Exit code of a process that prepares its descriptors and then checks."""
    pid = os.fork()
    if not pid:
        code = 3
        try:
            prepare()
            probe.check_environment()
            code = 0
        except MigrationError as error:
            code = 1 if probe.ENVIRONMENT in str(error) else 2
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def marked_stderr():
    fd = os.memfd_create("stderr")
    os.write(fd, probe.MARK + b"text")
    os.dup2(fd, 2)


def answer_socket(name=probe.SOCKET + b"test"):
    ours, theirs = _socket.socketpair(_socket.AF_UNIX, _socket.SOCK_STREAM)
    if name:
        ours.bind(name)
    os.dup2(os.dup(ours.fileno()), 60)
    os.dup2(theirs.fileno(), probe.ANSWER_FD)


@pytest.mark.parametrize("prepare", [marked_stderr, answer_socket])
def test_probe_without_environment(prepare):
    assert child(prepare) == 1


def other_files():
    os.dup2(os.memfd_create("other"), 2)
    os.dup2(2, probe.ANSWER_FD)


def marked_pipe():
    read_fd, write_fd = os.pipe()
    os.write(write_fd, probe.MARK)
    os.dup2(read_fd, 2)
    os.dup2(read_fd, probe.ANSWER_FD)


@pytest.mark.parametrize(
    "prepare",
    [
        lambda: os.closerange(0, 64),
        lambda: answer_socket(None),
        lambda: answer_socket(b"\0another"),
        other_files,
        marked_pipe,
    ],
)
def test_image_of_its_own(prepare):
    # Whatever a shell or a supervisor left open.
    assert child(prepare) == 0
