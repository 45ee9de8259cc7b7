"""What a probe is told of the update to come, and how it sees that something is missing."""

import os
import resource

import pytest

from pyvmm.cpr import probe
from pyvmm.cpr import state as cpr_state
from pyvmm.errors import MigrationError


@pytest.fixture
def stand_ins():
    """Descriptors as the old image puts them under the numbers of an update."""
    first = os.memfd_create("mark")
    os.write(first, probe.MARK)
    fds = [first, os.dup(first), os.dup(first)]
    yield fds
    for fd in fds:
        os.close(fd)


def told(monkeypatch, task):
    for name, value in task.environment().items():
        monkeypatch.setenv(name, value)
    return probe.Task.told()


@pytest.mark.parametrize("count", [0, 1, 2, 4000])
def test_task_arrives(monkeypatch, count):
    kept = list(range(5, 5 + count))
    task = told(monkeypatch, probe.Task(kept, 4, 17, "1.2"))
    assert (task.kept, task.state_fd, task.fresh, task.name) == (kept, 4, 17, "1.2")


@pytest.mark.parametrize("text", ["", "3", "yes", "3 4"])
def test_version_that_tells_no_task(monkeypatch, text):
    monkeypatch.setenv(probe.ENVIRONMENT, text)
    assert probe.Task.told() is None


def test_all_is_there(monkeypatch, stand_ins):
    told(monkeypatch, probe.Task(stand_ins[1:], stand_ins[0], 8, "x")).check()


def test_descriptor_that_is_closed(monkeypatch, stand_ins):
    closed = os.dup(0)
    os.close(closed)
    with pytest.raises(MigrationError, match=f"descriptor {closed} does not reach it"):
        told(monkeypatch, probe.Task([stand_ins[1], closed], stand_ins[0], 8, "x")).check()


def test_descriptor_that_is_something_else(monkeypatch, stand_ins):
    other = os.memfd_create("other")
    try:
        with pytest.raises(MigrationError, match=f"descriptor {other} does not reach it"):
            told(monkeypatch, probe.Task([other], stand_ins[0], 8, "x")).check()
    finally:
        os.close(other)


@pytest.mark.parametrize("value", [None, "77"])
def test_variable_that_is_lost(monkeypatch, stand_ins, value):
    task = told(monkeypatch, probe.Task(stand_ins[1:], stand_ins[0], 8, "x"))
    if value is None:
        monkeypatch.delenv(cpr_state.ENVIRONMENT)
    else:
        monkeypatch.setenv(cpr_state.ENVIRONMENT, value)
    with pytest.raises(MigrationError, match=cpr_state.ENVIRONMENT):
        task.check()


def test_limit_of_descriptors(monkeypatch, stand_ins):
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    free = os.dup(0)
    os.close(free)
    opened = set(os.listdir("/proc/self/fd"))
    task = told(monkeypatch, probe.Task(stand_ins[1:], stand_ins[0], 40, "x"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (free + 20, limits[1]))
    try:
        with pytest.raises(MigrationError, match="Too many open files: it needs 40 free desc"):
            task.check()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert set(os.listdir("/proc/self/fd")) == opened


def test_no_threads(monkeypatch, stand_ins):
    def refuse(*_):
        raise RuntimeError("can't start new thread")

    task = told(monkeypatch, probe.Task(stand_ins[1:], stand_ins[0], 8, "x"))
    monkeypatch.setattr("_thread.start_new_thread", refuse)
    with pytest.raises(MigrationError, match="cannot start threads"):
        task.check()


def test_image_without_environment(stand_ins):
    assert all(probe.is_marked(fd) for fd in stand_ins)
    with pytest.raises(MigrationError, match=probe.ENVIRONMENT):
        probe.check_environment()


def test_image_of_its_own(tmp_path):
    # Whatever a shell or a supervisor left open; reading from a pipe would take something away.
    read_fd, write_fd = os.pipe()
    os.write(write_fd, probe.MARK)
    file = os.open(tmp_path, os.O_RDONLY)
    empty = os.memfd_create("empty")
    try:
        probe.check_environment()
        assert os.read(read_fd, 99) == probe.MARK
    finally:
        for fd in (read_fd, write_fd, file, empty):
            os.close(fd)
