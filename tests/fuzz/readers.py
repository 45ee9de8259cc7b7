"""Targets that read a stream: states, what an exec hands over, the monitors."""

import json

from pyvmm.cpr import state as cpr
from pyvmm.errors import PyvmmError, VmStateError
from pyvmm.monitor.commands import build_registry
from pyvmm.monitor.hmp.lines import PROMPT, LineMonitor
from pyvmm.monitor.qmp.session import QmpSession
from pyvmm.monitor.registry import Context
from pyvmm.state import check, show
from pyvmm.testing import streams
from pyvmm.testing.fake_machine import FakeMachine, FakeMigration
from pyvmm.testing.memory_chardev import MemoryChardev

CONFIG = streams.machine_config("-m", "16M")
STATE = streams.make(CONFIG, seed=0x1234)
HANDOVER = cpr.encode(
    cpr.CprState(
        {("ram0", 0): 11, ("cpr/holder", 4711): 13},
        {"progress": bytes(64), "chardev/serial0": b"half a li", "empty": b""},
    )
)
#: Between two pieces of what a monitor's client sends.
CUT = b"\xff"


def state(data):
    """A state is loaded or refused, and likewise shown to people and to programs."""
    for look in (
        lambda: check.reasons(data, CONFIG),
        lambda: show.document(data, []).lines(fold=True),
        lambda: json.dumps(show.document(data, []).as_json()),
    ):
        try:
            look()
        except PyvmmError:
            continue


def handover(data):
    """What an exec hands over is read or refused, and written again as it was."""
    try:
        found = cpr.decode(data)
    except VmStateError:
        return
    assert cpr.encode(found) == data


class _Client:
    """A client of one monitor."""

    def __init__(self, session):
        self.machine = FakeMachine(cpus=2)
        self.chardev = MemoryChardev("monitor", loop=self.machine.loop)
        context = Context(self.machine, FakeMigration(), build_registry())
        self.session = session(self.chardev, context)
        self.chardev.attach(self.session)

    @property
    def has_quit(self):
        """Whether it ended the VM: nothing is answered any more."""
        return any(act.startswith("quit") for act in self.machine.acts)

    def say(self, data):
        self.chardev.feed(data)
        self.machine.loop.run_once(0)
        return self.chardev.take_output()


def qmp(data):
    """Whatever a program says, its next command has an answer."""
    client = _Client(QmpSession)
    try:
        client.say(b'{"execute": "qmp_capabilities"}')
        for piece in data.split(CUT):
            client.say(piece)
        # The end of a line ends strings and bare words; the brackets end what is nested.
        client.say(b"\n" + b"]" * 400 + b"\n")
        if not client.has_quit:
            answer = client.say(b'{"execute": "query-kvm", "id": 7}')
            assert b'"id": 7' in answer.splitlines()[-1], answer
    finally:
        client.machine.close()


def hmp(data):
    """Whatever a person types, the next command is answered and a prompt follows."""
    client = _Client(LineMonitor)
    try:
        for piece in data.split(CUT):
            client.say(piece)
        client.say(b"\n")
        if not client.has_quit:
            answer = client.say(b"info kvm\n")
            assert answer.endswith(PROMPT.encode()), answer
    finally:
        client.machine.close()


TARGETS = {
    "state": (state, [STATE]),
    "handover": (handover, [HANDOVER]),
    "qmp": (qmp, [b'{"execute": "query-status", "arguments": {}, "id": 1}\n']),
    "hmp": (hmp, [b"info status\nx /4xb $rip\ncpu 1\nhelp\n"]),
}
