"""Worker threads: how many there are, what becomes of a call that fails, and the end."""

import os
import time

import pytest

from pyvmm.core.threads import Event, spawn
from pyvmm.core.workers import Workers
from pyvmm.errors import HostError

DEADLINE_S = 20


def threads(name):
    """How many threads of this process have that name."""
    found = 0
    for task in os.listdir("/proc/self/task"):
        try:
            with open(f"/proc/self/task/{task}/comm") as file:
                found += file.read().strip() == name
        except FileNotFoundError:
            pass
    return found


def wait_for(condition):
    end = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < end
        Event().wait(0.001)


def test_calls_run_beside_each_other_up_to_the_most():
    workers = Workers("test-most", 2)
    go = [Event() for _ in range(3)]
    begun, ended = [], []

    def call(number):
        begun.append(number)
        assert go[number].wait(DEADLINE_S)
        ended.append(number)

    for number in range(3):
        workers.submit(lambda number=number: call(number))
    wait_for(lambda: len(begun) == 2)
    assert threads("test-most") == 2
    assert not workers.wait(0)
    assert workers.unfinished == 3
    go[begun[0]].set()
    wait_for(lambda: len(begun) == 3)
    assert threads("test-most") == 2
    for event in go:
        event.set()
    assert workers.wait(DEADLINE_S)
    assert sorted(ended) == [0, 1, 2]
    workers.close()
    wait_for(lambda: threads("test-most") == 0)


def test_one_thread_does_for_calls_that_do_not_overlap():
    workers = Workers("test-one", 16)
    for _ in range(20):
        workers.submit(int)
        assert workers.wait(DEADLINE_S)
    assert threads("test-one") == 1
    workers.close()


def test_nothing_is_held_once_all_is_done():
    workers = Workers("test-held", 1)
    memory = bytearray(100)
    view = memoryview(memory)
    workers.submit(lambda view=view: None)
    del view
    assert workers.wait(DEADLINE_S)
    memory.append(0)  # BufferError if a view is left
    workers.close()


def test_no_more_threads_are_to_be_had(monkeypatch):
    workers = Workers("test-limit", 4)
    real, left = spawn, [1]

    def limited(*arguments):
        if not left:
            raise HostError("the host allows no further thread")
        left.pop()
        real(*arguments)

    monkeypatch.setattr("pyvmm.core.workers.spawn", limited)
    done = []
    for number in range(3):
        workers.submit(lambda number=number: done.append(number))
    assert workers.wait(DEADLINE_S)
    assert done == [0, 1, 2]
    workers.close()
    none = Workers("test-none", 4)
    with pytest.raises(OSError, match="no further thread"):
        none.submit(int)
    assert none.wait(0)  # nothing is owed


def test_a_call_that_fails_ends_no_thread(capsys):
    workers = Workers("test-fails", 1)
    done = Event()
    workers.submit(lambda: 1 // 0)
    workers.submit(done.set)
    assert done.wait(DEADLINE_S)
    assert workers.wait(DEADLINE_S)
    assert "ZeroDivisionError" in capsys.readouterr().err
    workers.close()
