"""The network device, driven by the shipped driver side over real memory and real sockets."""

import itertools
import os
import socket
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyvmm.backends.net.base import HEADER, MAX_FRAME
from pyvmm.backends.net.stream import StreamBackend
from pyvmm.core.eventloop import EventLoop
from pyvmm.cpr.fdstore import FdStore
from pyvmm.devices.virtio import mmio, net
from pyvmm.devices.virtio.device import F_EVENT_IDX, F_VERSION_1
from pyvmm.devices.virtio.net import RX, TX, VirtioNet
from pyvmm.errors import VmStateError
from pyvmm.testing.virtio_driver import VirtioDriver

MAC = bytes.fromhex("525400123456")
NO_HEADER = bytes(HEADER)
ONE_BUFFER = bytes(10) + b"\1\0"
DEADLINE_S = 10


def framed(*frames):
    return b"".join(struct.pack(">I", len(frame)) + frame for frame in frames)


class Network:
    """A device on a socket, its driver, and who is at the other end."""

    def __init__(self, **options):
        self.loop = EventLoop()
        self.options = options
        ours, self.peer = socket.socketpair()
        self.peer.settimeout(DEADLINE_S)
        self.fd = ours.detach()
        self.driver = VirtioDriver(self._device())
        self._received = b""

    def _device(self):
        self.backend = StreamBackend("n0", self.loop, FdStore())
        self.backend.open_stream(os.dup(self.fd))
        return VirtioNet(self.loop, self.backend, MAC, **self.options)

    def update(self):
        """A live update: the driver goes on with another device and back end."""
        old = self.backend
        self.driver.transport.drain()
        state = old.save_state()
        device = self._device()
        self.backend.load_state(state)
        self.driver.update(device)
        old.close()

    def start(self, without=0, **options):
        """Bring the driver up, with all features but those."""
        self.driver.start(self.driver.offered() & ~without, **options)
        self.rx, self.tx = self.driver.queues
        # The first look at a queue brings an interrupt, whatever is there.
        self.rx.kick()
        self.tx.kick()
        self.run()
        self.driver.write(mmio.INTERRUPT_ACK, mmio.INT_USED)
        self.driver.interrupts()

    def run(self, timeout_s=0):
        """Serve the loop for as long as there is something to do."""
        for _ in range(10):
            self.loop.run_once(timeout_s)
            timeout_s = 0

    def send(self, *frames, kick=True):
        """From the guest."""
        for frame in frames:
            self.tx.add([NO_HEADER + frame])
        if kick:
            self.tx.kick()
            self.run()

    def from_guest(self, count):
        """The frames that the peer gets."""
        found = []
        while len(found) < count:
            if len(self._received) >= 4:
                end = 4 + int.from_bytes(self._received[:4], "big")
                if len(self._received) >= end:
                    found.append(self._received[4:end])
                    self._received = self._received[end:]
                    continue
            self.run()
            self._received += self.peer.recv(1 << 20)
        return found

    def silent(self):
        """Whether the peer got nothing."""
        self.run()
        self.peer.setblocking(False)
        try:
            return not self.peer.recv(1)
        except BlockingIOError:
            return True
        finally:
            self.peer.settimeout(DEADLINE_S)

    def close(self):
        self.driver.close()
        self.backend.close()
        self.peer.close()
        os.close(self.fd)
        self.loop.close()


@pytest.fixture
def network():
    made = []

    def make(**options):
        made.append(Network(**options))
        return made[-1]

    yield make
    for each in made:
        each.close()


def frame(text, size=60):
    return text.ljust(size, b".")


def received(queue):
    """What the guest finds in the buffers that came back."""
    return [request.data(written) for request, written in queue.reap()]


# What the driver is told.


def test_configuration(network):
    driver = network(mtu=1400).driver
    assert driver.read(mmio.DEVICE_ID) == 1
    assert driver.config(0, 12) == MAC + struct.pack("<HHH", 1, 0, 1400)
    assert driver.offered() & net.F_MTU
    assert not driver.offered() & net.OFFLOADS  # a stream has none
    assert not network().driver.offered() & net.F_MTU


@pytest.mark.parametrize(
    ("left_out", "gone"),
    [
        (net.F_GUEST_CSUM, net.F_GUEST_TSO4 | net.F_GUEST_TSO6 | net.F_GUEST_ECN),
        (net.F_CSUM, net.F_HOST_TSO4 | net.F_HOST_TSO6 | net.F_HOST_ECN),
        (net.F_GUEST_TSO4 | net.F_GUEST_TSO6, net.F_GUEST_ECN),
        (net.F_HOST_TSO4, 0),
    ],
)
def test_no_feature_is_offered_without_what_it_needs(network, monkeypatch, left_out, gone):
    monkeypatch.setattr(StreamBackend, "has_offloads", True)
    everything = sum(net.FLAGS.values())
    offered = network(features=everything & ~left_out).driver.offered()
    assert offered & everything == everything & ~left_out & ~gone


def test_link_goes_down_with_the_peer(network):
    n = network()
    n.start()
    n.rx.add([], [2000])
    n.rx.kick()
    n.run()
    generation = n.driver.read(mmio.CONFIG_GENERATION)
    n.peer.close()
    n.run()
    assert n.driver.config(6, 2) == b"\0\0"
    assert n.driver.read(mmio.INTERRUPT_STATUS) == mmio.INT_CONFIG
    assert n.driver.interrupts() == 1
    assert n.driver.read(mmio.CONFIG_GENERATION) != generation
    n.send(frame(b"to nobody"))
    assert len(n.tx.reap()) == 1


# Sending.


@pytest.mark.parametrize("without", [0, F_EVENT_IDX])
def test_frames_are_sent(network, without):
    n = network()
    n.start(without)
    n.send(frame(b"one"), frame(b"two", 1514), frame(b"big", 60000))
    assert n.from_guest(3) == [frame(b"one"), frame(b"two", 1514), frame(b"big", 60000)]
    assert [written for _request, written in n.tx.reap()] == [0, 0, 0]
    assert n.driver.interrupts() == 1
    n.send(frame(b"more"))
    assert n.from_guest(1) == [frame(b"more")]


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 99), max_size=6), st.booleans())
def test_how_a_frame_is_cut_makes_no_difference(cuts, indirect):
    n = Network()
    try:
        n.start()
        whole = NO_HEADER + frame(b"cut", 100)
        edges = sorted({0, *cuts, len(whole)})
        n.tx.add([whole[a:b] for a, b in itertools.pairwise(edges)], indirect=indirect)
        n.tx.kick()
        assert n.from_guest(1) == [frame(b"cut", 100)]
    finally:
        n.close()


def test_more_parts_than_a_write_takes(network):
    n = network()
    n.start()
    whole = NO_HEADER + frame(b"parts", 1012)
    n.tx.add([bytes([byte]) for byte in whole], indirect=True)
    n.tx.kick()
    assert n.from_guest(1) == [frame(b"parts", 1012)]


@pytest.mark.parametrize("size", [0, 13, MAX_FRAME + 1])
def test_what_is_no_frame_is_dropped(network, size):
    n = network()
    n.start()
    n.send(b"x" * size)
    assert n.silent()
    n.send(frame(b"next"))
    assert n.from_guest(1) == [frame(b"next")]
    assert len(n.tx.reap()) == 2


def test_frame_without_a_header_is_a_broken_driver(network):
    n = network()
    n.start()
    n.tx.add([b"too short"])
    n.tx.kick()
    n.run()
    assert n.driver.status & mmio.S_NEEDS_RESET
    n.start()
    n.send(frame(b"after the reset"))
    assert n.from_guest(1) == [frame(b"after the reset")]


def test_full_socket_keeps_frames_in_the_guest(network):
    """Nothing is lost or torn, and nothing piles up in the VMM."""
    n = network()
    n.start()
    sent = [frame(b"%d" % number, 30000) for number in range(60)]
    n.send(*sent)
    assert len(n.tx.reap()) < len(sent)
    assert len(n.backend._unsent) < 30016
    assert n.from_guest(len(sent)) == sent
    n.run()
    n.tx.reap()
    assert len(n.tx.free) == n.tx.size


@pytest.mark.parametrize(("size", "turn"), [(16, 16), (256, 64)])
def test_one_kick_is_worth_one_turn(network, size, turn):
    """A driver that goes on adding while it is served does not keep the loop for itself."""
    n = network(tx_queue_size=size)
    n.start()
    added = 0
    send = n.backend.send

    def endless(parts):
        nonlocal added
        added += 1
        n.tx.reap()
        n.tx.add([NO_HEADER + frame(b"again")])
        return send(parts)

    n.backend.send = endless
    n.send(frame(b"first"), kick=False)
    n.tx.kick()
    n.loop.run_once(1)
    assert added == turn
    n.loop.run_once(1)  # it goes on by itself
    assert added == 2 * turn
    n.backend.send = send


# Receiving.


@pytest.mark.parametrize("without", [0, F_EVENT_IDX, net.F_MRG_RXBUF])
def test_frames_are_received(network, without):
    n = network()
    n.start(without)
    for _ in range(3):
        n.rx.add([], [12, 1600])
    n.rx.kick()
    n.run()
    n.peer.sendall(framed(frame(b"one"), frame(b"two", 1514)))
    n.run(1)
    assert received(n.rx) == [ONE_BUFFER + frame(b"one"), ONE_BUFFER + frame(b"two", 1514)]
    assert n.driver.interrupts() == 1
    assert n.driver.read(mmio.INTERRUPT_STATUS) == mmio.INT_USED


def test_frames_that_came_before_the_buffers(network):
    n = network()
    n.peer.sendall(framed(frame(b"early"), frame(b"bird")))
    n.run()
    n.start()
    n.run()
    assert received(n.rx) == []
    n.rx.add([], [2000])
    n.rx.kick()
    n.run()
    assert received(n.rx) == [ONE_BUFFER + frame(b"early")]
    n.rx.add([], [2000])
    n.rx.kick()
    n.run()
    assert received(n.rx) == [ONE_BUFFER + frame(b"bird")]


def test_buffers_that_were_there_before_the_driver_was_ready(network):
    n = network()
    n.peer.sendall(framed(frame(b"early")))
    assert n.driver.negotiate()
    queues = [n.driver.set_up_queue(RX), n.driver.set_up_queue(TX)]
    queues[RX].add([], [2000])
    n.driver.set_driver_ok()
    n.run()
    assert received(queues[RX]) == [ONE_BUFFER + frame(b"early")]


def test_more_frames_than_are_taken_at_once(network):
    n = network()
    n.start()
    for _ in range(200):
        n.rx.add([], [100])
    n.rx.kick()
    frames = [frame(b"%d" % number) for number in range(200)]
    n.peer.sendall(framed(*frames))  # one read takes them all
    n.run(1)
    assert received(n.rx) == [ONE_BUFFER + each for each in frames]


@pytest.mark.parametrize("queue", [RX, TX])
def test_disabled_queue_does_not_keep_the_loop_busy(network, monkeypatch, queue):
    n = network()
    n.start()
    n.driver.write(mmio.QUEUE_SEL, queue)
    n.driver.write(mmio.QUEUE_READY, 0)
    flood(n)
    assert quiet(n, monkeypatch)


def test_large_frame_takes_several_buffers(network):
    n = network()
    n.start()
    for _ in range(6):
        n.rx.add([], [1000])
    n.rx.kick()
    n.peer.sendall(framed(frame(b"large", 3500), frame(b"small")))
    n.run(1)
    parts = received(n.rx)
    assert [len(part) for part in parts] == [1000, 1000, 1000, 512, 72]
    assert parts[0][:HEADER] == bytes(10) + b"\4\0"
    assert b"".join(parts[:4])[HEADER:] == frame(b"large", 3500)
    assert parts[4] == ONE_BUFFER + frame(b"small")


def test_buffers_of_one_frame_appear_together(network):
    """A driver on another CPU may look at the used index at any time."""
    n = network()
    n.start()
    seen = set()
    write = n.driver.memory.write

    def watch(gpa, data):
        seen.add(n.driver.memory.read_u16(n.rx.used + 2))
        write(gpa, data)

    for _ in range(3):
        n.rx.add([], [100])
    n.rx.kick()
    n.peer.sendall(framed(frame(b"x", 250)))
    type(n.driver.memory).write, original = (lambda _self, *a: watch(*a)), write.__func__
    write = original.__get__(n.driver.memory)
    try:
        n.run(1)
    finally:
        type(n.driver.memory).write = original
    assert seen == {0}
    assert len(n.rx.reap()) == 3


def test_frame_waits_until_it_has_all_its_buffers(network):
    """The first ones are kept; a driver that looks for kicks it owes is asked for them."""
    n = network()
    n.start()
    n.peer.sendall(framed(frame(b"waits", 2500)))
    for size in (1000, 1000):
        since = n.rx.avail_idx
        n.rx.add([], [size])
        assert n.rx.wants_kick(since)
        n.rx.kick()
        n.run()
    assert received(n.rx) == []
    assert n.driver.interrupts() == 0
    since = n.rx.avail_idx
    n.rx.add([], [1000])
    assert n.rx.wants_kick(since)
    n.rx.kick()
    n.run()
    assert b"".join(received(n.rx))[HEADER:] == frame(b"waits", 2500)


def test_frame_that_the_whole_queue_has_no_room_for_is_dropped(network):
    n = network(rx_queue_size=16)
    n.start()
    for _ in range(16):
        n.rx.add([], [100])
    n.rx.kick()
    n.peer.sendall(framed(frame(b"too large", 1600), frame(b"next", 150)))
    n.run(1)
    parts = received(n.rx)
    assert b"".join(parts) == bytes(10) + b"\2\0" + frame(b"next", 150)
    # The others are still the device's, and used in their order.
    n.peer.sendall(framed(*[frame(b"%d" % number) for number in range(14)]))
    n.run(1)
    assert received(n.rx) == [ONE_BUFFER + frame(b"%d" % number) for number in range(14)]


def test_frame_that_one_buffer_has_no_room_for_is_dropped_without_mrg_rxbuf(network):
    n = network()
    n.start(net.F_MRG_RXBUF)
    n.rx.add([], [500])
    n.rx.add([], [500])
    n.rx.kick()
    n.peer.sendall(framed(frame(b"too large", 600), frame(b"next"), frame(b"last", 488)))
    n.run(1)
    assert received(n.rx) == [ONE_BUFFER + frame(b"next"), ONE_BUFFER + frame(b"last", 488)]


def test_runts_are_dropped(network):
    n = network()
    n.start()
    n.rx.add([], [500])
    n.rx.kick()
    n.peer.sendall(framed(b"", b"x" * 13, frame(b"fit")))
    n.run(1)
    assert received(n.rx) == [ONE_BUFFER + frame(b"fit")]


def test_buffer_for_reading_is_a_broken_driver(network, monkeypatch):
    n = network()
    n.start()
    n.rx.add([b"x" * 100])
    n.rx.kick()
    n.peer.sendall(framed(frame(b"frame")))
    n.run(1)
    assert n.driver.status & mmio.S_NEEDS_RESET
    n.peer.sendall(framed(frame(b"another")))
    n.run()
    assert quiet(n, monkeypatch)  # the frame that waits does not keep the loop busy
    n.start()
    n.rx.add([], [500])
    n.rx.kick()
    n.run()
    assert received(n.rx) == [ONE_BUFFER + frame(b"frame")]


def test_a_flood_does_not_keep_the_loop_busy_without_buffers(network, monkeypatch):
    n = network()
    n.start()
    flood(n)
    assert quiet(n, monkeypatch)


def flood(n):
    """More frames than the back end and the socket hold."""
    n.peer.setblocking(False)
    for _ in range(5):
        try:
            while True:
                n.peer.send(framed(frame(b"flood", 1000)))
        except BlockingIOError:
            n.run()
    n.peer.settimeout(DEADLINE_S)


def quiet(n, monkeypatch):
    """Whether the device is left alone by the frames that wait in the host."""
    calls = []
    handle = n.driver.device.handle_frames
    with monkeypatch.context() as patch:
        patch.setattr(n.driver.device, "handle_frames", lambda: (calls.append(1), handle()))
        n.run()
    return not calls


# Reset, pause, update.


def test_reset_gives_up_what_was_parked(network):
    n = network()
    n.start()
    n.peer.sendall(framed(frame(b"waits", 2500)))
    n.rx.add([], [1000])
    n.rx.kick()
    n.run()
    n.start()
    for _ in range(3):
        n.rx.add([], [1000])
    n.rx.kick()
    n.run()
    assert b"".join(received(n.rx))[HEADER:] == frame(b"waits", 2500)


def test_update_while_a_frame_waits_for_buffers(network):
    n = network()
    n.start()
    n.peer.sendall(framed(frame(b"waits", 2500)))
    n.rx.add([], [1000])
    n.rx.kick()
    n.run()
    n.update()
    n.run()
    for _ in range(2):
        n.rx.add([], [1000])
    n.rx.kick()
    n.run()
    parts = received(n.rx)
    assert [len(part) for part in parts] == [1000, 1000, 512]
    assert b"".join(parts)[HEADER:] == frame(b"waits", 2500)


def test_a_flood_while_the_guest_stands_still(network, monkeypatch):
    n = network()
    n.start()
    n.driver.transport.drain()
    flood(n)
    assert quiet(n, monkeypatch)
    n.rx.add([], [2000])
    n.driver.transport.start()
    n.run()
    assert received(n.rx) == [ONE_BUFFER + frame(b"flood", 1000)]


def test_nothing_moves_while_the_guest_stands_still(network):
    n = network()
    n.start()
    n.rx.add([], [2000])
    n.rx.kick()
    n.run()
    n.driver.transport.drain()
    n.peer.sendall(framed(frame(b"waits")))
    n.send(frame(b"sent while it stands"))
    assert n.silent()
    assert received(n.rx) == []
    n.driver.transport.start()
    n.run()
    assert received(n.rx) == [ONE_BUFFER + frame(b"waits")]
    assert n.from_guest(1) == [frame(b"sent while it stands")]


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_updates_lose_repeat_and_tear_nothing(data):
    """Frames both ways with an update at any point: before and after kicks, with frames half
    received, half sent, and waiting for buffers."""
    n = Network()
    numbers = itertools.count()
    try:
        n.start(data.draw(st.sampled_from([0, F_EVENT_IDX, net.F_MRG_RXBUF])))
        to_host, to_guest, got, stream = [], [], [], b""
        for step in data.draw(st.lists(st.sampled_from("stbbupPr"), max_size=30)):
            new = frame(b"%d" % next(numbers), data.draw(st.sampled_from([60, 1500])))
            if step == "s":
                to_host.append(new)
                n.send(new, kick=data.draw(st.booleans()))
            elif step == "t":
                to_guest.append(new)
                stream += framed(new)
            elif step == "b":
                if n.driver.features & net.F_MRG_RXBUF:
                    n.rx.add([], [data.draw(st.sampled_from([200, 2000]))])
                else:
                    n.rx.add([], [2000])
                n.rx.kick()
            elif step == "u":
                n.update()
            elif step in "pP":
                count = data.draw(st.integers(0, len(stream))) if step == "p" else len(stream)
                n.peer.sendall(stream[:count])
                stream = stream[count:]
            else:
                n.run()
                got += received(n.rx)
                n.tx.reap()
        n.peer.sendall(stream)
        n.tx.kick()
        # Not that many lie there already.
        for _ in range(9 * len(to_guest)):
            n.rx.add([], [2000])
        n.rx.kick()
        n.run()
        got += received(n.rx)
        assert unpack(got) == to_guest
        assert n.from_guest(len(to_host)) == to_host
        assert n.silent()
    finally:
        n.close()


def unpack(buffers):
    """Frames from the buffers that they are in."""
    frames, buffers = [], list(buffers)
    while buffers:
        count = int.from_bytes(buffers[0][10:12], "little")
        frames.append(b"".join(buffers[:count])[HEADER:])
        del buffers[:count]
    return frames


def test_address_that_the_guest_knows_stays(network):
    n = network()
    n.start()
    mac = bytes.fromhex("525400123499")
    state = n.driver.encode().replace(MAC, mac)
    n.driver.decode(state)
    assert n.driver.config(0, 6) == mac


def test_link_that_comes_back_with_an_update_is_told(network):
    """As with passt, which is started anew."""
    n = network()
    n.start()
    n.peer.close()
    n.rx.add([], [2000])
    n.rx.kick()
    n.run()
    assert n.driver.config(6, 2) == b"\0\0"
    n.driver.write(mmio.INTERRUPT_ACK, mmio.INT_CONFIG)
    n.driver.interrupts()
    generation = n.driver.read(mmio.CONFIG_GENERATION)
    os.close(n.fd)
    ours, n.peer = socket.socketpair()
    n.peer.settimeout(DEADLINE_S)
    n.fd = ours.detach()
    n.update()
    n.run()
    assert n.driver.config(6, 2) == b"\1\0"
    assert n.driver.read(mmio.INTERRUPT_STATUS) & mmio.INT_CONFIG
    assert n.driver.interrupts()
    assert n.driver.read(mmio.CONFIG_GENERATION) != generation
    n.peer.sendall(framed(frame(b"back again")))
    n.run()
    assert received(n.rx) == [ONE_BUFFER + frame(b"back again")]


def test_link_that_did_not_change_is_not_told(network):
    n = network()
    n.start()
    generation = n.driver.read(mmio.CONFIG_GENERATION)
    n.update()
    n.run()
    assert n.driver.read(mmio.CONFIG_GENERATION) == generation
    assert not n.driver.read(mmio.INTERRUPT_STATUS) & mmio.INT_CONFIG


def test_link_state_that_does_not_exist_is_refused(network):
    n = network()
    n.start()
    n.driver.device.status = 2
    state = n.driver.encode()
    with pytest.raises(VmStateError, match="status 0x2 does not exist"):
        n.driver.decode(state)


def test_state_of_a_device_with_other_features_is_refused(network, monkeypatch):
    monkeypatch.setattr(StreamBackend, "has_offloads", True)
    n = network()
    n.start()
    state = n.driver.encode()
    monkeypatch.setattr(StreamBackend, "has_offloads", False)
    other = network()
    with pytest.raises(VmStateError, match=r"features .* are not those of this device"):
        other.driver.decode(state)


def test_driver_without_version_1_is_refused(network):
    assert not network().driver.negotiate(net.F_MAC & ~F_VERSION_1)
