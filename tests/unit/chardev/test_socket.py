"""Sockets: peers that come, go, stall and vanish, and that see nothing of an exec."""

import os
import socket
import stat
import struct
import threading

import pytest
from harness.sockets import connected, server, tcp_server

from pyvmm.chardev.address import TcpAddress, UnixAddress
from pyvmm.chardev.base import CLOSED, OPENED
from pyvmm.chardev.socket import SocketChardev
from pyvmm.errors import ConfigError

pytestmark = pytest.mark.usefixtures("_in_folder")


def test_there_and_back(image, clients, recorder):
    chardev, frontend, client = connected(image, clients, recorder)
    client.sendall(b"in")
    image.until(lambda: frontend.data == b"in")
    assert chardev.write(b"out") == 3
    assert client.recv(10) == b"out"


def test_tcp(image, clients, recorder):
    chardev = tcp_server(image, nodelay=True)
    frontend = recorder()
    chardev.attach(frontend)
    assert chardev.filename == f"disconnected:tcp:127.0.0.1:{chardev.address.port},server=on"
    client = clients(("127.0.0.1", chardev.address.port))
    image.until(lambda: chardev.connected)
    host, port = client.getsockname()
    assert chardev.filename == (f"tcp:127.0.0.1:{chardev.address.port},server=on <-> {host}:{port}")
    client.sendall(b"in")
    image.until(lambda: frontend.data == b"in")


def test_filename(image, clients):
    chardev = server(image)
    assert chardev.filename == "disconnected:unix:s,server=on"
    clients()
    image.until(lambda: chardev.connected)
    assert chardev.filename == "unix:s,server=on"


def test_without_a_client_output_is_dropped(image):
    assert server(image).write(b"x" * 1000) == 1000


def test_input_waits_for_room(image, clients, recorder):
    chardev, frontend, client = connected(image, clients, recorder, room=3)
    client.sendall(b"abcdef")
    image.until(lambda: frontend.data == b"abc")
    image.settle()
    assert frontend.data == b"abc"
    frontend.room = 2
    # A vCPU thread makes room.
    thread = threading.Thread(target=chardev.accept_input)
    thread.start()
    image.until(lambda: frontend.data == b"abcde")
    thread.join()
    frontend.room = 10
    chardev.accept_input()
    image.until(lambda: frontend.data == b"abcdef")


def test_no_room_costs_no_processor_time(image, clients, recorder):
    _chardev, frontend, client = connected(image, clients, recorder, room=1)
    client.sendall(b"abc")
    image.until(lambda: frontend.data == b"a")
    client.close()
    image.settle()
    # Neither the unread input nor the hang-up may wake the loop again and again.
    wakes = []
    image.loop.call_later(0.05, lambda: wakes.append("timer"))
    image.loop.run_once(5)
    assert wakes == ["timer"]


def test_short_writes_are_told_once_and_lose_nothing(image, clients, recorder):
    chardev, frontend, client = connected(image, clients, recorder)
    data = os.urandom(1 << 20)
    sent = 0
    while taken := chardev.write(data[sent:]):
        sent += taken
        assert sent < len(data), "the socket took all: the test needs more"
    assert chardev.write(b"") == 0
    image.settle()
    assert frontend.writable == 0
    received = bytearray()
    told = 0
    while sent < len(data):
        received += client.recv(1 << 16)
        image.settle()
        if frontend.writable > told:
            assert frontend.writable == told + 1
            told += 1
            sent += chardev.write(data[sent:])
    while len(received) < len(data):
        received += client.recv(1 << 16)
    assert received == data
    image.settle()
    assert frontend.writable <= told + 1


def test_client_goes_and_the_next_comes(image, clients, recorder):
    chardev, frontend, client = connected(image, clients, recorder)
    second = clients()
    second.sendall(b"second")
    client.sendall(b"first.")
    client.close()
    image.until(lambda: frontend.data == b"first.second")
    assert frontend.events == [OPENED, CLOSED, OPENED]
    assert chardev.write(b"to second") == 9
    assert second.recv(20) == b"to second"


def test_second_client_waits(image, clients, recorder):
    chardev, frontend, client = connected(image, clients, recorder)
    second = clients()
    second.sendall(b"second")
    image.settle()
    assert frontend.data == b""
    chardev.write(b"x")
    assert client.recv(5) == b"x"


def test_what_a_client_wrote_before_it_went_is_read_first(image, clients, recorder):
    chardev, frontend, client = connected(image, clients, recorder, room=2)
    client.sendall(b"abcd")
    image.until(lambda: frontend.data == b"ab")
    client.close()
    image.settle()
    assert chardev.write(b"nobody reads this") == 17
    image.settle()
    assert frontend.events == [OPENED]
    frontend.room = 10
    chardev.accept_input()
    image.until(lambda: frontend.events == [OPENED, CLOSED])
    assert frontend.data == b"abcd"


def test_client_vanishes_while_output_is_full(image, clients, recorder):
    chardev, frontend, client = connected(image, clients, recorder)
    while chardev.write(b"x" * 65536) == 65536:
        pass
    client.close()
    image.until(lambda: CLOSED in frontend.events)
    assert frontend.writable == 1
    assert chardev.write(b"x") == 1


def test_client_vanishes_full_and_unread(image, clients, recorder):
    """Neither direction can go on: the front end must get out of both."""
    chardev, frontend, client = connected(image, clients, recorder, room=0)
    client.sendall(b"unread")
    while chardev.write(b"x" * 65536) == 65536:
        pass
    client.close()
    image.until(lambda: frontend.writable == 1)
    assert chardev.write(b"x") == 1
    frontend.room = 10
    chardev.accept_input()
    image.until(lambda: CLOSED in frontend.events)


def test_client_vanishes_before_it_is_accepted(image, clients, recorder):
    chardev = server(image)
    frontend = recorder()
    chardev.attach(frontend)
    clients().close()
    image.until(lambda: frontend.events == [OPENED, CLOSED])
    clients().sendall(b"still there")
    image.until(lambda: frontend.data == b"still there")


def test_reset(image, clients, recorder):
    chardev = tcp_server(image)
    frontend = recorder()
    chardev.attach(frontend)
    client = clients(("127.0.0.1", chardev.address.port))
    image.until(lambda: chardev.connected)
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.close()
    image.until(lambda: frontend.events == [OPENED, CLOSED])


def test_write_to_a_peer_that_is_gone(image, clients, recorder):
    chardev, frontend, client = connected(image, clients, recorder, room=0)
    client.close()
    assert chardev.write(b"x") == 1  # EPIPE
    image.until(lambda: CLOSED in frontend.events)


def test_write_from_another_thread_to_a_peer_that_is_gone(image, clients, recorder):
    chardev, frontend, client = connected(image, clients, recorder, room=0)
    client.close()
    thread = threading.Thread(target=chardev.write, args=(b"x",))
    thread.start()
    thread.join()
    image.until(lambda: CLOSED in frontend.events)


def test_half_close_ends_the_connection_after_its_input(image, clients, recorder):
    _chardev, frontend, client = connected(image, clients, recorder)
    client.sendall(b"last words")
    client.shutdown(socket.SHUT_WR)
    image.until(lambda: CLOSED in frontend.events)
    assert frontend.data == b"last words"


def test_front_end_that_closes_the_chardev_from_within(image, clients, recorder):
    chardev, frontend, client = connected(image, clients, recorder)

    def handle_event(event):
        frontend.events.append(event)
        chardev.close()

    frontend.handle_event = handle_event
    client.close()
    image.until(lambda: CLOSED in frontend.events)
    assert not os.path.exists("s")


def test_front_end_that_is_taken_off(image, clients, recorder):
    chardev, frontend, client = connected(image, clients, recorder)
    chardev.attach(None)
    client.sendall(b"x")
    image.settle()
    assert frontend.data == b""
    other = recorder()
    chardev.attach(other)
    image.until(lambda: other.data == b"x")
    assert other.events == [OPENED]


# Addresses.


def test_socket_file_is_removed(image):
    chardev = server(image)
    assert stat.S_ISSOCK(os.stat("s").st_mode)
    chardev.close()
    assert not os.path.exists("s")
    chardev.close()


def test_socket_file_of_somebody_else_is_not_removed(image):
    chardev = server(image)
    os.unlink("s")
    with open("s", "w") as other:
        other.write("mine")
    chardev.close()
    assert os.path.exists("s")


def test_stale_socket_file_is_replaced(image, clients):
    with socket.socket(socket.AF_UNIX) as old:
        old.bind("s")
    chardev = server(image)
    clients()
    image.until(lambda: chardev.connected)


def test_live_socket_is_refused_and_hears_nothing(image):
    with socket.socket(socket.AF_UNIX) as other:
        other.bind("s")
        other.listen()
        with pytest.raises(ConfigError, match=r"^-chardev: path='s' is in use"):
            server(image)
        other.setblocking(False)
        with pytest.raises(BlockingIOError):
            other.accept()
    assert os.path.exists("s")


@pytest.mark.parametrize("make", [lambda: os.mkdir("s"), lambda: open("s", "w").close()])
def test_path_of_another_file(image, make):
    make()
    with pytest.raises(ConfigError, match="path='s' exists and is no socket"):
        server(image)
    assert os.path.exists("s")


def test_path_in_no_folder(image):
    with pytest.raises(ConfigError, match="cannot listen on path='no/s': No such file"):
        server(image, "no/s")


@pytest.mark.parametrize(("length", "fits"), [(107, True), (108, False), (5000, False)])
def test_longest_path(length, fits):
    if fits:
        assert UnixAddress("x" * length, "-chardev").path
    else:
        with pytest.raises(ConfigError, match=f"has {length} bytes"):
            UnixAddress("x" * length, "-chardev")


def test_longest_path_counts_bytes():
    with pytest.raises(ConfigError, match="has 108 bytes"):
        UnixAddress("\u00e4" * 54, "-chardev")


def test_port_in_use(image):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(ConfigError, match=f"port={port}: Address already in use"):
            tcp_server(image, port)


def test_address_of_another_host(image):
    address = TcpAddress("192.0.2.1", 0, "-serial")  # TEST-NET-1, RFC 5737
    with pytest.raises(ConfigError, match=r"^-serial: cannot listen on host='192.0.2.1'"):
        image.make(SocketChardev, address=address, server=True)


@pytest.mark.parametrize("host", ["no.such.host.invalid", "1.2.3.4.5", "h\u00f6st", "a" * 300])
def test_bad_host(image, host):
    address = TcpAddress(host, 1, "-chardev")
    with pytest.raises(ConfigError, match="is not known"):
        image.make(SocketChardev, address=address)


# Clients.


def test_client(image, recorder):
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("s")
        listener.listen()
        chardev = image.make(SocketChardev, address=UnixAddress("s", "-chardev"))
        frontend = recorder()
        chardev.attach(frontend)
        assert frontend.events == [OPENED]
        assert chardev.filename == "unix:s"
        peer, _ = listener.accept()
        with peer:
            peer.sendall(b"hello")
            image.until(lambda: frontend.data == b"hello")
        image.until(lambda: frontend.events == [OPENED, CLOSED])
        assert chardev.filename == "disconnected:unix:s"


def test_client_without_a_server(image):
    with pytest.raises(ConfigError, match="cannot connect to unix:s: No such file"):
        image.make(SocketChardev, address=UnixAddress("s", "-chardev"))


def test_client_that_calls_again(image, recorder, monkeypatch):
    delays = []
    call_later = image.loop.call_later

    def at_once(delay_s, callback):
        delays.append(delay_s)
        return call_later(0.001, callback)

    monkeypatch.setattr(image.loop, "call_later", at_once)
    chardev = image.make(SocketChardev, address=UnixAddress("s", "-chardev"), reconnect_s=7)
    frontend = recorder()
    chardev.attach(frontend)
    image.until(lambda: len(delays) > 3)
    assert set(delays) == {7}
    assert frontend.events == []
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("s")
        listener.listen()
        image.until(lambda: frontend.events == [OPENED])
        peer, _ = listener.accept()
        peer.close()
        image.until(lambda: frontend.events == [OPENED, CLOSED, OPENED])
        peer, _ = listener.accept()
        with peer:
            peer.sendall(b"again")
            image.until(lambda: frontend.data == b"again")


def test_client_that_calls_a_tcp_server_again(image, recorder):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = TcpAddress("127.0.0.1", listener.getsockname()[1], "-chardev")
        chardev = image.make(SocketChardev, address=address, reconnect_s=1)
        image.until(lambda: chardev.connected)
        chardev.write(b"hello")
        peer, _ = listener.accept()
        with peer:
            assert peer.recv(10) == b"hello"


def test_refused_tcp_call_is_tried_again_later(image):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = TcpAddress("127.0.0.1", listener.getsockname()[1], "-chardev")
    chardev = image.make(SocketChardev, address=address, reconnect_s=100)
    image.until(lambda: chardev.connector._timer is not None)
    assert not chardev.connected


# wait=on


def test_wait(image, clients, capfd):
    chardev = server(image)
    thread = threading.Thread(target=clients)
    thread.start()
    chardev.wait_connected()
    thread.join()
    assert chardev.connected
    assert "waiting for a client on unix:s" in capfd.readouterr().err


def test_wait_can_be_interrupted(image):
    chardev = server(image)
    image.loop.call_soon(image.loop.stop)
    chardev.wait_connected()
    assert not chardev.connected


def test_no_wait(image):
    server(image, wait=False).wait_connected()
