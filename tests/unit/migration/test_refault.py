"""When a guest's memory counts as mapped again after an update."""

from types import SimpleNamespace

from pyvmm.errors import KvmError
from pyvmm.migration import refault


class Loop:
    """Calls what is to be called later at once, one after the other."""

    def __init__(self):
        self.calls = []

    def call_later(self, delay, function):
        self.calls.append(function)

    def run(self, most):
        for _ in range(most):
            if not self.calls:
                return
            self.calls.pop()()


def watched(monkeypatch, counts, looks=1000, huge=0):
    """What is told of a VM with these numbers of small pages, the last of which stays, and so many
    huge ones."""
    values = iter(counts)
    last = counts[-1]
    stats = SimpleNamespace(
        read=lambda name: next(values, last) if name == "pages_4k" else huge * (name == "pages_2m"),
        close=lambda: closed.append(True),
    )
    closed = []
    monkeypatch.setattr(refault, "VmStats", lambda fd: stats)
    status = SimpleNamespace(refault={})
    loop = Loop()
    machine = SimpleNamespace(
        loop=loop, ended=False, platform=SimpleNamespace(vm=SimpleNamespace(fd=0))
    )
    refault.Refault(machine, status)
    loop.run(looks)
    return status.refault, closed


def test_over_when_faults_are_rare(monkeypatch):
    counts = [0, 100, 200, 300, 400, 500, 600, 700, 710, 712, 713, 713, 713, 713]
    told, closed = watched(monkeypatch, counts)
    assert told["pages"] == 713
    assert told["ms"] >= 0
    assert closed


def test_not_over_while_they_go_on(monkeypatch):
    told, closed = watched(monkeypatch, list(range(0, 100_000, 100)), looks=500)
    assert told == {}
    assert not closed


def test_a_guest_that_touches_nothing(monkeypatch):
    told, _ = watched(monkeypatch, [7], huge=3)
    assert told["pages"] == 10
    assert told["huge"] == 3


def test_a_host_that_does_not_count(monkeypatch):
    def refuse(fd):
        raise KvmError("KVM_GET_STATS_FD", 25)

    monkeypatch.setattr(refault, "VmStats", refuse)
    status = SimpleNamespace(refault={})
    machine = SimpleNamespace(platform=SimpleNamespace(vm=SimpleNamespace(fd=0)))
    refault.Refault(machine, status)
    assert status.refault == {}
