"""The network device, driven by the shipped driver side over real memory and real sockets."""

import itertools
import struct

import pytest
from harness.virtio_network import (
    MAC,
    NO_HEADER,
    ONE_BUFFER,
    Network,
    flood,
    frame,
    framed,
    quiet,
    received,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from pyvmm.backends.net.base import HEADER, MAX_FRAME
from pyvmm.backends.net.stream import StreamBackend
from pyvmm.devices.virtio import mmio, net, transport
from pyvmm.devices.virtio.device import F_EVENT_IDX
from pyvmm.devices.virtio.net import RX, TX

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
    everything = net.FEATURES
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
    assert n.driver.status & transport.S_NEEDS_RESET
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

    # The header does not fit the first one: nothing for the native code.
    for size in (8, 100, 100, 100):
        n.rx.add([], [size])
    n.rx.kick()
    n.peer.sendall(framed(frame(b"x", 250)))
    type(n.driver.memory).write, original = (lambda _self, *a: watch(*a)), write.__func__
    write = original.__get__(n.driver.memory)
    try:
        n.run(1)
    finally:
        type(n.driver.memory).write = original
    assert seen == {0}
    assert len(n.rx.reap()) == 4


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


@pytest.mark.parametrize(
    ("without", "header", "arrives"),
    [
        (0, b"\1\x84", b"\1\x84"),
        (net.F_GUEST_ECN, b"\1\x84", None),
        (net.F_GUEST_ECN, b"\1\4", b"\1\4"),
        (net.F_GUEST_TSO6 | net.F_GUEST_ECN, b"\1\4", None),
        (net.F_GUEST_TSO6, b"\1\1", b"\1\1"),
        (0, b"\1\3", None),  # UDP, which nobody accepts
        (net.OFFLOADS, b"\1\1", None),
        (net.OFFLOADS, b"\1\0", None),
        (net.OFFLOADS, b"\2\0", b"\0\0"),
    ],
)
def test_frame_that_waited_for_another_driver_suits_this_one(
    network, monkeypatch, without, header, arrives
):
    """The guest was reset: what waits in the host was made for a driver that is gone."""
    monkeypatch.setattr(StreamBackend, "has_offloads", True)
    n = network()
    n.start(without)
    waiting = [header + bytes(10) + frame(b"old"), NO_HEADER + frame(b"new")]
    monkeypatch.setattr(
        n.backend, "peek", lambda: memoryview(bytearray(waiting[0])) if waiting else None
    )
    monkeypatch.setattr(n.backend, "consume", lambda: waiting.pop(0))
    for _ in range(2):
        n.rx.add([], [500])
    n.rx.kick()
    n.run()
    parts = [part[:2] + part[HEADER:] for part in received(n.rx)]
    old = [] if arrives is None else [arrives + frame(b"old")]
    assert parts == [*old, b"\0\0" + frame(b"new")]


def test_buffer_for_reading_is_a_broken_driver(network, monkeypatch):
    n = network()
    n.start()
    n.rx.add([b"x" * 100])
    n.rx.kick()
    n.peer.sendall(framed(frame(b"frame")))
    n.run(1)
    assert n.driver.status & transport.S_NEEDS_RESET
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
