"""Chardevs that are made while the guest runs: the loop waits for nobody."""

import contextlib
import os
import socket
import threading
import time

import pytest
from harness import wait_until

from pyvmm.chardev.config import parse_chardev
from pyvmm.errors import ConfigError


@pytest.fixture(autouse=True)
def _in_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def add(image, text):
    """How long it took, and the chardev."""
    began = time.monotonic()
    chardev = image.chardevs.add(parse_chardev(text, "chardev-add"))
    return time.monotonic() - began, chardev


@contextlib.contextmanager
def busy_server():
    """A listener whose backlog is full: the host drops further calls, as a dead one would."""
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.socket())
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        for _ in range(3):
            client = stack.enter_context(socket.socket())
            client.setblocking(False)
            client.connect_ex(listener.getsockname())
        yield listener


def test_server_that_does_not_answer_is_waited_for_in_the_background(image):
    with busy_server() as listener:
        port = listener.getsockname()[1]
        took, chardev = add(image, f"socket,id=c,host=127.0.0.1,port={port}")
        assert took < 2
        assert not chardev.connected
        listener.settimeout(20)
        with contextlib.ExitStack() as stack:

            def answered():
                with contextlib.suppress(TimeoutError):
                    listener.settimeout(0.01)
                    stack.enter_context(listener.accept()[0])
                return chardev.connected

            image.until(answered)


def test_server_that_refuses_at_once(image):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
        with pytest.raises(ConfigError, match=f"tcp:127.0.0.1:{port}: Connection refused; start"):
            add(image, f"socket,id=c,host=127.0.0.1,port={port}")
    with pytest.raises(ConfigError, match="unix:none: No such file"):
        add(image, "socket,id=c,path=none")
    assert list(image.chardevs.items()) == []


def test_server_that_is_there(image):
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("s")
        listener.listen()
        assert add(image, "socket,id=c,path=s")[1].connected


def threads():
    return set(os.listdir("/proc/self/task"))


@pytest.fixture
def names(monkeypatch):
    """A name server that does not answer until ``go`` is set. In the end nobody waits for it."""
    import _socket

    real, go = _socket.getaddrinfo, threading.Event()
    before = threads()

    def look_up(host, *rest):
        if host == b"server.example":
            if rest[-1] & _socket.AI_NUMERICHOST:
                raise _socket.gaierror(-2, "Name or service not known")
            assert go.wait(20)
            host = names.answer
        if host is None:
            raise _socket.gaierror(-2, "Name or service not known")
        return real(host, *rest)

    names = type("Names", (), {"go": go, "answer": b"127.0.0.1"})
    monkeypatch.setattr(_socket, "getaddrinfo", look_up)
    yield names
    go.set()
    # The library opens descriptors when it looks up: the next test counts its own.
    wait_until(lambda: threads() <= before, "the look-up returns")


def test_name_is_looked_up_in_the_background(image, names):
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        took, chardev = add(image, f"socket,id=c,host=server.example,port={port}")
        assert took < 2
        image.settle()
        assert not chardev.connected
        names.go.set()
        image.until(lambda: chardev.connected)


def test_name_that_is_not_known(image, names, capfd):
    names.answer = None
    add(image, "socket,id=c,host=server.example,port=1")
    names.go.set()
    told = []
    image.until(lambda: told.append(capfd.readouterr().err) or any(told))
    assert "chardev-add: host='server.example' is not known" in "".join(told)


def test_name_server_that_does_not_answer_holds_up_no_update(images, names):
    """The peer was gone before the exec: the new image looks for it with the guest waiting."""
    from pyvmm.chardev.address import TcpAddress
    from pyvmm.chardev.socket import SocketChardev

    began = time.monotonic()
    image = images({})
    chardev = image.make(SocketChardev, address=TcpAddress("server.example", 1, "-chardev"))
    assert time.monotonic() - began < 2
    assert not chardev.connected


def test_terminal_is_named_in_the_reply_only(image, capfd):
    """Standard output may be the monitor's that asked for it."""
    _took, chardev = add(image, "pty,id=c")
    assert chardev.filename.startswith("pty:/dev/pts/")
    assert capfd.readouterr() == ("", "")
