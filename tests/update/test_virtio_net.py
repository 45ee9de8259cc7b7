"""The network device over live updates: no frame lost, repeated, reordered or torn."""

import socket
import subprocess

import pytest
from harness import needs
from harness.network import (
    GUEST_IP,
    PEER_IP,
    TAP,
    StreamPeer,
    echo_of,
    make_tap,
    namespace,
    numbered,
)

SMP = pytest.mark.parametrize("smp", [1, 2])


@SMP
@pytest.mark.parametrize("options", ["", "buffer=100"])
def test_echo_under_updates_is_complete(vm, tmp_path, smp, options):
    with StreamPeer(tmp_path) as peer:
        machine = vm(*peer.options, append=f"virtio-net {options}", smp=smp)
        machine.expect("ready")
        assert machine.status == "running"  # the VMM has started, too
        before = machine.footprint()
        frames = [numbered(n, 60 + n * 37 % 1455) for n in range(600)]
        for number in range(10):
            part = frames[60 * number : 60 * number + 60]
            # An update with a torn frame: so many bytes of its length or of itself have come.
            peer.send_frames(*part, cut=(1, 4, 30)[number % 3])
            machine.update()
            assert machine.footprint() == before
        peer.send_frames()
        assert peer.frames(len(frames)) == [echo_of(frame) for frame in frames]
        assert b"FAIL" not in machine.serial
        assert machine.stderr() == ""


@SMP
def test_flood_from_the_guest_under_updates_is_complete(vm, tmp_path, smp):
    """The socket is full at each update: a frame is half sent, others wait in the ring."""
    with StreamPeer(tmp_path) as peer:
        machine = vm(*peer.options, append="virtio-net mode=send size=60000", smp=smp)
        machine.expect("ready")
        found = []
        for _ in range(10):
            machine.update()
            peer.wait_full()
            peer.receive(100000, keep=True)  # to somewhere in a frame
            found += peer.arrived()
        found += peer.frames(2000)
        for number, frame in enumerate(found, 1):
            assert int.from_bytes(frame[14:22], "little") == number
            assert len(frame) == 60 + number * 7919 % (60000 - 59)
            assert frame[22:] == bytes([number & 0xFF]) * (len(frame) - 22)
        assert machine.stderr() == ""


def test_paused_guest_is_sent_frames_after_its_update(vm, tmp_path):
    with StreamPeer(tmp_path) as peer:
        machine = vm(*peer.options, append="virtio-net")
        machine.expect("ready")
        machine.hmp("stop")
        peer.send_frames(numbered(1), numbered(2))
        machine.update()
        assert machine.status == "paused"
        peer.send_frames(numbered(3))
        machine.hmp("cont")
        assert peer.frames(3) == [echo_of(numbered(n)) for n in (1, 2, 3)]


def test_failed_update_leaves_the_network_as_it_was(vm, tmp_path):
    """The new image takes everything over, fails, and hands it back; half a frame, too."""
    with StreamPeer(tmp_path) as peer:
        machine = vm(*peer.options, append="virtio-net")
        machine.expect("ready")
        peer.send_frames(numbered(1), numbered(2), cut=20)
        assert peer.frames(1) == [echo_of(numbered(1))]
        # Found after the exec only.
        broken = ["-chardev", "file,id=x,path=no/such/folder", "-incoming", "file:vm.state"]
        machine.set_update([*machine.argv, *broken])
        machine.hmp("migrate file:vm.state")
        assert "the guest is back in the image before" in machine.hmp("info migrate")
        peer.send_frames()
        assert peer.frames(1) == [echo_of(numbered(2))]


def test_other_network_is_refused_beforehand(vm, tmp_path):
    with StreamPeer(tmp_path) as peer:
        machine = vm(*peer.options, append="virtio-net")
        machine.expect("ready")
        other = [*machine.argv, "-incoming", "file:vm.state"]
        other[other.index("-netdev") + 1] = "tap,id=n0,ifname=tap0"
        machine.set_update(other)
        reply = machine.hmp("migrate file:vm.state")
        assert "-netdev is tap n0, this machine has stream n0" in reply
        peer.send_frames(numbered(1))
        assert peer.frames(1) == [echo_of(numbered(1))]


def exchange(sock, count):
    for number in range(count):
        sock.send(b"%d" % number * 100)
        assert sock.recv(2000) == b"%d" % number * 100


def test_tap_lives_through_updates(vm):
    """Frames that come while nobody reads wait in the interface."""
    with namespace():
        make_tap()
        machine = vm(*TAP, append="virtio-net offload")
        machine.expect("ready")
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            sock.settimeout(20)
            sock.connect((GUEST_IP, 7))
            exchange(sock, 10)
            before = machine.footprint()
            for number in range(5):
                machine.hmp("stop")
                sock.send(b"meanwhile %d" % number)
                machine.update()
                machine.hmp("cont")
                assert sock.recv(2000) == b"meanwhile %d" % number
                exchange(sock, 10)
                assert machine.footprint() == before
        assert machine.stderr() == ""


def test_passt_lives_through_updates_and_ends_with_the_vm(vm):
    needs.program("passt")
    with namespace():
        make_tap("up0")
        for command in (f"route add default via {GUEST_IP} dev up0", "link set lo up"):
            subprocess.run(["ip", *command.split()], check=True, capture_output=True)
        network = f"passt,id=n0,address={GUEST_IP},udp-ports=7007:7,ipv6=off"
        machine = vm(
            *("-netdev", network, "-device", "virtio-net-device,netdev=n0"), append="virtio-net"
        )
        machine.expect("ready")
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            sock.settimeout(20)
            sock.connect((PEER_IP, 7007))
            exchange(sock, 5)
            for _ in range(3):
                machine.update()
                exchange(sock, 5)
        machine.kill(9)
        machine.wait_exit()
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            # Its port is free as soon as it has ended.
            from harness.process import wait_until

            def free():
                try:
                    sock.bind(("0.0.0.0", 7007))
                except OSError:
                    return False
                return True

            wait_until(free, "the end of passt", 20)


@SMP
def test_evil_guest_with_a_network_does_not_keep_updates_away(vm, tmp_path, smp):
    with StreamPeer(tmp_path) as peer:
        rng = ("-device", "virtio-rng-device")
        machine = vm(*rng, *peer.options, append="virtio-attack step=8", smp=smp)
        for _ in range(6):
            machine.expect(r"attack \d+ broken \d+\r\n")
            peer.flood(numbered(1), numbered(2, 1500))
            machine.update()
        machine.expect(r"attack \d+ broken \d+\r\n")
        assert "state=connected" in machine.hmp("info network")
        assert b"FAIL" not in machine.serial
        assert machine.stderr() == ""
