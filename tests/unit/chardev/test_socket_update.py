"""Sockets over an exec: their peers see nothing of it."""

import os
import socket

import pytest
from harness.sockets import connected, server, tcp_server

from pyvmm.chardev.address import UnixAddress
from pyvmm.chardev.base import CLOSED, OPENED
from pyvmm.chardev.socket import SocketChardev
from pyvmm.errors import VmStateError

pytestmark = pytest.mark.usefixtures("_in_folder")

# Live update.


def test_connection_lives_through_an_exec(images, clients, recorder):
    old = images()
    chardev, frontend, client = connected(old, clients, recorder, room=4)
    client.sendall(b"half a line")
    old.until(lambda: frontend.data == b"half")
    state = chardev.save_state()
    inherited = old.exec()
    client.sendall(b", and the rest")

    new = images(inherited)
    chardev = server(new)
    chardev.load_state(state)
    frontend = recorder()
    chardev.attach(frontend)
    assert chardev.is_inherited
    assert frontend.events == [OPENED]
    new.until(lambda: frontend.data == b" a line, and the rest")
    chardev.write(b"answer")
    assert client.recv(10) == b"answer"
    client.close()
    new.until(lambda: CLOSED in frontend.events)
    assert not chardev.is_inherited
    chardev.close()
    assert not os.path.exists("s")


def test_connect_is_never_refused_over_an_exec(images, clients, recorder):
    old = images()
    before = server(old)
    state = before.save_state()
    inherited = old.exec()
    client = clients()  # nobody runs now
    client.sendall(b"early")
    new = images(inherited)
    chardev = server(new)
    chardev.load_state(state)
    frontend = recorder()
    chardev.attach(frontend)
    new.until(lambda: frontend.data == b"early")
    assert not chardev.is_inherited


def test_two_execs_in_a_row(images, clients, recorder):
    image = images()
    chardev, frontend, client = connected(image, clients, recorder)
    for _ in range(2):
        state = chardev.save_state()
        image = images(image.exec())
        chardev = server(image)
        chardev.load_state(state)
    frontend = recorder()
    chardev.attach(frontend)
    client.sendall(b"x")
    image.until(lambda: frontend.data == b"x")
    chardev.close()
    assert not os.path.exists("s")


def test_peer_that_goes_during_the_exec(images, clients, recorder):
    old = images()
    _chardev, _frontend, client = connected(old, clients, recorder)
    inherited = old.exec()
    client.sendall(b"bye")
    client.close()
    new = images(inherited)
    chardev = server(new)
    frontend = recorder()
    chardev.attach(frontend)
    new.until(lambda: frontend.events == [OPENED, CLOSED])
    assert frontend.data == b"bye"


def test_tcp_listener_keeps_its_port(images, clients):
    old = images()
    port = tcp_server(old).address.port
    new = images(old.exec())
    chardev = tcp_server(new)
    assert chardev.address.port == port
    clients(("127.0.0.1", port))
    new.until(lambda: chardev.connected)


def test_another_path_on_the_new_command_line(images, clients):
    old = images()
    state = server(old).save_state()
    new = images(old.exec())
    chardev = server(new, "other")
    chardev.load_state(state)
    clients("other")
    new.until(lambda: chardev.connected)
    chardev.close()
    assert not os.path.exists("other")


def test_client_connection_lives_through_an_exec_and_is_called_again(images, recorder):
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("s")
        listener.listen()
        old = images()
        old.make(SocketChardev, address=UnixAddress("s", "-chardev"))
        peer, _ = listener.accept()
        new = images(old.exec())
        chardev = new.make(SocketChardev, address=UnixAddress("s", "-chardev"), reconnect_s=1)
        frontend = recorder()
        chardev.attach(frontend)
        assert chardev.is_inherited
        peer.close()
        new.until(lambda: frontend.events == [OPENED, CLOSED, OPENED])
        assert not chardev.is_inherited


def no_socket():
    reading, writing = os.pipe()
    os.close(writing)
    return reading


def datagram_socket():
    return socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM).detach()


def tcp_socket():
    return socket.create_server(("127.0.0.1", 0)).detach()


def stream_socket():
    return socket.socket(socket.AF_UNIX).detach()


def unix_listener():
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("t")
        listener.listen()
        return listener.detach()


@pytest.mark.parametrize(
    ("index", "make"),
    [
        (0, no_socket),
        (0, datagram_socket),
        (0, tcp_socket),
        (0, unix_listener),
        (1, no_socket),
        (1, stream_socket),
        (1, tcp_socket),
    ],
)
def test_inherited_descriptor_of_the_wrong_kind(images, index, make):
    image = images({("chardev/c0", index): make()})
    with pytest.raises(VmStateError, match=r"^chardev/c0: inherited descriptor \d+ is"):
        server(image)
    assert not os.path.exists("s")


@pytest.mark.parametrize("state", [b"x", b"x" * 15, b"x" * 17])
def test_state_that_cannot_be(image, state):
    with pytest.raises(VmStateError, match=r"^chardev/c0: identity"):
        server(image).load_state(state)


def test_tcp_has_no_state(image):
    chardev = tcp_server(image)
    assert chardev.save_state() == b""
    with pytest.raises(VmStateError, match="1 bytes of state, not 0"):
        chardev.load_state(b"x")
