"""What a machine does at the ends that need no KVM."""

import pytest

from pyvmm.core import runstate
from pyvmm.core.threads import Event
from pyvmm.devices.base import Device
from pyvmm.errors import ConfigError, HostError, StateError
from pyvmm.machine.config import MachineConfig
from pyvmm.machine.machine import Machine
from pyvmm.testing.fake_parts import make_parts


class Hanging(Device):
    """A device whose host does not answer."""

    def __init__(self):
        super().__init__()
        self.resting = False
        self.hangs = True

    def drain(self, timeout_s=None):
        self.resting = True
        if self.hangs:
            raise HostError("requests do not end")

    def start(self):
        self.resting = False


@pytest.fixture
def machine():
    config = MachineConfig()
    machine = Machine(make_parts(config), config)
    machine.cpus = []
    machine.devices = [Hanging(), Hanging()]
    machine.runstate.set(runstate.RUNNING)
    yield machine
    machine.loop.close()


def test_disk_that_hangs_does_not_let_a_guest_go_on_that_has_ended(machine, capfd):
    """Emulation failed: entered once more, the vCPU would do who knows what."""
    machine.end.on_thread_error("thread virtio-0 failed")
    machine.loop.run_once()
    assert machine.runstate.state == runstate.INTERNAL_ERROR
    assert all(device.resting for device in machine.devices)
    assert "requests do not end" in capfd.readouterr().err


def test_disk_that_hangs_keeps_a_guest_running_that_an_operator_stops(machine):
    with pytest.raises(HostError):
        machine.stop()
    assert machine.runstate.running
    assert not any(device.resting for device in machine.devices)


@pytest.mark.parametrize(
    ("state", "after"),
    [
        (runstate.RUNNING, runstate.INTERNAL_ERROR),
        (runstate.PAUSED, runstate.INTERNAL_ERROR),
        (runstate.PRELAUNCH, runstate.INTERNAL_ERROR),
        (runstate.IO_ERROR, runstate.INTERNAL_ERROR),
        (runstate.GUEST_PANICKED, runstate.INTERNAL_ERROR),
        (runstate.SHUTDOWN, runstate.INTERNAL_ERROR),
        (runstate.INMIGRATE, runstate.INMIGRATE),
        (runstate.FINISH_MIGRATE, runstate.FINISH_MIGRATE),
    ],
)
def test_thread_that_dies_in_any_state(machine, state, after):
    """What stands is not to be continued as if nothing had been; in an update the update says."""
    events = []
    machine.subscribe(lambda name, _data: events.append(name))
    machine.runstate.state = state
    machine.devices = []
    machine.end.on_thread_error("thread virtio-0 failed")
    machine.loop.run_once()
    assert machine.runstate.state == after
    assert events == (["STOP"] if state == runstate.RUNNING else [])


@pytest.mark.parametrize("state", [runstate.RUNNING, runstate.PAUSED])
@pytest.mark.parametrize(
    ("event", "action", "after", "exit_code"),
    [
        ("shutdown", "poweroff", None, 0),
        ("shutdown", "pause", runstate.SHUTDOWN, None),
        ("panic", "shutdown", None, 0),
        ("panic", "exit-failure", None, 1),
        ("panic", "pause", runstate.GUEST_PANICKED, None),
        ("panic", "none", None, None),
        ("internal-error", "exit-failure", None, 1),
        ("internal-error", "pause", runstate.INTERNAL_ERROR, None),
    ],
)
def test_each_event_has_its_action(machine, state, event, action, after, exit_code):
    """Also if the guest was paused before the main loop came to it."""
    machine.devices = []
    machine.config.actions[event] = action
    if event == "shutdown":
        machine.end.request_power_off()
    elif event == "panic":
        machine.end.report_panic(1)
    else:
        machine.end.on_cpu_error(0, "emulation failed")
    machine.runstate.state = state
    machine.loop.run_once()
    assert machine.runstate.state == after or after is None
    assert machine.ended == machine.loop.stopping == (exit_code is not None)
    assert machine.end.exit_code == (exit_code or 0)


@pytest.mark.parametrize("error", [ConfigError("-kernel x: gone"), OSError(5, "I/O"), ValueError()])
@pytest.mark.parametrize("state", [runstate.RUNNING, runstate.PAUSED, runstate.SHUTDOWN])
@pytest.mark.parametrize("action", ["pause", "exit-failure"])
@pytest.mark.parametrize("by_guest", [False, True])
def test_reset_that_fails(machine, monkeypatch, capfd, error, state, action, by_guest):
    def fail():
        raise error

    machine.devices = []
    machine.runstate.state = state
    machine.config.actions["internal-error"] = action
    monkeypatch.setattr(machine, "power_on", fail)
    if by_guest:
        machine.end.request_reset()
        machine.loop.run_once()
    else:
        with pytest.raises(type(error)):
            machine.reset()
    assert capfd.readouterr().err.count("pyvmm: reset: ") == 1
    if action == "pause":
        assert machine.runstate.state == runstate.INTERNAL_ERROR
        assert not machine.ended
    else:
        assert machine.end.exit_code == 1
        assert machine.ended


def test_stop_that_fails_by_a_bug_lets_the_guest_go_on(machine, monkeypatch):
    def fail(_timeout_s=None):
        raise ValueError("a bug")

    monkeypatch.setattr(machine.devices[1], "drain", fail)
    machine.devices[0].hangs = False
    with pytest.raises(ValueError, match="a bug"):
        machine.stop()
    assert machine.runstate.running
    assert not machine.devices[0].resting


def test_operator_waits_for_all_disks_together_no_longer_than_for_one(machine):
    """The monitors are silent meanwhile."""
    waits = []

    class Slow(Hanging):
        def drain(self, timeout_s=None):
            waits.append(timeout_s)
            Event().wait(timeout_s)
            super().drain(timeout_s)

    machine.devices = [Slow(), Slow(), Slow()]
    with pytest.raises(HostError):
        machine.pause_cpus(0.05)
    assert 0.04 < waits[0] <= 0.05
    assert waits[1:] == [0, 0]


def test_disk_that_hangs_keeps_no_guest_running_that_another_disk_has_to_stop(machine, capfd):
    machine.halt(runstate.IO_ERROR)
    assert machine.runstate.state == runstate.IO_ERROR
    assert all(device.resting for device in machine.devices)
    assert "requests do not end" in capfd.readouterr().err


class Cpu:
    """A vCPU that does not come while a device holds it."""

    index = 0
    runs = True

    def __init__(self, device):
        self.device = device

    def request_stop(self):
        pass

    def wait_stopped(self, timeout_s):
        assert timeout_s <= 0.2  # the monitors are silent
        self.runs = self.device.holds_cpu
        return not self.runs

    def resume(self):
        self.runs = True

    def wait_entered(self, timeout_s):
        assert timeout_s <= 0.05


@pytest.fixture
def held(machine):
    """The machine's first disk hangs, and its driver's reset with it."""
    disk = machine.devices[0]
    disk.holds_cpu = True
    disk.busy = lambda: "disk a hangs"
    machine.cpus = [Cpu(disk)]
    return disk


def test_stop_names_the_disk_that_holds_a_vcpu(machine, held):
    with pytest.raises(HostError, match="disk a hangs"):
        machine.stop()
    assert machine.runstate.running


def test_guest_that_has_ended_does_not_go_on_for_a_disk_that_holds_a_vcpu(
    machine, held, monkeypatch, capfd
):
    monkeypatch.setattr("pyvmm.machine.machine.RESET_RETRY_S", 0)
    machine.end.on_thread_error("thread virtio-0 failed")
    for _ in range(3):
        machine.loop.run_once(1)
    started = []
    held.start = lambda: started.append(1)
    machine.resume_cpus()  # an operator's stop that failed, say
    assert not started
    assert machine.end.has_requests
    held.holds_cpu = False
    machine.loop.run_once(1)
    assert machine.runstate.state == runstate.INTERNAL_ERROR
    assert not machine.end.has_requests
    assert capfd.readouterr().err.count("disk a hangs") == 1


def test_reset_of_a_guest_that_stands_waits_for_its_disk_too(machine, monkeypatch):
    """It stopped by itself, with requests under way."""
    monkeypatch.setattr("pyvmm.machine.machine.RESET_RETRY_S", 0)
    machine.end.on_thread_error("thread virtio-0 failed")
    machine.loop.run_once()
    done = []
    monkeypatch.setattr(machine, "power_on", lambda: done.append(machine.runstate.state))
    machine.reset()
    machine.loop.run_once(1)
    assert machine.runstate.state == runstate.INTERNAL_ERROR
    with pytest.raises(StateError):
        machine.cont()
    for device in machine.devices:
        device.hangs = False
    machine.loop.run_once(1)
    assert len(done) == 1
    assert machine.runstate.state == runstate.PRELAUNCH
    assert machine.devices[0].resting


def test_device_that_cannot_take_input_keeps_no_other_from_it(machine):
    class Broken(Device):
        def attach(self):
            raise OSError("no such terminal")

    class Works(Device):
        attached = False

        def attach(self):
            self.attached = True

    machine.devices = [Broken(), Works()]
    with pytest.raises(OSError, match="no such terminal"):
        machine.attach_devices()
    assert machine.devices[1].attached


def test_reset_waits_for_a_disk_that_hangs_and_nothing_else_does(machine, monkeypatch, capfd):
    """Also over a failed attempt to stop, which must not let the guest that was go on."""
    monkeypatch.setattr("pyvmm.machine.machine.RESET_RETRY_S", 0)
    events, done = [], []
    machine.subscribe(lambda name, _data: events.append(name))
    monkeypatch.setattr(machine, "power_on", lambda: done.append("power on"))
    machine.reset()
    for _ in range(3):
        machine.loop.run_once(1)
        with pytest.raises(HostError):
            machine.stop()
        assert machine.runstate.running
        assert machine.devices[0].resting
    assert (events, done) == ([], [])
    assert machine.end.has_requests
    for device in machine.devices:
        device.hangs = False
    machine.loop.run_once(1)
    assert (events, done) == (["RESET"], ["power on"])
    assert not machine.end.has_requests
    assert not any(device.resting for device in machine.devices)
    assert capfd.readouterr().err.count("requests do not end") == 1
