"""A real tap, in a network namespace that the test makes; the peer is the kernel."""

import fcntl
import os
import socket
import struct
import subprocess

import pytest

from pyvmm.backends.net import tap
from pyvmm.backends.net.base import HEADER, MAX_FRAME
from pyvmm.backends.net.tap import TapBackend
from pyvmm.errors import ConfigError, VmStateError

ETH_P_TEST = 0x88B5  # IEEE 802.1: for local experiments
MAC = bytes.fromhex("525400123456")
NO_HEADER = bytes(HEADER)


def frame(text, size=60):
    return (b"\xff" * 6 + MAC + struct.pack(">H", ETH_P_TEST) + text).ljust(size, b"\0")


@pytest.fixture
def packets(namespace, image, recorder):
    """A tap's recorder, and a socket that sends and receives on the host's side of it."""
    front = recorder(image.make(TapBackend, ifname="t0"))
    run("ip", "link", "set", "t0", "up")
    run("ip", "link", "set", "t0", "addrgenmode", "none")
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_TEST)) as host:
        host.settimeout(10)
        host.bind(("t0", ETH_P_TEST))
        front.start()
        yield front, host


def run(*command):
    subprocess.run(command, check=True, capture_output=True)


def ours(front):
    return [data for data in front.frames if data[12:14] == struct.pack(">H", ETH_P_TEST)]


def test_frames_go_both_ways(image, packets):
    front, host = packets
    assert front.backend.send([memoryview(NO_HEADER + frame(b"to the host"))])
    assert host.recv(2000) == frame(b"to the host")
    host.send(frame(b"to the guest", 1514))
    image.until(lambda: ours(front))
    assert ours(front) == [frame(b"to the guest", 1514)]
    assert front.backend.info == {"ifname": "t0", "script": "no", "downscript": "no"}


def test_scattered_frames_are_put_together(packets):
    front, host = packets
    whole = NO_HEADER + frame(b"scattered", 1400)
    parts = [memoryview(whole)[a : a + 7] for a in range(0, len(whole), 7)]
    assert front.backend.send(parts)
    assert host.recv(2000) == frame(b"scattered", 1400)


@pytest.mark.parametrize(
    "whole",
    [
        b"",
        NO_HEADER,
        NO_HEADER + b"short",
        b"\x01\x00" + struct.pack("<HHHH", 0, 0, 0xFFFF, 0xFFFF) + b"\0\0" + frame(b"csum beyond"),
        b"\x00\xff" + bytes(10) + frame(b"unknown gso type"),
        NO_HEADER + bytes(MAX_FRAME),
    ],
)
def test_impossible_frames_are_dropped(packets, whole):
    front, host = packets
    assert front.backend.send([memoryview(whole)])
    assert front.backend.send([memoryview(NO_HEADER + frame(b"next"))])
    found = host.recv(100000)
    while found != frame(b"next"):
        assert found == whole[HEADER:]
        found = host.recv(100000)


def test_offloads_of_the_guest_reach_the_kernel(image, packets):
    front, _host = packets
    run("ip", "addr", "add", "10.9.0.1/24", "dev", "t0")
    run("ip", "neigh", "add", "10.9.0.2", "lladdr", "52:54:00:12:34:56", "dev", "t0")

    def header_of(text):
        image.until(lambda: any(text in data for data in front.frames))
        index = next(n for n, data in enumerate(front.frames) if text in data)
        return front.headers[index]

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        front.backend.set_offloads(csum=True, tso4=False, tso6=False, ecn=False)
        sock.sendto(b"checksum left to the guest", ("10.9.0.2", 9))
        # NEEDS_CSUM: of UDP, behind IPv4.
        assert header_of(b"left to") == struct.pack("<BBHHHHH", 1, 0, 0, 0, 34, 6, 0)
        front.backend.set_offloads(csum=False, tso4=True, tso6=True, ecn=True)
        sock.sendto(b"checksum made", ("10.9.0.2", 9))
        assert header_of(b"made") == NO_HEADER
    front.backend.set_offloads(csum=True, tso4=True, tso6=True, ecn=True)


def test_without_room_frames_wait_in_the_kernel(image, packets):
    front, host = packets
    front.room = 1
    for text in (b"one", b"two", b"three"):
        host.send(frame(text))
    image.until(lambda: front.frames)
    image.settle()
    front.room = 100
    front.backend.watch(True)
    front.handle_frames()
    image.until(lambda: len(ours(front)) == 3)
    assert ours(front) == [frame(text) for text in (b"one", b"two", b"three")]


def test_an_exec_loses_no_frame(images, recorder, packets, image):
    front, host = packets
    front.room = 0
    host.send(frame(b"held"))
    image.until(lambda: front.backend._held is not None)
    host.send(frame(b"in the kernel"))
    state = front.backend.save_state()
    new = images(image.exec())
    backend = new.make(TapBackend, ifname="t0")
    backend.load_state(state)
    front = recorder(backend)
    new.settle()
    assert front.frames == []
    front.start()
    new.until(lambda: len(ours(front)) == 2)
    assert ours(front) == [frame(b"held"), frame(b"in the kernel")]
    assert backend.send([memoryview(NO_HEADER + frame(b"back"))])
    assert host.recv(2000) == frame(b"back")


def test_another_interface_is_no_update(images, packets, image):
    _front, _host = packets
    inherited = image.exec()
    with pytest.raises(VmStateError, match="netdev/n0: it is t0, not ifname=t1"):
        images(inherited).make(TapBackend, ifname="t1")
    # It stays open: the image before goes on with it.
    os.fstat(inherited[("netdev/n0", 0)])


def test_name_whose_number_the_kernel_chooses_lives_through_an_exec(images, namespace):
    old = images()
    name = old.make(TapBackend, ifname="vm%d").ifname
    assert name == "vm0"
    assert images(old.exec()).make(TapBackend, ifname="vm%d").ifname == name


def test_deleted_interface_takes_the_link_down(images, recorder, packets, image):
    front, _host = packets
    run("ip", "link", "del", "t0")
    image.until(lambda: front.links)
    assert front.links == [False]
    assert front.backend.send([memoryview(NO_HEADER + frame(b"to nobody"))])
    front.backend.set_offloads(csum=True, tso4=False, tso6=False, ecn=False)
    new = images(image.exec())
    assert recorder(new.make(TapBackend, ifname="t0")).backend.link_up  # made anew


def test_deleted_interface_does_not_keep_an_update_from_happening(images, capfd, namespace):
    new = images({})
    backend = new.make(TapBackend, ifname="much/too/wrong")
    assert not backend.link_up
    assert capfd.readouterr().err.startswith("pyvmm: -netdev tap: ifname='much/too/wrong': ")
    assert backend.peek() is None
    assert backend.send([memoryview(NO_HEADER + frame(b"to nobody"))])

    # The guest may have negotiated them: its state must be taken.
    assert backend.has_offloads


def test_number_of_a_descriptor_means_nothing_after_an_exec(images, capfd, namespace):
    other = images().make(TapBackend, ifname="t1")
    new = images({})
    # Deleted before the update; the number is that of another's by now.
    backend = new.make(TapBackend, fd=other.fd)
    assert not backend.link_up
    assert backend.fd == -1
    assert f"fd={other.fd}: the interface was deleted" in capfd.readouterr().err


@pytest.mark.parametrize("flags", [0, tap.IFF_VNET_HDR])
def test_descriptor_that_the_starter_opened(image, recorder, namespace, flags):
    """With or without offloads; headers are the back end's affair."""
    fd = os.open(tap.TUN_DEVICE, os.O_RDWR)
    request = struct.pack("16sH22x", b"t3", tap.IFF_TAP | tap.IFF_NO_PI | flags)
    fcntl.ioctl(fd, tap.TUNSETIFF, request)
    front = recorder(image.make(TapBackend, fd=fd))
    assert front.backend.info == {"ifname": "t3", "fd": fd}
    assert front.backend.has_offloads == bool(flags)
    assert not os.get_inheritable(fd)
    run("ip", "link", "set", "t3", "up")
    front.start()
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_TEST)) as host:
        host.settimeout(10)
        host.bind(("t3", ETH_P_TEST))
        assert front.backend.send([memoryview(NO_HEADER), memoryview(frame(b"out"))])
        assert host.recv(2000) == frame(b"out")
        host.send(frame(b"in"))
        image.until(lambda: ours(front) == [frame(b"in")])
        assert front.headers[-1] == NO_HEADER


def test_descriptor_of_something_else(image, tmp_path):
    with open(tmp_path / "file", "wb") as file, pytest.raises(ConfigError, match="give a tap's"):
        image.make(TapBackend, fd=file.fileno())
    with open("/dev/null", "wb") as file, pytest.raises(ConfigError, match="is of no tap"):
        image.make(TapBackend, fd=file.fileno())
    with pytest.raises(ConfigError, match="fd=999: the descriptor is of no tap"):
        image.make(TapBackend, fd=999)


def test_interface_that_another_vm_has(images, namespace):
    first = images()
    first.make(TapBackend, ifname="t0")
    with pytest.raises(ConfigError, match=r"ifname='t0': .*busy; as root: ip tuntap add t0"):
        images().make(TapBackend, ifname="t0")


@pytest.mark.parametrize("size", [1, HEADER - 1, HEADER + MAX_FRAME + 1])
def test_impossible_state_is_refused(image, namespace, size):
    with pytest.raises(VmStateError, match=f"netdev/n0: a frame of {size} bytes is not possible"):
        image.make(TapBackend).load_state(bytes(size))
