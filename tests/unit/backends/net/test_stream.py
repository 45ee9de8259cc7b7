"""Frames over a stream socket: framing, backpressure, loss, and what an exec carries over."""

import errno
import itertools
import os
import socket
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyvmm.backends.net.base import HEADER, MAX_FRAME, skip
from pyvmm.backends.net.stream import SocketBackend, StreamBackend
from pyvmm.chardev.address import TcpAddress, UnixAddress
from pyvmm.core.eventloop import EventLoop
from pyvmm.cpr.handover import Handover
from pyvmm.errors import ConfigError, VmStateError

NO_HEADER = bytes(HEADER)


def framed(*frames):
    return b"".join(struct.pack(">I", len(frame)) + frame for frame in frames)


def parts(frame, *cuts):
    """A frame with its header as a guest's buffers might hold it."""
    whole = NO_HEADER + frame
    edges = [0, *cuts, len(whole)]
    return [memoryview(whole)[a:b] for a, b in itertools.pairwise(edges)]


@pytest.fixture
def pair(image, recorder):
    """A started back end's recorder, and its peer."""
    backend = image.make(StreamBackend)
    ours, peer = socket.socketpair()
    backend.open_stream(ours.detach())
    front = recorder(backend)
    front.start()
    with peer:
        peer.settimeout(10)
        yield front, peer


def read_frames(peer, count):
    frames = []
    with peer.makefile("rb") as file:
        for _ in range(count):
            (size,) = struct.unpack(">I", file.read(4))
            frames.append(file.read(size))
    return frames


def test_frames_come_with_an_empty_header(image, pair):
    front, peer = pair
    frames = [b"a" * 60, b"b" * 1514, b"", b"c" * MAX_FRAME]
    peer.sendall(framed(*frames[:3]))
    image.until(lambda: len(front.frames) == 3)
    peer.setblocking(False)
    rest = framed(frames[3])
    while rest:
        rest = rest[peer.send(rest) :]
        image.settle()
    image.until(lambda: len(front.frames) == 4)
    assert front.frames == frames
    assert set(front.headers) == {NO_HEADER}


class Failing:
    """A socket whose next calls fail."""

    def __init__(self, sock, number, times):
        self._sock = sock
        self._error = OSError(number, os.strerror(number))
        self._times = times
        self.calls = 0

    def __getattr__(self, name):
        return getattr(self._sock, name)

    def _fail(self):
        self.calls += 1
        if self.calls <= self._times:
            raise self._error

    def sendmsg(self, *arguments):
        self._fail()
        return self._sock.sendmsg(*arguments)

    def recv_into(self, *arguments):
        self._fail()
        return self._sock.recv_into(*arguments)


@pytest.mark.parametrize("number", [errno.ENOBUFS, errno.ENOMEM])
def test_memory_that_is_short_costs_no_connection(image, pair, number):
    front, peer = pair
    backend = front.backend
    front.handle_writable = lambda: backend.send(parts(b"out"))
    backend._sock = failing = Failing(backend._sock, number, 1)
    assert not backend.send(parts(b"out"))
    image.until(lambda: failing.calls >= 2)
    assert read_frames(peer, 1) == [b"out"]
    backend._sock = failing = Failing(failing, number, 2)
    peer.sendall(framed(b"in"))
    image.until(lambda: front.frames)
    assert front.frames == [b"in"]
    assert front.links == []
    # There was something to read all the time, and the loop waited all the same.
    assert failing.calls <= 4


@settings(max_examples=60, deadline=None)
@given(st.lists(st.binary(max_size=300), max_size=12), st.lists(st.integers(0, 4000)))
def test_cuts_make_no_difference(frames, cuts):
    stream = framed(*frames)
    edges = sorted({0, *(min(cut, len(stream)) for cut in cuts), len(stream)})
    loop = EventLoop()
    backend = StreamBackend("n", loop, Handover())
    ours, peer = socket.socketpair()
    backend.open_stream(ours.detach())
    backend.start()
    found = []
    with peer:
        for start, end in itertools.pairwise(edges):
            peer.sendall(stream[start:end])
            while (frame := backend.peek()) is not None:
                assert backend.peek() is frame
                assert frame[:HEADER] == NO_HEADER
                frame[:HEADER] = b"\xff" * HEADER  # the device writes there
                found.append(bytes(frame[HEADER:]))
                backend.consume()
    backend.close()
    loop.close()
    assert found == frames


def test_buffer_is_gone_round_many_times(image, pair):
    """Far more than the buffer holds, in frames that never fit its end exactly."""
    front, peer = pair
    frames = [bytes([n & 0xFF]) * (40000 + 13 * n) for n in range(40)]
    peer.setblocking(False)
    stream = memoryview(framed(*frames))
    while stream:
        try:
            stream = stream[peer.send(stream) :]
        except BlockingIOError:
            image.loop.run_once(0.1)
    image.until(lambda: len(front.frames) == len(frames))
    assert front.frames == frames


def test_without_room_frames_stay_where_they_are(image, pair):
    front, peer = pair
    front.room = 1
    peer.sendall(framed(b"one", b"two", b"three"))
    image.until(lambda: front.frames)
    image.settle()
    assert front.frames == [b"one"]
    front.room = 3
    front.backend.watch(True)
    front.handle_frames()
    assert front.frames == [b"one", b"two", b"three"]


def test_sent_frames_have_their_length_and_no_header(pair):
    front, peer = pair
    assert front.backend.send(parts(b"x" * 60))
    assert front.backend.send(parts(b"y" * 90, 5, 12, 40))
    assert front.backend.send(parts(b"z" * 70, 3, 30))
    assert read_frames(peer, 3) == [b"x" * 60, b"y" * 90, b"z" * 70]


def test_full_socket_tears_no_frame(image, pair):
    front, peer = pair
    sent = []
    while True:
        frame = bytes([len(sent)]) * 5000
        if not front.backend.send(parts(frame, 12, 700)):
            break
        sent.append(frame)
    assert not front.backend.send(parts(b"later"))  # it is full until it says otherwise
    assert front.writable == 0
    found = b""
    while len(found) < len(framed(*sent)):
        found += peer.recv(1 << 20)
        image.loop.run_once(0.01)
    assert found == framed(*sent)
    image.until(lambda: front.writable)
    assert front.backend.send(parts(b"later"))
    assert read_frames(peer, 1) == [b"later"]


def test_peer_that_leaves_takes_the_link_down(image, pair):
    front, peer = pair
    peer.sendall(framed(b"last words") + b"\0\0")
    peer.close()
    image.until(lambda: front.links)
    assert front.frames == [b"last words"]
    assert front.links == [False]
    assert front.backend.send(parts(b"to nobody"))
    assert not front.backend.link_up


def test_peer_that_leaves_with_a_full_socket(image, pair):
    front, peer = pair
    while front.backend.send(parts(b"f" * 5000)):
        pass
    peer.close()
    image.until(lambda: front.links and front.writable)
    assert front.backend.send(parts(b"to nobody"))


@pytest.mark.parametrize("size", [MAX_FRAME + 1, 1 << 31, (1 << 32) - 1])
def test_impossible_length_ends_the_connection(image, pair, size):
    front, peer = pair
    peer.sendall(framed(b"good") + struct.pack(">I", size) + b"more")
    image.until(lambda: front.links)
    assert front.frames == [b"good"]
    assert peer.recv(1) == b""


def test_nothing_is_read_before_the_start(image, recorder):
    backend = image.make(StreamBackend)
    ours, peer = socket.socketpair()
    with peer:
        peer.sendall(framed(b"frame"))
        backend.open_stream(ours.detach())
        front = recorder(backend)
        image.settle()
        assert backend.peek() is None
        front.start()
        assert front.frames == [b"frame"]


# Over an exec.


@pytest.mark.parametrize("cut", [1, 4, 5, 100, 0])
def test_half_a_received_frame_lives_through_an_exec(images, recorder, tmp_path, cut):
    """... and so does one that the device had no room for."""
    path = str(tmp_path / "s")
    old = images()
    backend = old.make(SocketBackend, address=UnixAddress(path, "-netdev"), server=True)
    front = recorder(backend, room=1)
    front.start()
    stream = framed(b"a" * 100, b"b" * 200, b"c" * 300)
    with socket.socket(socket.AF_UNIX) as peer:
        peer.connect(path)
        peer.sendall(stream[: 104 + cut])
        old.until(lambda: front.frames)
        old.settle()
        state = backend.save_state()
        new = images(old.exec())
        backend = new.make(SocketBackend, address=UnixAddress(path, "-netdev"), server=True)
        backend.load_state(state)
        assert backend.link_up
        front = recorder(backend)
        peer.sendall(stream[104 + cut :])
        new.settle()
        assert front.frames == []  # not before it starts
        front.start()
        new.until(lambda: len(front.frames) == 2)
        assert front.frames == [b"b" * 200, b"c" * 300]
        assert set(front.headers) == {NO_HEADER}
        assert backend.save_state() == old_address_only(state)


def old_address_only(state):
    """The state once all frames are through: the listener's file is still ours to remove."""
    received, unsent, address = struct.unpack_from(">III", state)
    return struct.pack(">III", 0, 0, address) + state[12 + received + unsent :]


def test_half_a_sent_frame_lives_through_an_exec(images, recorder, tmp_path):
    path = str(tmp_path / "s")
    old = images()
    address = UnixAddress(path, "-netdev")
    front = recorder(old.make(SocketBackend, address=address, server=True))
    front.start()
    with socket.socket(socket.AF_UNIX) as peer:
        peer.settimeout(10)
        peer.connect(path)
        old.until(lambda: front.links)
        sent = []
        while not front.backend._unsent:
            sent.append(bytes([len(sent)]) * 60001)
            assert front.backend.send(parts(sent[-1]))
        state = front.backend.save_state()
        new = images(old.exec())
        address = UnixAddress(path, "-netdev")
        front = recorder(new.make(SocketBackend, address=address, server=True))
        front.backend.load_state(state)
        found = peer.recv(1 << 20)
        # A paused guest that is let go on after the update may be faster than the start.
        assert not front.backend.send(parts(b"not in between"))
        front.start()
        assert not front.backend.send(parts(b"not in between"))
        new.until(lambda: front.writable == 1)
        while len(found) < len(framed(*sent)):
            found += peer.recv(1 << 20)
        assert found == framed(*sent)
        assert front.backend.send(parts(b"next"))
        assert read_frames(peer, 1) == [b"next"]


def test_client_calls_and_calls_again(image, recorder):
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        address = TcpAddress("127.0.0.1", port, "-netdev")
        front = recorder(image.make(SocketBackend, address=address, reconnect_s=0.05))
        image.until(lambda: front.links == [True])
        assert front.backend.info["state"] == "connected"
        listener.accept()[0].close()
        front.start()
        image.until(lambda: front.links == [True, False, True])
        peer, _ = listener.accept()
        with peer:
            peer.sendall(framed(b"again"))
            image.until(lambda: front.frames == [b"again"])


def test_client_with_nobody_to_call(image, tmp_path):
    address = UnixAddress(str(tmp_path / "none"), "-netdev stream")
    with pytest.raises(ConfigError, match="-netdev stream: cannot connect to unix:"):
        image.make(SocketBackend, address=address)


def test_lost_connection_does_not_keep_an_update_from_happening(images, recorder, tmp_path):
    """A client that does not reconnect is tried once more, but the guest goes on without."""
    path = str(tmp_path / "s")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        old = images()
        front = recorder(old.make(SocketBackend, address=UnixAddress(path, "-netdev")))
        front.start()
        listener.accept()[0].close()
        old.until(lambda: front.links == [False])
    new = images(old.exec())
    front = recorder(new.make(SocketBackend, address=UnixAddress(path, "-netdev")))
    new.settle()
    assert not front.backend.link_up
    assert front.backend.info == {"client": f"unix:{path}", "state": "disconnected"}


def state_of(received=b"", unsent=b"", address=b""):
    sizes = struct.pack(">III", len(received), len(unsent), len(address))
    return sizes + received + unsent + address


@pytest.mark.parametrize(
    "state",
    [
        b"x",
        state_of(b"abc")[:-1],
        state_of(b"abc") + b"d",
        struct.pack(">III", 1 << 31, 0, 0),
        struct.pack(">III", 0, 4 + MAX_FRAME + 1, 0) + bytes(4 + MAX_FRAME + 1),
        state_of(address=b"1234"),
    ],
)
def test_impossible_state_is_refused(image, tmp_path, state):
    address = UnixAddress(str(tmp_path / "s"), "-netdev")
    backend = image.make(SocketBackend, address=address, server=True)
    with pytest.raises(VmStateError, match="netdev/n0"):
        backend.load_state(state)


def test_state_without_its_connection_is_nothing(image, recorder, tmp_path):
    """The rest of a frame must not stand before what another peer sends."""
    path = str(tmp_path / "s")
    backend = image.make(SocketBackend, address=UnixAddress(path, "-netdev"), server=True)
    backend.load_state(state_of(framed(b"old")[:5], b"old"))
    front = recorder(backend)
    front.start()
    with socket.socket(socket.AF_UNIX) as peer:
        peer.settimeout(10)
        peer.connect(path)
        peer.sendall(framed(b"new"))
        image.until(lambda: front.frames == [b"new"])
        assert backend.send(parts(b"answer"))
        assert read_frames(peer, 1) == [b"answer"]


def test_inherited_descriptor_of_another_kind(images, tmp_path):
    with open(tmp_path / "file", "w+b") as file:
        inherited = {("netdev/n0", 0): os.dup(file.fileno())}
    address = UnixAddress(str(tmp_path / "s"), "-netdev")
    with pytest.raises(VmStateError, match=r"netdev/n0: inherited descriptor .* is no socket"):
        images(inherited).make(SocketBackend, address=address)


@given(st.binary(min_size=1, max_size=40), st.lists(st.integers(0, 40)), st.integers(0, 45))
def test_skip(data, cuts, count):
    edges = [0, *sorted(min(cut, len(data)) for cut in cuts), len(data)]
    views = [memoryview(data)[a:b] for a, b in itertools.pairwise(edges)]
    assert b"".join(skip(views, count)) == data[count:]


def test_front_end_that_fails_costs_the_connection(image, pair):
    """Its frame is lost half-way: what follows need not be in step."""
    front, peer = pair

    def fail():
        raise RuntimeError("injected")

    front.handle_frames = fail
    image.loop.on_error = lambda _error, function: function.__self__.recover()
    peer.sendall(framed(b"a" * 60))
    image.until(lambda: front.links == [False])
    with pytest.raises(ConnectionResetError):
        peer.recv(1)
