"""The wait for the host before an update stops the guest: when it ends, and what it leaves."""

from types import SimpleNamespace

import pytest

from pyvmm.core.eventloop import EventLoop
from pyvmm.devices.base import Device
from pyvmm.migration import quiesce
from pyvmm.migration.quiesce import OVER, STANDING, WAITING, Quiesce
from pyvmm.migration.status import STEPS, Status


class Disk(Device):
    """A disk; ``problem`` says what is under way."""

    waits_for_host = True

    def __init__(self, problem=""):
        super().__init__()
        self.problem = problem
        self.quiesced = False

    def quiesce(self):
        self.quiesced = True

    def unquiesce(self):
        self.quiesced = False

    def busy(self):
        return self.problem


class Network(Disk):
    waits_for_host = False


class Cpu:
    """A vCPU that comes by when the test says so, or has no thread."""

    def __init__(self, index, has_thread=True):
        self.index = index
        self.posted = []
        self.has_thread = has_thread

    def post(self, work):
        self.posted.append(work)
        return self.has_thread


class Trial:
    """A quiesce of a machine of fakes; ``results`` is what ``done`` was called with."""

    def __init__(self, loop, devices, cpus):
        self.loop = loop
        self.machine = SimpleNamespace(loop=loop, devices=devices, cpus=cpus, ended=False)
        self.results = []
        self.quiesce = Quiesce(self.machine, self._done)

    def _done(self, error):
        self.results.append(error if error is None else str(error))

    def run(self, until):
        """Serve the loop until something is so; its own timers end this if it never is."""
        for _ in range(10000):
            if until():
                return
            self.loop.run_once(0.02)
        raise AssertionError("it never was so")


@pytest.fixture
def trial():
    loop = EventLoop()
    yield lambda devices, cpus=(): Trial(loop, devices, list(cpus))
    loop.close()


def test_disks_stand_from_the_beginning_and_nothing_else_does(trial):
    devices = [Disk("busy"), Network("busy"), Disk()]
    one = trial(devices)
    assert [device.quiesced for device in devices] == [True, False, True]
    assert one.quiesce.state == WAITING
    assert one.results == []


def test_all_stand_when_nothing_is_under_way_and_each_vcpu_came_by(trial):
    disk, cpus = Disk("busy"), [Cpu(0), Cpu(1), Cpu(2, has_thread=False)]
    one = trial([disk, Network("busy")], cpus)
    one.loop.run_once(0.05)
    assert not cpus[0].posted  # first the disks
    disk.problem = ""
    one.run(lambda: cpus[0].posted)
    cpus[1].posted[0]()
    one.loop.run_once(0.05)
    assert (one.quiesce.state, one.results) == (WAITING, [])
    cpus[0].posted[0]()
    one.loop.run_once(0.05)
    assert (one.quiesce.state, one.results) == (STANDING, [None])
    assert disk.quiesced  # until the exec, or until it is undone
    one.quiesce.undo()
    assert not disk.quiesced
    assert [len(cpu.posted) for cpu in cpus] == [1, 1, 1]


def test_what_begins_while_vcpus_are_asked_is_waited_for(trial):
    disk, cpu = Disk(), Cpu(0)
    one = trial([disk], [cpu])
    one.run(lambda: cpu.posted)
    disk.problem = "a flush of the driver's"
    cpu.posted[0]()
    one.loop.run_once(0.05)
    assert one.results == []
    disk.problem = ""
    one.run(lambda: one.results)
    assert one.results == [None]


def test_deadline_names_all_that_do_not_get_done(trial, monkeypatch):
    monkeypatch.setattr(quiesce, "DEADLINE_S", 0.01)
    disks = [Disk("disk a hangs"), Disk(), Disk("disk b hangs")]
    one = trial(disks, [Cpu(0)])
    one.run(lambda: one.results)
    assert one.results == [
        "the host did not get done in 0 s: disk a hangs; disk b hangs. The guest was not"
        " stopped; wait for the host and try again"
    ]
    assert one.quiesce.state == OVER
    assert not any(disk.quiesced for disk in disks)


def test_vcpu_that_does_not_come_by_is_named(trial, monkeypatch):
    monkeypatch.setattr(quiesce, "DEADLINE_S", 0.01)
    disk, cpus = Disk(), [Cpu(0), Cpu(1)]
    one = trial([disk], cpus)
    one.run(lambda: cpus[0].posted)
    cpus[0].posted[0]()
    one.run(lambda: one.results)
    assert "0 s: vCPU 1 does not leave KVM_RUN. The guest" in one.results[0]
    assert not disk.quiesced
    cpus[1].posted[0]()  # late: nothing comes of it
    one.loop.run_once(0)
    assert len(one.results) == 1


@pytest.mark.parametrize("end", ["cancel", "recover"])
def test_giving_up_lets_the_disks_go_on(trial, end):
    disk = Disk("busy")
    one = trial([disk])
    getattr(one.quiesce, end)()
    assert not disk.quiesced
    assert len(one.results) == 1
    assert one.results[0]
    getattr(one.quiesce, end)()
    one.quiesce.undo()
    one.loop.run_once(0.02)
    assert len(one.results) == 1


def test_bug_in_a_disk_gives_the_others_back(trial):
    disks = [Disk(), Disk()]
    disks[1].busy = lambda: 1 // 0
    one = trial(disks)
    one.loop.on_error = lambda _error, function: function.__self__.recover()
    one.loop.run_once(0.05)
    assert not disks[0].quiesced
    assert one.results == ["internal error in the quiesce"]


@pytest.mark.parametrize("how", ["undo", "close"])
def test_nobody_is_told_after_the_end(trial, how):
    disk = Disk("busy")
    one = trial([disk])
    getattr(one.quiesce, how)()
    disk.problem = ""
    one.loop.run_once(0.02)
    assert one.results == []
    assert disk.quiesced == (how == "close")


def test_machine_that_ends_is_not_waited_for(trial):
    one = trial([Disk()])
    one.machine.ended = True
    one.loop.run_once(0.02)
    assert one.results == []


def marked(steps):
    status = Status(lambda name, data: None)
    for number, step in enumerate(steps, 1):
        status.mark(step, number * 1_000_000)
    return status


def test_marks_are_for_the_image_before_this_one_too():
    """It knows no quiesce, and takes nothing but the eight marks that it knows."""
    old = marked(STEPS[:5])
    packed = old.pack()
    assert len(packed["progress"]) == 8 * 8
    new = Status(lambda name, data: None)
    new.unpack(packed)
    assert list(new.steps_ms()) == ["preflight", "quiesce", "stop", "save"]
    assert set(new.steps_ms().values()) == {1.0}
    from_before = Status(lambda name, data: None)
    from_before.unpack(packed | {"quiesced": b"", "note": b"", "capabilities": b""})
    assert from_before.steps_ms() == {"preflight": 2.0, "stop": 1.0, "save": 1.0}
