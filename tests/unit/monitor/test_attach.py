"""Which monitor comes to which chardev, and what it takes over from the image before."""

import pytest

from pyvmm.cpr.handover import Handover
from pyvmm.monitor.attach import open_monitors
from pyvmm.monitor.hmp.console import Console
from pyvmm.monitor.hmp.lines import LineMonitor
from pyvmm.monitor.hmp.state import MonitorState
from pyvmm.testing.fake_machine import FakeMigration
from pyvmm.testing.memory_chardev import MemoryChardev


class Config:
    def __init__(self, mode="readline", pretty=False):
        self.mode = mode
        self.pretty = pretty


def chardev(machine, id="mon0", terminal=False, resumed=False):
    found = MemoryChardev(id, loop=machine.loop)
    found.is_terminal = terminal
    found.is_inherited = resumed
    return found


@pytest.mark.parametrize(
    ("terminal", "term", "kind"),
    [(False, "xterm", LineMonitor), (True, "xterm", Console), (True, "dumb", LineMonitor)],
)
def test_only_a_real_terminal_gets_line_editing(machine, monkeypatch, terminal, term, kind):
    monkeypatch.setenv("TERM", term)
    monkeypatch.setattr(Console, "_run_prompt", lambda _self: None)
    one = chardev(machine, terminal=terminal)
    (monitor,) = open_monitors(machine, FakeMigration(), [(Config(), one)])
    assert type(monitor) is kind
    assert one.take_output().endswith(b"(pyvmm) ")


def test_a_simple_terminal_gets_an_echo(machine, monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    one = chardev(machine, terminal=True)
    open_monitors(machine, FakeMigration(), [(Config(), one)])
    one.take_output()
    one.feed(b"sto")
    assert one.take_output() == b"sto"


def test_each_takes_over_its_own_state(machine):
    handover = machine.handover = Handover(
        {},
        {
            "monitor/mon0": MonitorState(line=b"info n", flags=8).pack(),
            "monitor/mon0.2": MonitorState(line=b"info k", flags=8).pack(),
            "chardev/mon0": b"x",
        },
    )
    ports = [chardev(machine, resumed=True) for _ in range(2)]
    monitors = open_monitors(machine, FakeMigration(), [(Config(), port) for port in ports])
    for port, rest in zip(ports, (b"ame\n", b"vm\n"), strict=True):
        port.feed(rest)
    assert ports[0].take_output() == b"\r\n(pyvmm) "
    assert ports[1].take_output() == b"kvm support: enabled\r\n(pyvmm) "
    assert handover.passengers == {"monitor/mon0": monitors[0], "monitor/mon0.2": monitors[1]}
    assert handover.inherited_states("monitor") == {}
    assert handover.inherited_states("chardev") == {"mon0": b"x"}


def test_state_that_is_refused_costs_the_line_only(machine, capfd):
    machine.handover = Handover({}, {"monitor/mon0": b"nonsense"})
    one = chardev(machine, resumed=True)
    open_monitors(machine, FakeMigration(), [(Config(), one)])
    one.feed(b"info kvm\n")
    assert b"kvm support: enabled" in one.take_output()
    assert "pyvmm: monitor mon0: monitor: 8 bytes are too few" in capfd.readouterr().err


def test_each_has_its_own_current_cpu(machine):
    ports = [chardev(machine, f"mon{number}") for number in range(2)]
    open_monitors(machine, FakeMigration(), [(Config(), port) for port in ports])
    ports[0].feed(b"cpu 1\n")
    for port in ports:
        port.take_output()
        port.feed(b"info cpus\n")
    assert ports[0].take_output().startswith(b"  CPU #0")
    assert ports[1].take_output().startswith(b"* CPU #0")


def test_control_mode_is_qmp(machine):
    one = chardev(machine, "qmp0")
    open_monitors(machine, FakeMigration(), [(Config("control", pretty=True), one)])
    assert one.take_output().startswith(b'{\r\n    "QMP": ')
