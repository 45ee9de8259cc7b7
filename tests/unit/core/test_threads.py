import signal
import time

from pyvmm.core.threads import Event, report_crash, spawn

DEADLINE_S = 30


def test_event_is_a_flag():
    event = Event()
    assert not event.is_set()
    assert not event.wait(0)
    event.set()
    event.set()
    assert event.is_set()
    assert event.wait(0)
    assert event.wait()
    event.clear()
    event.clear()
    assert not event.is_set()
    assert not event.wait(0)
    event.set()
    assert event.wait()


def test_wait_ends_at_its_time():
    start = time.monotonic()
    assert not Event().wait(0.02)
    assert 0.02 <= time.monotonic() - start < DEADLINE_S


def test_time_that_is_over_does_not_wait():
    event = Event()
    assert not event.wait(-0.001)
    event.set()
    assert event.wait(-0.001)


def test_set_wakes_the_waiter():
    ping, pong, crashes = Event(), Event(), []

    def body():
        for _ in range(200):
            ping.wait()
            ping.clear()
            pong.set()

    spawn(body, crashes.append)
    for _ in range(200):
        ping.set()
        assert pong.wait(DEADLINE_S)
        pong.clear()
    assert crashes == []


def test_crash_is_handed_over():
    crashes, done = [], Event()

    def crashed(error):
        crashes.append(error)
        done.set()

    spawn(lambda: 1 // 0, crashed)
    assert done.wait(DEADLINE_S)
    assert type(crashes[0]) is ZeroDivisionError


def test_crash_includes_what_is_no_plain_exception():
    crashes, done = [], Event()

    def body():
        raise SystemExit(3)

    def crashed(error):
        crashes.append(error)
        done.set()

    spawn(body, crashed)
    assert done.wait(DEADLINE_S)
    assert type(crashes[0]) is SystemExit


def test_report_is_a_traceback(capsys):
    def fail():
        raise ValueError("impossible value")

    try:
        fail()
    except ValueError as error:
        report_crash(error)
    text = capsys.readouterr().err
    assert text.startswith("Traceback")
    assert "in fail" in text
    assert text.endswith("ValueError: impossible value\n")


def test_signals_are_for_the_main_thread():
    masks, done = [], Event()

    def body():
        masks.append(signal.pthread_sigmask(signal.SIG_BLOCK, ()))
        done.set()

    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    spawn(body, masks.append)
    assert done.wait(DEADLINE_S)
    assert {signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGALRM} <= masks[0]
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == before
