import os
import signal
import time

import pytest
from harness.process import descriptors

from pyvmm.core.eventloop import HANGUP, READABLE, WRITABLE, EventLoop
from pyvmm.core.threads import Event, spawn


@pytest.fixture
def loop():
    before = descriptors("self")
    loop = EventLoop()
    yield loop
    loop.close()
    assert descriptors("self") == before


@pytest.fixture
def pipe(loop):
    reader, writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    ends = {"r": reader, "w": writer}
    yield ends
    for fd in ends.values():
        loop.remove(fd)
        os.close(fd)


def test_readiness(loop, pipe):
    seen = []
    loop.add(pipe["r"], READABLE, seen.append)
    loop.run_once(0)
    assert seen == []
    os.write(pipe["w"], b"x")
    loop.run_once()
    assert seen == [READABLE]
    # Level triggered: it stays until it is read.
    loop.run_once()
    assert len(seen) == 2
    os.read(pipe["r"], 1)
    loop.run_once(0)
    assert len(seen) == 2


def test_adding_again_replaces(loop, pipe):
    first, second = [], []
    loop.add(pipe["w"], WRITABLE, first.append)
    loop.add(pipe["w"], 0, second.append)
    loop.run_once(0)
    assert (first, second) == ([], [])
    loop.add(pipe["w"], WRITABLE, second.append)
    loop.run_once()
    assert (first, second) == ([], [WRITABLE])


def test_hangup_comes_unasked(loop, pipe):
    seen = []
    loop.add(pipe["r"], 0, seen.append)
    os.close(pipe.pop("w"))
    loop.run_once()
    assert seen[0] & HANGUP


def test_removed_descriptor_is_not_served(loop, pipe):
    seen = []
    loop.add(pipe["w"], WRITABLE, seen.append)
    loop.remove(pipe["w"])
    loop.remove(pipe["w"])
    loop.run_once(0)
    assert seen == []


def test_descriptor_removed_in_the_same_round_is_not_served(loop, pipe):
    seen = []

    def handler(revents):
        seen.append(revents)
        for fd in pipe.values():
            loop.remove(fd)

    os.write(pipe["w"], b"x")
    loop.add(pipe["r"], READABLE, handler)
    loop.add(pipe["w"], WRITABLE, handler)
    loop.run_once()
    assert len(seen) == 1


def test_another_file_of_the_same_number_is_not_served_in_that_round(loop, pipe):
    first, seen = [], []
    other = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)

    def handler(revents):
        first.append(revents)
        loop.remove(pipe["w"])
        loop.remove(pipe["r"])
        os.dup2(other, pipe["r"], inheritable=False)
        loop.add(pipe["r"], 0, seen.append)

    os.write(pipe["w"], b"x")
    loop.add(pipe["w"], WRITABLE, handler)
    loop.add(pipe["r"], READABLE, handler)
    loop.run_once()
    os.close(other)
    assert len(first) == 1
    assert seen == []


def test_dev_null_is_accepted(loop):
    seen = []
    fd = os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC)
    loop.add(fd, READABLE, seen.append)
    loop.run_once()
    loop.remove(fd)
    os.close(fd)
    assert seen == [READABLE]


def test_timers_come_in_order_and_not_before_their_time(loop):
    seen = []
    start = time.monotonic()
    due = {}
    for delay in (0.03, 0.01, 0.02):
        timer = loop.call_later(delay, lambda delay=delay: seen.append((delay, time.monotonic())))
        assert timer.due >= start + delay
        due[delay] = timer.due
    while len(seen) < 3:
        loop.run_once()
    # On a loaded host the three may be far enough apart to be due in another order.
    assert [delay for delay, _ in seen] == sorted(due, key=due.get)
    assert all(when >= due[delay] for delay, when in seen)


def test_waiting_for_a_timer_does_not_spin(loop):
    seen = []
    loop.call_later(0.05, lambda: seen.append(True))
    rounds = 0
    while not seen:
        loop.run_once()
        rounds += 1
    assert rounds <= 2


def test_cancelled_timer_does_not_come(loop):
    seen = []
    timers = [loop.call_later(0, lambda: seen.append("cancelled")) for _ in range(2)]
    timers.append(loop.call_later(0, lambda: seen.append("left")))
    timers[0].cancel()
    timers[1].cancel()
    loop.run_once()
    assert seen == ["left"]
    timers[2].cancel()


def test_timer_may_cancel_the_next(loop):
    seen = []
    timers = []
    loop.call_later(0, lambda: timers[0].cancel())
    timers.append(loop.call_later(0, lambda: seen.append("cancelled")))
    loop.run_once(0)
    assert seen == []


def test_timer_beyond_what_poll_can_wait(loop):
    seen = []
    loop.call_later(1e9, lambda: seen.append("late"))
    loop.call_soon(lambda: seen.append("soon"))
    loop.run_once()
    os.eventfd_write(loop._wake_fd, 1)
    loop.run_once()
    assert seen == ["soon"]


def test_run_once_waits_no_longer_than_asked(loop):
    loop.call_later(100, lambda: None)
    start = time.monotonic()
    loop.run_once(0.02)
    assert 0.02 <= time.monotonic() - start < 50


def test_calls_come_in_order_after_what_is_ready(loop, pipe):
    seen = []
    loop.add(pipe["w"], WRITABLE, lambda _: seen.append("ready"))
    for number in range(3):
        loop.call_soon(lambda number=number: seen.append(number))
    loop.run_once()
    assert seen == ["ready", 0, 1, 2]


def test_call_that_queues_itself_does_not_starve_the_rest(loop, pipe):
    seen = []

    def again():
        seen.append("call")
        loop.call_soon(again)

    loop.call_soon(again)
    loop.add(pipe["w"], WRITABLE, lambda _: seen.append("ready"))
    loop.run_once()
    loop.run_once()
    assert seen == ["ready", "call", "ready", "call"]


def test_call_from_another_thread_wakes_the_loop(loop):
    crashes, started = [], Event()

    def body():
        started.wait()
        loop.call_soon(loop.stop)

    spawn(body, crashes.append)
    loop.call_soon(started.set)
    loop.call_later(60, lambda: crashes.append("never woken") or loop.stop())
    loop.run()
    assert crashes == []
    assert loop.stopping


def test_call_that_comes_too_late_is_none():
    """A thread that waited for a name server finds the loop closed, and another file there."""
    loop = EventLoop()
    loop.close()
    reader, writer = os.pipe2(os.O_NONBLOCK)
    other, unused = os.pipe2(os.O_NONBLOCK)
    try:
        loop.call_soon(lambda: 1 // 0)
        loop.stop()
        for fd in (reader, other):
            with pytest.raises(BlockingIOError):
                os.read(fd, 8)
    finally:
        for fd in (reader, writer, other, unused):
            os.close(fd)


def test_call_from_a_signal_handler_wakes_the_loop(loop):
    crashes = []
    before = signal.signal(signal.SIGALRM, lambda *_: loop.call_soon(loop.stop))
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.01)
        loop.call_later(60, lambda: crashes.append("never woken") or loop.stop())
        loop.run()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert crashes == []


def test_nothing_is_lost_from_many_threads(loop):
    seen, crashes, count = [], [], 500

    def body(name):
        for number in range(count):
            loop.call_soon(lambda number=number: seen.append((name, number)))

    for name in range(4):
        spawn(lambda name=name: body(name), crashes.append)
    deadline = time.monotonic() + 30
    while len(seen) < 4 * count and not crashes and time.monotonic() < deadline:
        loop.run_once(1)
    assert crashes == []
    for name in range(4):
        assert [number for who, number in seen if who == name] == list(range(count))


def test_an_exception_leaves_the_loop_usable(loop):
    seen = []
    loop.call_soon(lambda: 1 // 0)
    loop.call_soon(lambda: seen.append("next"))
    with pytest.raises(ZeroDivisionError):
        loop.run_once()
    loop.run_once()
    assert seen == ["next"]


def test_wake_descriptor_is_not_inherited(loop):
    assert not os.get_inheritable(loop._wake_fd)


def test_what_fails_is_told_and_does_not_keep_the_rest_from_being_done(loop, pipe):
    def fail(*_):
        raise ValueError("injected")

    failures, done = [], []
    loop.on_error = lambda error, function: failures.append((str(error), function))
    loop.add(pipe["w"], WRITABLE, fail)
    loop.call_later(0, fail)
    loop.call_soon(fail)
    loop.call_soon(lambda: done.append(1))
    loop.run_once()
    assert failures == [("injected", fail)] * 3
    assert done == [1]
    # The descriptor is as ready as before, and would fail for ever.
    loop.run_once(0)
    assert len(failures) == 3


def test_what_fails_leaves_the_loop_if_nobody_is_told(loop):
    def fail():
        raise ValueError("injected")

    loop.call_soon(fail)
    with pytest.raises(ValueError, match="injected"):
        loop.run_once()
