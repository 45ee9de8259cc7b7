"""The network device as the tiny guest's driver finds it on the real /dev/kvm: no frame is lost,
repeated, reordered or torn, whatever guest and host live through."""

import contextlib
import re
import signal
import socket
import subprocess

import pytest
from harness import lives, needs, run_cli, wait_until
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


def passt():
    """Options for a network whose gateway passt plays. The guest has the address that it always
    has, and the host, this namespace, another."""
    needs.program("passt")
    make_tap("up0")
    for command in (f"route add default via {GUEST_IP} dev up0", "link set lo up"):
        subprocess.run(["ip", *command.split()], check=True, capture_output=True)
    network = f"passt,id=n0,address={GUEST_IP},udp-ports=7007:7,ipv6=off"
    return "-netdev", network, "-device", "virtio-net-device,netdev=n0"


@contextlib.contextmanager
def udp(address, port):
    """A socket whose peer is the guest."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.settimeout(20)
        sock.connect((address, port))
        yield sock


def exchange(sock, *messages):
    """Each is sent back by the guest."""
    for message in messages:
        sock.send(message)
        assert sock.recv(2000) == message


@pytest.mark.parametrize("smp", [1, 2])
@pytest.mark.parametrize("options", ["", "nomerge", "buffer=100"])
@lives.CONNECTED
def test_frames_come_back(any_vm, tmp_path, options, smp):
    with StreamPeer(tmp_path) as peer:
        machine = any_vm(*peer.options, append=f"virtio-net step=300 passes=2 {options}", smp=smp)
        machine.expect("virtio-net ready 52:54:0:12:34:56")
        before, _ = machine.footprint()
        frames = [numbered(n, 60 + n * 37 % 1455) for n in range(600)]
        # Each last one is torn: so many bytes of its length or of itself have come.
        for number, cut in enumerate((1, 4, 30)):
            peer.send_frames(*frames[150 * number : 150 * number + 150], cut=cut)
            machine.live()
        assert machine.footprint()[0] == before
        peer.send_frames(*frames[450:])
        assert peer.frames(600) == [echo_of(frame) for frame in frames]
        assert machine.wait_exit() == 0
        assert b"FAIL" not in machine.serial
        assert b"virtio-net PASS" in machine.serial
        assert machine.stderr() == ""


@lives.CONNECTED
@lives.BUSES
def test_large_frames_in_many_buffers(any_vm, tmp_path, bus):
    with StreamPeer(tmp_path) as peer:
        machine = any_vm(*peer.options, append="virtio-net step=20 passes=1 buffer=1000")
        machine.expect("ready")
        frames = [numbered(n, 60000 + n) for n in range(20)]
        peer.send_frames(*frames[:10], cut=30000)
        machine.live()
        peer.send_frames(*frames[10:])
        assert peer.frames(20) == [echo_of(frame) for frame in frames]
        assert machine.wait_exit() == 0


@pytest.mark.parametrize("smp", [1, 2])
@lives.CONNECTED
def test_guest_sends_to_a_peer_that_reads_late(any_vm, tmp_path, smp):
    """The socket is full each time: a frame is half sent, others wait in the ring."""
    with StreamPeer(tmp_path) as peer:
        program = "virtio-net mode=send size=60000 step=1024 passes=2"
        machine = any_vm(*peer.options, append=program, smp=smp)
        machine.expect("ready")
        found = []
        for _ in range(3):
            peer.wait_full()
            assert "state=connected" in machine.hmp("info network")  # the VMM is not held up
            machine.live()
            peer.receive(100000, keep=True)  # to somewhere in a frame
            found += peer.arrived()
        found += peer.frames(2048 - len(found))
        for number, frame in enumerate(found, 1):
            assert int.from_bytes(frame[14:22], "little") == number
            assert len(frame) == 60 + number * 7919 % (60000 - 59)
            assert frame[22:] == bytes([number & 0xFF]) * (len(frame) - 22)
        assert machine.wait_exit() == 0
        assert machine.stderr() == ""


@lives.CONNECTED
def test_two_networks(any_vm, tmp_path):
    """Each has its own frames, address and place."""
    with StreamPeer(tmp_path, "n0") as one, StreamPeer(tmp_path, "n1") as two:
        options = [*two.options[:2], *one.options, *two.options[2:-1]]
        program = "virtio-net step=5 passes=1"
        machine = any_vm(*options, f"{two.options[-1]},id=second", append=program)
        machine.expect("ready")
        machine.live()
        info = machine.hmp("info network")
        found = re.findall(r"^(\S+): index=0,type=nic,.*macaddr=(\S+)\n \\ (\S+):", info, re.M)
        assert found == [
            ("second", "52:54:00:12:34:57", "n1"),
            ("virtio-net-device.0", "52:54:00:12:34:56", "n0"),
        ]
        two.send_frames(numbered(99))
        frames = [numbered(n) for n in range(5)]
        one.send_frames(*frames)
        assert one.frames(5) == [echo_of(frame) for frame in frames]
        assert machine.wait_exit() == 0


@lives.CONNECTED
@lives.BUSES
def test_reset_and_stop(any_vm, tmp_path, bus):
    with StreamPeer(tmp_path) as peer:
        machine = any_vm(*peer.options, append="virtio-net")
        for number in range(3):
            machine.expect("virtio-net ready")
            machine.hmp("stop")
            frames = [numbered(3 * number + n) for n in range(3)]
            peer.send_frames(*frames[:2])
            machine.live()
            assert machine.status == "paused"
            peer.send_frames(frames[2])
            machine.hmp("cont")
            assert peer.frames(3) == [echo_of(frame) for frame in frames]
            machine.hmp("system_reset")
        assert machine.stderr() == ""


@pytest.mark.parametrize("smp", [1, 2])
@lives.CONNECTED
def test_evil_guest_with_a_network_harms_nobody_but_itself(any_vm, tmp_path, smp):
    """Broken rings and registers, while frames come from outside and the guest's are read."""
    with StreamPeer(tmp_path) as peer:
        rng = ("-device", "virtio-rng-device")
        machine = any_vm(*rng, *peer.options, *rng, append="virtio-attack step=16", smp=smp)
        machine.expect(r"attack \d+ broken [1-9]\d*\r\n")
        machine.live()
        footprint, before = machine.footprint(), machine.memory_kib("Anonymous")
        for number in range(8):
            peer.flood(numbered(1), numbered(2, 1500))
            if number % 3 == 0:
                machine.live()
            machine.expect(r"attack \d+ broken \d+\r\n")
            assert machine.status == "running"
        assert "state=connected" in machine.hmp("info network")
        assert machine.footprint() == footprint
        assert machine.memory_kib("Anonymous") - before < 2048
        assert b"FAIL" not in machine.serial
        assert machine.stderr() == ""


@pytest.mark.parametrize("offload", ["", "offload"])
@lives.CONNECTED
def test_host_and_guest_talk_over_a_tap(any_vm, offload):
    """ARP, ICMP and UDP with the host's own network stack; it drops what has a wrong sum. Frames
    that come while nobody reads wait in the interface."""
    with namespace():
        make_tap()
        machine = any_vm(*TAP, append=f"virtio-net {offload}")
        machine.expect("ready")
        before, _ = machine.footprint()
        with udp(GUEST_IP, 7) as sock:
            for number in range(3):
                exchange(sock, *(b"u" * size for size in (1, 18, 1000, 1472)))
                machine.hmp("stop")
                sock.send(b"meanwhile %d" % number)
                machine.live()
                machine.hmp("cont")
                assert sock.recv(2000) == b"meanwhile %d" % number
        assert machine.footprint()[0] == before
        # With -W it would wait no longer for the last answer than for two like those before.
        ping = [needs.program("ping"), *"-n -q -c 5 -w 20 -i 0.01".split(), GUEST_IP]
        text = subprocess.run(ping, capture_output=True, text=True, check=False).stdout
        assert " 5 received, " in text
        assert "type=tap,ifname=tap0,script=no" in machine.hmp("info network")
        assert b"FAIL" not in machine.serial
        assert machine.stderr() == ""


@lives.CONNECTED
def test_guest_reaches_passt(any_vm):
    """The gateway that passt plays answers the guest, and a port of the host's is the guest's
    for as long as the VM lives."""
    with namespace():
        machine = any_vm(*passt(), append="virtio-net")
        machine.expect("ready")
        with udp(PEER_IP, 7007) as sock:
            for number in range(3):
                exchange(sock, *(b"through passt %d %d" % (number, n) for n in range(5)))
                machine.live()
            exchange(sock, b"through passt")
        assert "type=passt,state=connected" in machine.hmp("info network")
        machine.kill(signal.SIGKILL)
        machine.wait_exit()
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:

            def free():
                try:
                    sock.bind(("0.0.0.0", 7007))
                except OSError:
                    return False
                return True

            wait_until(free, "the end of passt")


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (["-device", "virtio-net-device"], "netdev= is missing"),
        (["-device", "virtio-net-device,netdev=n0"], "add -netdev KIND,id=n0"),
        (["-netdev", "passtt,id=n0"], "did you mean passt?"),
        (
            [
                "-netdev",
                "tap,id=n0",
                "-device",
                "virtio-net-device,netdev=n0,mac=01:0:0:0:0:0",
            ],
            "is no address of a device",
        ),
        (
            ["-netdev", "tap,id=n0", "-device", "virtio-net-device,netdev=n0,rx_queue_size=100"],
            "rx_queue_size=100 is no power of two",
        ),
        (["-netdev", "stream,id=n0,addr.type=unix,addr.path=none"], "cannot connect to unix:none"),
    ],
)
def test_wrong_options(tmp_path, options, problem):
    done = run_cli("run", *options, cwd=tmp_path)
    assert done.returncode == 2
    assert problem in done.stderr
    assert done.stderr.count("\n") == 1
