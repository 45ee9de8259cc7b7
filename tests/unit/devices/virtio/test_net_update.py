"""A network device over resets, pauses and updates."""

import itertools
import os
import socket

import pytest
from harness.virtio_network import (
    DEADLINE_S,
    MAC,
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

from pyvmm.backends.net.base import HEADER
from pyvmm.backends.net.stream import StreamBackend
from pyvmm.devices.virtio import mmio, net
from pyvmm.devices.virtio.device import F_EVENT_IDX, F_VERSION_1
from pyvmm.errors import VmStateError

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
