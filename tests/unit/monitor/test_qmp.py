"""QMP: what is on the wire, whoever is at the other end."""

import itertools
import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pyvmm import __version__
from pyvmm.errors import VmStateError
from pyvmm.monitor.qmp.protocol import MAX_DEPTH, MAX_MESSAGE, ProtocolError, decode
from pyvmm.monitor.qmp.session import QmpSession
from pyvmm.monitor.registry import Context
from pyvmm.testing.memory_chardev import MemoryChardev

NEGOTIATE = b'{"execute": "qmp_capabilities"}\n'


class Client:
    """A client and the session that serves it."""

    def __init__(self, context, *, state=b"", negotiate=True, pretty=False):
        self.context = context
        self.chardev = MemoryChardev("qmp0", loop=context.machine.loop)
        self.chardev.is_inherited = bool(state)
        self.session = QmpSession(self.chardev, context, pretty=pretty)
        if state:
            self.session.load_state(state)
        self.chardev.attach(self.session)
        if not state:
            self.greeting = [json.loads(self.chardev.take_output())]
        if negotiate and not state:
            self.chardev.feed(NEGOTIATE)
            assert json.loads(self.chardev.take_output()) == {"return": {}}

    def say(self, data):
        self.chardev.feed(data if isinstance(data, bytes) else data.encode())
        self.chardev.loop.run_once(0)
        return self.heard()

    def execute(self, name, **arguments):
        request = {"execute": name, "arguments": arguments} if arguments else {"execute": name}
        return self.say(json.dumps(request))

    def heard(self):
        lines = self.chardev.take_output().split(b"\r\n")
        assert lines.pop() == b""
        return [json.loads(line, parse_constant=no_json) for line in lines]

    def after_exec(self):
        old = self.context
        context = Context(old.machine, old.migration, old.registry)
        return Client(context, state=self.session.save_state())


def no_json(name):
    raise AssertionError(f"{name} is no JSON")


@pytest.fixture
def client(context):
    return Client(context)


def error(desc, kind="GenericError"):
    return {"error": {"class": kind, "desc": desc}}


def test_greeting_and_negotiation(context):
    client = Client(context, negotiate=False)
    (hello,) = client.greeting
    version = hello["QMP"]["version"]
    assert ".".join(str(version["qemu"][part]) for part in ("major", "minor", "micro")) == (
        __version__
    )
    assert hello["QMP"]["capabilities"] == ["oob"]
    assert client.execute("query-status") == [
        error("Expecting capabilities negotiation with 'qmp_capabilities'", "CommandNotFound")
    ]
    assert client.execute("qmp_capabilities", enable=["nope"]) == [
        error("Parameter 'enable[0]' does not accept value 'nope'")
    ]
    assert client.execute("qmp_capabilities", enable=[1]) == [
        error("Invalid parameter type for 'enable[0]', expected: string")
    ]
    assert client.execute("qmp_capabilities") == [{"return": {}}]
    assert client.execute("qmp_capabilities") == [
        error("Capabilities negotiation is already complete, command ignored", "CommandNotFound")
    ]


def test_bytes_on_the_wire(client):
    client.chardev.feed(b'{"execute":"query-status","id":{"a":[1]}}')
    assert client.chardev.take_output() == (
        b'{"return": {"status": "running", "running": true}, "id": {"a": [1]}}\r\n'
    )


def test_pretty(context):
    client = Client(context, pretty=True)
    client.chardev.feed(b'{"execute": "query-kvm"}')
    assert client.chardev.take_output() == (
        b'{\r\n    "return": {\r\n        "enabled": true,\r\n        "present": true\r\n'
        b"    }\r\n}\r\n"
    )


def test_events_come_before_the_reply(client):
    told, reply = client.execute("stop")
    assert reply == {"return": {}}
    assert told.pop("event") == "STOP"
    stamp = told.pop("timestamp")
    assert set(stamp) == {"seconds", "microseconds"}
    assert 0 <= stamp["microseconds"] < 1_000_000
    assert told == {}
    told, _ = client.execute("system_reset")
    assert told["data"] == {"guest": False, "reason": "host-qmp-system-reset"}


def test_events_wait_for_negotiation(context):
    client = Client(context, negotiate=False)
    context.machine.stop()
    assert client.heard() == []


def test_errors(client):
    assert client.execute("nope") == [
        error("The command nope has not been found", "CommandNotFound")
    ]
    assert client.execute("query-status", x=1) == [error("Parameter 'x' is unexpected")]
    assert client.execute("migrate", uri=1) == [
        error("Invalid parameter type for 'uri', expected: string")
    ]
    assert client.say('{"exec": "x"}') == [error("QMP input member 'exec' is unexpected")]
    assert client.say("[]") == [error("QMP input must be a JSON object")]
    assert client.say("1\n") == [error("QMP input must be a JSON object")]
    assert client.say("{}") == [error("QMP input lacks member 'execute'")]
    assert client.say('{"execute": 1}') == [error("QMP input member 'execute' must be a string")]
    assert client.say('{"execute": "stop", "arguments": []}') == [
        error("QMP input member 'arguments' must be an object")
    ]
    assert client.say('{"execute": "stop", "id": 1, "x": 2}')[0]["id"] == 1
    (reply,) = client.say("{oops}")
    assert reply["error"]["desc"].startswith("1:2: JSON parse error, ")
    assert client.context.machine.acts == []


def test_a_bug_in_a_command_stays_in_it(client, capsys):
    client.context.machine.stop = lambda: 1 / 0
    assert client.execute("stop") == [error("internal error (ZeroDivisionError)")]
    assert "ZeroDivisionError" in capsys.readouterr().err
    assert client.execute("query-kvm") == [{"return": {"enabled": True, "present": True}}]


def test_human_monitor_command(client):
    assert client.execute("human-monitor-command", **{"command-line": "info status"}) == [
        {"return": "VM status: running\r\n"}
    ]


def test_every_query_returns_json(client):
    for name in client.context.registry.commands:
        if name.startswith(("query-", "x-query-")):
            (reply,) = client.execute(name)
            assert "return" in reply, name


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (b'{"a": "' + b"x" * MAX_MESSAGE + b'"}', "token size limit exceeded"),
        (b"[" * (MAX_DEPTH + 1), "nesting depth limit exceeded"),
        (b'{"execute": "\xff"}', "JSON parse error"),
        (b'{"execute": "\\ud800"}', "JSON parse error"),
        (b'{"execute": "a\\u0000"}', "a string contains NUL"),
        (b'{"id": NaN}', "NaN is no number"),
        (b'{"id": -Infinity}', "-Infinity is no number"),
        (b'{"id": 1e999}', "a number is too large"),
        (b'{"id": [{"a": -1.5E+400}]}', "a number is too large"),
        (b'{"id": ' + b"9" * 4000 + b"}", "a number is too large"),
        (b'{"id": ' + b"9" * 100000 + b"}", "a number is too large"),
        (b'{"id": "\\ud800"}', "surrogates not allowed"),
        (b'{"id": 1, "id": 2}', "duplicate key"),
        (b'{"id": ' + b"9" * 100_000 + b"}", "JSON parse error"),
        (b'{"id": "unfinished', "JSON parse error"),
        (b"}", "JSON parse error"),
        (b"\x00", "JSON parse error"),
    ],
)
def test_the_next_line_is_understood_again(client, text, problem):
    replies = client.say(text + b"\n" + b'{"execute": "query-kvm"}\n')
    assert problem in replies[0]["error"]["desc"]
    assert replies[1:] == [{"return": {"enabled": True, "present": True}}]


NUMBERS = [-1, 1 << 31, 1 << 63, -(1 << 63) - 1, 1 << 64, 10**300, 0.5, -0.0, 1e308]


def test_no_number_is_too_much_for_a_command(client):
    """Whatever it is, the answer is one of the command's own."""
    others = {"string": "x", "integer": 1, "boolean": True, "object": {}, "array": [], "value": 1}
    for command in client.context.registry.commands.values():
        for argument in command.arguments:
            if argument.type not in ("integer", "value"):
                continue
            for number in NUMBERS:
                arguments = {each.name: others[each.type] for each in command.arguments}
                arguments[argument.name] = number
                request = {"execute": command.name, "arguments": arguments, "id": number}
                replies = client.say(json.dumps(request))
                assert "internal error" not in str(replies), request
                assert replies[0]["id"] == number


@pytest.mark.parametrize("pretty", [False, True])
def test_result_that_is_no_json_is_an_error(context, monkeypatch, capsys, pretty):
    client = Client(context, pretty=pretty)
    result = []
    command = context.registry.commands["query-name"]
    monkeypatch.setattr(command, "function", lambda _context: {"name": result[-1]})

    def ask():
        client.chardev.feed(b'{"execute": "query-name", "id": 7}')
        return json.loads(client.chardev.take_output(), parse_constant=no_json)

    for value in (float("nan"), float("inf"), -float("inf"), object(), b"bytes"):
        result.append(value)
        assert ask()["id"] == 7
        assert "internal error" in ask()["error"]["desc"]
    result.append("\udcff is no text, \U0001f600 is")
    assert ask() == {"return": {"name": "\ufffd is no text, \U0001f600 is"}, "id": 7}
    assert "Traceback" in capsys.readouterr().err


def test_nesting_up_to_the_limit(client):
    deep = "[" * (MAX_DEPTH - 1) + "]" * (MAX_DEPTH - 1)
    (reply,) = client.say('{"execute": "stop", "x": 1, "id": ' + deep + "}")
    assert json.dumps(reply["id"]) == deep


def test_a_backslash_before_u0000_is_no_nul():
    assert decode(rb'{"id": "\\u0000"}') == {"id": "\\u0000"}


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40)
@given(st.lists(st.integers(0, 200), max_size=6))
def test_it_does_not_matter_how_input_is_cut(context, cuts):
    text = (
        b'{"execute": "query-kvm", "id": "a}{\\"]"}{"execute":"nope"}\r\n'
        b'  garbage "}\n{"id": [{}, "\\\\"], "execute": "query-name"}\n{"execute": "x'
    )
    client = Client(context)
    cuts = sorted({0, len(text), *(cut for cut in cuts if cut < len(text))})
    replies = [reply for a, b in itertools.pairwise(cuts) for reply in client.say(text[a:b])]
    assert [reply.get("id") for reply in replies] == ['a}{"]', None, None, [{}, "\\"]]
    assert "return" in replies[0]
    assert replies[1] == error("The command nope has not been found", "CommandNotFound")
    assert "JSON parse error" in replies[2]["error"]["desc"]
    assert replies[3]["return"] == {}


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.binary(max_size=40), max_size=8))
def test_any_bytes_are_survived(context, pieces):
    client = Client(context)
    for piece in pieces:
        client.say(piece)
    # The end of a line ends strings and bare words; the brackets end what is nested.
    client.say(b"\n" + b"]" * 400 + b"\n")
    assert client.say(b'{"execute": "query-kvm", "id": 7}')[-1]["id"] == 7


@given(st.binary())
def test_decode_returns_or_refuses(data):
    try:
        json.dumps(decode(data))
    except ProtocolError as refused:
        text = str(refused)
    else:
        text = "decoded"
    assert text


def test_a_client_that_does_not_read_gets_no_further_command(client):
    client.chardev.make_room(10)
    client.chardev.feed(b'{"execute": "stop"}{"execute": "cont"}')
    assert client.context.machine.acts == ["stop"]
    client.chardev.feed(b'{"execute": "query-kvm"}')
    assert client.chardev.unread
    client.chardev.make_room(None)
    client.chardev.loop.run_once(0)
    replies = client.heard()
    assert [reply.get("event", "return") for reply in replies] == [
        "STOP",
        "return",
        "RESUME",
        "return",
        "return",
    ]


def test_events_to_a_client_that_does_not_read_are_bounded_and_whole(client):
    client.chardev.make_room(0)
    for _ in range(20_000):
        client.context.machine.emit("RESET", {"guest": True, "reason": "guest-reset"})
    assert len(client.session.save_state()) < MAX_MESSAGE + 100
    client.chardev.make_room(None)
    assert client.chardev.dropped > 0
    events = client.heard()
    assert 5_000 < len(events) < 20_000
    assert client.execute("query-kvm")[-1] == {"return": {"enabled": True, "present": True}}


def test_the_next_client_inherits_nothing(client):
    client.say('{"execute": "st')
    client.chardev.disconnect()
    client.context.machine.emit("STOP")
    client.chardev.connect()
    assert "QMP" in client.heard()[0]
    assert client.execute("stop")[0]["error"]["class"] == "CommandNotFound"


def test_half_a_request_lives_through_an_update(client):
    assert client.say('{"execute": "query-kvm", "id": "\\') == []
    new = client.after_exec()
    assert new.heard() == []
    assert new.say('""}') == [{"return": {"enabled": True, "present": True}, "id": '"'}]


def test_the_rest_of_a_bad_line_is_skipped_after_an_update_too(client):
    client.say("[" * (MAX_DEPTH + 1))
    new = client.after_exec()
    assert new.say('{"execute": "stop"}\n{"execute": "query-name"}') == [{"return": {}}]
    assert new.context.machine.acts == []


def test_a_reply_that_was_not_read_lives_through_an_update(client):
    client.chardev.make_room(4)
    client.chardev.feed(b'{"execute": "query-kvm"}{"execute": "query-name"}')
    first = client.chardev.take_output()
    new = client.after_exec()
    rest = new.chardev.take_output()
    assert first + rest == (b'{"return": {"enabled": true, "present": true}}\r\n{"return": {}}\r\n')


def test_a_client_is_told_what_happened_before_the_new_image_had_monitors(client):
    client.context.migration.early_events = [
        ("RESUME", None, 1_500_000_000_123_456_789),
        ("MIGRATION", {"status": "completed"}, 1_500_000_000_200_000_000),
    ]
    assert client.after_exec().heard() == [
        {"timestamp": {"seconds": 1_500_000_000, "microseconds": 123_456}, "event": "RESUME"},
        {
            "timestamp": {"seconds": 1_500_000_000, "microseconds": 200_000},
            "event": "MIGRATION",
            "data": {"status": "completed"},
        },
    ]
    assert len(Client(client.context).greeting) == 1  # a new client is told nothing


def test_a_client_that_had_not_negotiated_is_told_nothing(context):
    client = Client(context, negotiate=False)
    context.migration.early_events = [("RESUME", None, 1)]
    assert client.after_exec().heard() == []


def test_what_is_sent_back_is_bounded(context):
    client = Client(context, pretty=True)
    deep = "[" * (MAX_DEPTH - 2) + "[]," * 100_000 + "0" + "]" * (MAX_DEPTH - 2)
    client.chardev.feed(b'{"execute": "query-kvm", "id": ' + deep.encode() + b"}")
    assert b"QMP input member 'id' has more than 4096 bytes" in client.chardev.take_output()
    client.chardev.feed(b'{"execute": "' + b"n" * 500_000 + b'"}')
    assert len(client.chardev.take_output()) < 8192


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(1, 3), st.binary(max_size=64))
def test_impossible_state_is_refused(context, version, data):
    client = Client(context)
    try:
        client.session.load_state(bytes((version,)) + data)
    except VmStateError:
        return
    assert version == 2
    client.after_exec()


@pytest.mark.parametrize("size", [0, 17])
def test_state_of_another_version_is_refused(client, size):
    with pytest.raises(VmStateError):
        client.session.load_state(b"\x01" + bytes(size))
