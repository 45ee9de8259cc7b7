"""A thread with an event loop."""

import _thread

from pyvmm.core.iothread import IoThread
from pyvmm.core.threads import Event


def test_calls_run_on_the_thread_until_it_is_closed():
    crashes = []
    thread = IoThread("test-io", crashes.append)
    seen, ids = Event(), []
    thread.loop.call_soon(lambda: (ids.append(_thread.get_ident()), seen.set()))
    thread.start()
    thread.start()
    assert seen.wait(10)
    assert ids[0] != _thread.get_ident()
    thread.close()
    assert crashes == []


def test_thread_that_never_started_is_closed():
    IoThread("test-io", lambda _error: None).close()


def test_crash_is_told_once(capsys):
    crashes, told = [], Event()
    thread = IoThread("test-io", lambda error: (crashes.append(error), told.set()))
    thread.loop.call_soon(lambda: 1 // 0)
    thread.start()
    assert told.wait(10)
    thread.close()
    assert len(crashes) == 1
    assert "test-io" in crashes[0]
    assert "ZeroDivisionError" in crashes[0]
    assert "ZeroDivisionError" in capsys.readouterr().err


def test_after_a_crash_it_can_be_started_again(capsys):
    told, again = Event(), Event()
    thread = IoThread("test-io", lambda _error: told.set())
    thread.loop.call_soon(lambda: 1 // 0)
    thread.start()
    assert told.wait(10)
    thread.loop.call_soon(again.set)
    thread.start()
    assert again.wait(10)
    thread.close()
    capsys.readouterr()
