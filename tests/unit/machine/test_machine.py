"""What a machine does at the ends that need no KVM."""

import pytest

from pyvmm.core import runstate
from pyvmm.core.eventloop import EventLoop
from pyvmm.cpr.fdstore import FdStore
from pyvmm.devices.base import Device
from pyvmm.errors import HostError
from pyvmm.machine.config import MachineConfig
from pyvmm.machine.machine import Machine


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
    machine = Machine(MachineConfig(), EventLoop(), FdStore())
    machine.devices = [Hanging(), Hanging()]
    machine.runstate.set(runstate.RUNNING)
    yield machine
    machine.loop.close()


def test_disk_that_hangs_does_not_let_a_guest_go_on_that_has_ended(machine, capfd):
    """Emulation failed: entered once more, the vCPU would do who knows what."""
    machine.on_thread_error("thread virtio-0 failed")
    machine.loop.run_once()
    assert machine.runstate.state == runstate.INTERNAL_ERROR
    assert all(device.resting for device in machine.devices)
    assert "requests do not end" in capfd.readouterr().err


def test_disk_that_hangs_keeps_a_guest_running_that_an_operator_stops(machine):
    with pytest.raises(HostError):
        machine.stop()
    assert machine.runstate.running
    assert not any(device.resting for device in machine.devices)


def test_device_that_cannot_take_input_keeps_no_other_from_it(machine):
    class Broken(Device):
        def resume(self):
            raise OSError("no such terminal")

    class Works(Device):
        attached = False

        def resume(self):
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
    assert machine.has_requests
    for device in machine.devices:
        device.hangs = False
    machine.loop.run_once(1)
    assert (events, done) == (["RESET"], ["power on"])
    assert not machine.has_requests
    assert not any(device.resting for device in machine.devices)
    assert capfd.readouterr().err.count("requests do not end") == 1
