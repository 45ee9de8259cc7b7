"""Clients of a VM's sockets, against servers that do not behave."""

import socket
import threading

import pytest

from pyvmm import rundir
from pyvmm.errors import CommandError, HostError
from pyvmm.verbs.client import (
    DisconnectedError,
    HmpClient,
    QmpClient,
    UnresponsiveError,
    find,
)

GREETING = b'{"QMP": {}}\r\n{"return": {}}\r\n'


@pytest.fixture
def serve(tmp_path):
    """Has a socket send pieces to the client that connects, and keep still or close then."""
    ends = []

    def start(file, *pieces, close=False):
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(str(tmp_path / file))
        listener.listen(1)

        def work():
            stream, _ = listener.accept()
            ends.append(stream)
            for piece in pieces:
                stream.sendall(piece)
            if close:
                # With a client's line unread a close would be a reset.
                stream.shutdown(socket.SHUT_WR)

        thread = threading.Thread(target=work)
        thread.start()
        ends.extend((listener, thread))
        return str(tmp_path)

    yield start
    for end in ends:
        end.join() if isinstance(end, threading.Thread) else end.close()


def test_hmp_reads_up_to_the_prompt(serve):
    client = HmpClient(serve(rundir.HMP_SOCKET, b"hello\r\n(pyvmm) "))
    assert client.banner == "hello\n"
    client.close()


def test_hmp_output_may_come_in_pieces_and_have_the_prompt_in_it(serve):
    # The server writes at once: what comes first is the greeting.
    client = HmpClient(serve(rundir.HMP_SOCKET, b"a (pyvmm) b\r", b"\n(pyv", b"mm) "))
    assert client.banner == "a (pyvmm) b\n"
    client.close()


@pytest.mark.parametrize("kind", [HmpClient, QmpClient])
def test_a_server_that_closes(serve, kind):
    path = serve(rundir.HMP_SOCKET if kind is HmpClient else rundir.QMP_SOCKET, b"hal", close=True)
    with pytest.raises(DisconnectedError, match="closed the connection"):
        kind(path)


@pytest.mark.parametrize("pieces", [(), (b"{",), (b"\xff" * 100,)])
def test_a_server_that_never_answers(serve, pieces):
    path = serve(rundir.QMP_SOCKET, *pieces)
    with pytest.raises(UnresponsiveError, match=r"does not answer in 0\.1 s"):
        QmpClient(path, 0.1)


@pytest.mark.parametrize("line", [b"\xff\n", b"[]\n", b"hello\n", b"[" * 100_000 + b"\n"])
def test_a_server_that_speaks_something_else(serve, line):
    with pytest.raises(HostError, match="no QMP server"):
        QmpClient(serve(rundir.QMP_SOCKET, line))


def test_qmp_passes_events_over_and_raises_errors(serve):
    event, error = b'{"event": "STOP"}\r\n', b'{"error": {"class": "X", "desc": "not now"}}\r\n'
    path = serve(rundir.QMP_SOCKET, GREETING, event, b'{"return": 5}\r\n', event, error)
    client = QmpClient(path)
    assert client.execute("one") == 5
    with pytest.raises(CommandError, match=r"^not now$"):
        client.execute("two")
    client.close()


def test_nobody_listens(tmp_path):
    with pytest.raises(HostError, match=r"qmp\.sock cannot be used: No such file"):
        QmpClient(str(tmp_path))


def test_an_unknown_name_lists_the_known_ones(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    with pytest.raises(HostError, match=r"^vm: there is no VM of that name; none runs$"):
        find("vm")
    entries = [rundir.reserve(name) for name in ("b", "a\x1b[m")]
    with pytest.raises(HostError, match=r"these run: a\?\[m, b$"):
        find("vm")
    assert find("b") == entries[0].path
    for entry in entries:
        entry.remove()
