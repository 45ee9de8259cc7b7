"""Out-of-band commands: carried out although the client has not read what came before."""

import json

import pytest

from pyvmm.monitor.qmp.session import MAX_QUEUE, QmpSession
from pyvmm.monitor.registry import Context
from pyvmm.testing.memory_chardev import MemoryChardev


class Client:
    def __init__(self, context, enable=("oob",), state=b""):
        self.context = context
        self.chardev = MemoryChardev("qmp0", loop=context.machine.loop)
        self.chardev.is_inherited = bool(state)
        self.session = QmpSession(self.chardev, context)
        if state:
            self.session.load_state(state)
        self.chardev.attach(self.session)
        if not state:
            self.send(execute="qmp_capabilities", arguments={"enable": list(enable)})
            assert self.heard()[-1] == {"return": {}}

    def send(self, **request):
        self.chardev.feed(json.dumps(request).encode() + b"\n")

    def heard(self):
        return [json.loads(line) for line in self.chardev.take_output().split(b"\r\n")[:-1]]

    def block(self):
        """The client stops reading in the middle of a reply."""
        self.chardev.make_room(5)
        self.send(execute="query-name", id="unread")

    def unblock(self):
        self.chardev.make_room(None)
        self.chardev.loop.run_once(0)
        return self.heard()


@pytest.fixture
def client(context):
    return Client(context)


def failure(reply):
    return reply["error"]["desc"]


def test_out_of_band_goes_ahead(client):
    client.block()
    client.send(execute="stop", id="waits")
    client.send(**{"exec-oob": "migrate_cancel", "id": "now"})
    assert client.context.migration.acts == ["cancel"]
    assert client.context.machine.acts == []
    replies = client.unblock()
    assert [reply.get("id", reply.get("event")) for reply in replies] == [
        "unread",
        "now",
        "STOP",
        "waits",
    ]


def test_quit_of_a_client_that_does_not_read(client):
    client.block()
    client.send(**{"exec-oob": "quit"})
    assert client.context.machine.acts == ["quit 0 host-qmp-quit"]


def test_only_a_few_commands_wait(client):
    client.block()
    for number in range(MAX_QUEUE + 3):
        client.send(execute="query-name", id=number)
    assert client.chardev.unread  # the rest stays in the kernel
    assert [reply["id"] for reply in client.unblock()] == ["unread", *range(MAX_QUEUE + 3)]


def test_large_commands_that_wait_are_bounded(client):
    client.block()
    line = b'{"execute": "query-name", "arguments": {"x": "' + b"y" * 600_000 + b'"}}\n'
    for _ in range(4):
        client.chardev.feed(line)
    assert len(client.session.save_state()) < 3 << 20
    assert len(client.chardev.unread) > len(line)
    assert len(client.unblock()) == 5


def test_out_of_band_replies_are_bounded(client):
    client.block()
    request = json.dumps({"exec-oob": "query-status", "id": "i" * 4000}).encode()
    client.chardev.feed(request * 400)
    assert client.chardev.unread
    assert len(client.session.save_state()) < 2 << 20
    assert len(client.unblock()) == 401


def test_errors(context, client):
    client.send(**{"exec-oob": "stop"})
    client.send(**{"exec-oob": "nope"})
    client.send(**{"execute": "quit", "exec-oob": "quit"})
    client.send(**{"exec-oob": 1})
    client.send(**{"exec-oob": "migrate_cancel", "arguments": {"x": 1}})
    assert [failure(reply) for reply in client.heard()] == [
        "The command stop does not support OOB",
        "The command nope has not been found",
        "QMP input member 'exec-oob' clashes with 'execute'",
        "QMP input member 'exec-oob' must be a string",
        "Parameter 'x' is unexpected",
    ]
    plain = Client(context, enable=())
    plain.send(**{"exec-oob": "quit"})
    assert failure(plain.heard()[0]) == "QMP input member 'exec-oob' is unexpected"
    assert context.machine.acts == []


def test_what_waits_lives_through_an_update(client):
    client.block()
    client.send(execute="query-name", id=1)
    client.send(execute="query-kvm", id={"a": "\n"})
    client.chardev.feed(b'{"exec-oob": "migrate_can')
    old = client.context
    first = client.chardev.take_output()
    new = Client(
        Context(old.machine, old.migration, old.registry), state=client.session.save_state()
    )
    new.chardev.feed(b'cel", "id": 3}')
    lines = (first + new.chardev.take_output()).split(b"\r\n")
    assert [json.loads(line)["id"] for line in lines[:-1]] == ["unread", 1, {"a": "\n"}, 3]
    assert old.migration.acts == ["cancel"]


def test_the_next_client_begins_without(client):
    client.block()
    client.send(execute="stop")
    client.chardev.disconnect()
    client.chardev.take_output()
    client.chardev.make_room(None)
    client.chardev.connect()
    client.send(execute="qmp_capabilities")
    client.send(**{"exec-oob": "quit"})
    assert failure(client.heard()[-1]) == "QMP input member 'exec-oob' is unexpected"
    assert client.context.machine.acts == []
