"""QMP clients that mean no good: whatever they do, the guest runs and other clients are served."""

import json
import os
import select
import socket

import pytest
from harness import wait_until
from harness.qmp import Qmp

RSS_MARGIN_KIB = 16 << 10


@pytest.fixture
def machine(vm, tmp_path):
    # Two monitors: one for the attacker, one for who must not notice.
    machine = vm(
        *("-qmp", "unix:qmp,server=on,wait=off", "-qmp", "unix:other,server=on,wait=off"),
        append="ticker period=20 timer=pit",
    )
    machine.expect("tick")
    assert machine.status == "running"
    yield machine
    with Qmp(machine.folder / "other") as other:
        assert other.execute("query-status") == {"status": "running", "running": True}
    machine.seen = len(machine.serial)
    machine.expect("tick")
    assert set(machine.stderr().splitlines()) <= {
        "pyvmm: chardev compat_monitor1: its client does not read; output is dropped until that"
        " changes"
    }


@pytest.fixture
def qmp(machine):
    with Qmp(machine.folder / "qmp") as client:
        yield client


def rss_kib(machine):
    with open(f"/proc/{machine.pid}/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("RssAnon:"))


def still_answers(qmp):
    assert qmp.execute("query-kvm") == {"enabled": True, "present": True}


# What QEMU's own QMP test sends, and then some.
MALFORMED = [
    b"{]",
    b"\xff",
    b'{"execute": "\xff"}',
    b"\x01",
    b'{"execute": "new\nline"}',
    b"%p",
    b"null",
    b"{}",
    b'{"execute": true}',
    b'{"execute": "stop", "arguments": []}',
    b'{"execute": "stop", "extra": 0}',
    b'{"execute": "human-monitor-command"}',
    b'{"execute": "qmp_capabilities"}',
    b'{"execute": "stop", "execute": "stop"}',
    b'{"id": ' + b"9" * 100_000 + b"}",
    b'{"id": -' + b"9" * 5_000 + b"}",
    b'{"id": 1e400}',
    b'{"id": Infinity}',
    b'{"id": "\\udc00"}',
    b'{"id": "\xed\xa0\x80"}',
    b'{"id": "\xc0\x80"}',
    b"[" * 100_000,
    b'{"a":' * 100_000,
    b'"' + b"\\" * 99_999,
]


def test_malformed_messages(qmp):
    for data in MALFORMED:
        qmp.send(data + b"\n")
        # A line may hold several pieces that are wrong; the last reply is to the query.
        qmp.send({"execute": "query-kvm", "id": "after"})
        errors = 0
        while (reply := qmp.reply()).get("id") != "after":
            assert "error" in reply
            errors += 1
        assert errors >= 1
        assert reply["return"] == {"enabled": True, "present": True}
        assert qmp.events == [], "it did something"


def test_a_token_of_64_mb(machine, qmp):
    before = rss_kib(machine)
    chunk = b"x" * (1 << 20)
    qmp.send(b'{"execute": "')
    for _ in range(64):
        qmp.send(chunk)
    qmp.send(b'"}\n')
    assert qmp.reply()["error"]["desc"] == "JSON token size limit exceeded"
    still_answers(qmp)
    assert rss_kib(machine) - before < RSS_MARGIN_KIB


def test_one_byte_per_packet(qmp):
    for byte in b'{"execute": "query-name", "id": {"deep": ["\\u00e9"]}}':
        qmp.send(bytes((byte,)))
    assert qmp.reply() == {"return": {}, "id": {"deep": ["é"]}}


def test_several_commands_in_one_packet(qmp):
    qmp.send(b"".join(b'{"execute": "query-name", "id": %d}' % number for number in range(200)))
    assert [qmp.reply()["id"] for _ in range(200)] == list(range(200))


@pytest.mark.parametrize("enable", [(), ("oob",)])
def test_a_client_that_never_reads(machine, enable):
    verb = "exec-oob" if enable else "execute"
    request = json.dumps({verb: "query-status", "id": "x" * 2000}).encode()
    before = rss_kib(machine)
    with Qmp(machine.folder / "qmp", enable=enable) as client:
        client.sock.setblocking(False)
        sent = 0
        # Until pyvmm takes no more: its buffer and the socket's are full.
        while select.select([], [client.sock], [], 0.5)[1]:
            sent += client.sock.send(request * 20)
            assert sent < 64 << 20, "it takes whatever comes"
        assert rss_kib(machine) - before < RSS_MARGIN_KIB
        assert machine.status == "running"
        machine.hmp("stop")
        machine.hmp("cont")
        # It reads after all: every request that is whole has its reply, in order.
        client.sock.setblocking(True)
        for _ in range(sent // len(request)):
            assert client.reply()["return"]["running"] is True


def test_an_update_under_a_client_that_does_not_read(machine, qmp):
    qmp.sock.setblocking(False)
    request = json.dumps({"execute": "query-status", "id": "x" * 2000}).encode()
    sent = 0
    while select.select([], [qmp.sock], [], 0.5)[1]:
        sent += qmp.sock.send(request * 20)
    machine.update()
    qmp.sock.setblocking(True)
    for _ in range(sent // len(request)):
        assert qmp.reply()["return"]["running"] is True


def test_clients_that_vanish(machine):
    path = str(machine.folder / "qmp")
    fds = len(machine.fds())
    for how in range(20):
        with Qmp(path) as client:
            client.send(b'{"execute": "query-qmp-schema"}' * (1 + how))
            if how % 2:
                client.sock.recv(1 + how)  # mid reply
            if how % 3 == 0:
                client.send(b'{"execute": "st')
    wait_until(lambda: len(machine.fds()) == fds, "the last connection to be closed")


def test_a_thousand_connections_one_after_the_other(machine):
    fds, before = len(machine.fds()), rss_kib(machine)
    for number in range(1000):
        with Qmp(machine.folder / "qmp", enable=None if number % 3 else ()) as client:
            assert "QMP" in client.greeting
    wait_until(lambda: len(machine.fds()) == fds, "the last connection to be closed")
    assert rss_kib(machine) - before < RSS_MARGIN_KIB


def test_a_hundred_connections_at_once(machine):
    """One is served at a time; the others wait in the backlog or are told to try again."""
    path = str(machine.folder / "qmp")
    waiting = []
    for _ in range(100):
        sock = socket.socket(socket.AF_UNIX)
        sock.setblocking(False)
        if sock.connect_ex(path) == 0:
            waiting.append(sock)
        else:
            sock.close()
    assert len(waiting) > 1
    for sock in waiting:
        sock.settimeout(30)
        assert b'"QMP"' in sock.recv(4096)
        sock.close()
    with Qmp(path) as last:
        still_answers(last)


def test_a_hundred_clients_of_the_run_directory(vm, tmp_path):
    machine = vm("-name", "crowd", append="ticker", XDG_RUNTIME_DIR=str(tmp_path))
    assert machine.status == "running"
    path = next(tmp_path.rglob("qmp.sock"))
    clients = []
    for _ in range(100):
        sock = socket.socket(socket.AF_UNIX)
        sock.setblocking(False)
        sock.connect_ex(str(path))
        clients.append(sock)
    served = wait_until(
        lambda: [sock for sock in clients if select.select([sock], [], [], 0)[0]],
        "somebody to be served",
    )
    assert 1 <= len(served) <= 100
    assert machine.status == "running"
    machine.update()
    assert machine.status == "running"
    for sock in clients:
        sock.close()
    with Qmp(path) as client:
        still_answers(client)
    assert os.path.exists(path)
