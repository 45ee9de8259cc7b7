"""What closes a machine's parts, and what is reported before there is a machine."""

import pytest

from pyvmm.core import runstate
from pyvmm.devices.base import Device
from pyvmm.errors import ConfigError, HostError
from pyvmm.machine.config import MachineConfig
from pyvmm.machine.machine import Machine
from pyvmm.machine.parts import Opened
from pyvmm.testing.fake_parts import make_parts


class Thing:
    def __init__(self, name, closed, error=None):
        self.name, self.closed, self.error = name, closed, error

    def close(self):
        self.closed.append(self.name)
        if self.error:
            raise self.error


@pytest.fixture
def parts():
    parts = make_parts(MachineConfig())
    yield parts
    parts.loop.close()


def filled(closed, error=None):
    opened = Opened()
    opened.add(Thing("memory", closed), in_vm=True)
    opened.add(Thing("chardevs", closed))
    opened.add(Thing("disk", closed, error))
    assert opened.add(Thing("serial", closed)).name == "serial"
    return opened


def test_what_was_opened_last_is_closed_first_and_once():
    closed = []
    opened = filled(closed)
    opened.close()
    opened.close()
    assert closed == ["serial", "disk", "chardevs", "memory"]


def test_memory_stays_while_the_host_is_at_it(capfd):
    closed = []
    filled(closed, HostError("requests do not end")).close()
    assert closed == ["serial", "disk", "chardevs"]
    assert capfd.readouterr().err == "pyvmm: requests do not end\n"
    closed.clear()
    filled(closed).close(stuck=True)  # a vCPU is still in it
    assert closed == ["serial", "disk", "chardevs"]


def test_thread_that_dies_before_there_is_a_machine_is_heard_of(parts):
    parts.end.on_thread_error("thread virtio-0 failed")
    parts.loop.run_once(0)
    assert parts.end.has_requests
    machine = Machine(parts, MachineConfig())
    machine.cpus = []
    machine.loop.run_once(0)
    assert machine.runstate.state == runstate.INTERNAL_ERROR
    assert not machine.end.has_requests


def test_operator_may_end_it_before_there_is_a_machine(parts):
    """Ctrl-a x, while a chardev waits for its client."""
    events = []
    parts.events.subscribe(lambda name, _data: events.append(name))
    parts.end.quit()
    parts.end.quit(3)
    machine = Machine(parts, MachineConfig())
    assert (machine.ended, machine.end.exit_code, events) == (True, 0, ["SHUTDOWN"])
    assert parts.loop.stopping


def test_listener_that_fails_keeps_no_other_from_the_event(parts, capfd):
    class Monitor:
        recovered = False

        def listen(self, _name, _data):
            raise ValueError("a bug")

        def recover(self):
            self.recovered = True

    monitor, heard = Monitor(), []
    parts.events.subscribe(monitor.listen)
    parts.events.subscribe(lambda name, _data: heard.append(name))
    parts.events.emit("STOP", None)
    assert (heard, monitor.recovered) == (["STOP"], True)
    assert "ValueError('a bug')" in capfd.readouterr().err


def test_ports_belong_to_one_device(parts):
    class Port(Device):
        name = "port"

    first, second = Port(), Port()
    parts.add_isa(first, 0x500, 4)
    with pytest.raises(ConfigError, match=r"-device port: .*; choose other ports"):
        parts.add_isa(second, 0x503, 1)
    assert parts.claim(None) is None
