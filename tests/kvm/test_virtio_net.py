"""The network device as the tiny guest's driver finds it on the real /dev/kvm."""

import re
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


@pytest.mark.parametrize("smp", [1, 2])
@pytest.mark.parametrize("options", ["", "nomerge", "buffer=100"])
def test_frames_come_back(vm, tmp_path, options, smp):
    with StreamPeer(tmp_path) as peer:
        machine = vm(*peer.options, append=f"virtio-net passes=2 {options}", smp=smp)
        machine.expect("virtio-net ready 52:54:0:12:34:56")
        frames = [numbered(n, 60 + n * 37 % 1455) for n in range(512)]
        peer.send_frames(*frames)
        assert peer.frames(512) == [echo_of(frame) for frame in frames]
        assert machine.wait_exit() == 0
        assert b"virtio-net PASS" in machine.serial
        assert machine.stderr() == ""


def test_large_frames_in_many_buffers(vm, tmp_path):
    with StreamPeer(tmp_path) as peer:
        machine = vm(*peer.options, append="virtio-net step=20 passes=1 buffer=1000")
        machine.expect("ready")
        frames = [numbered(n, 60000 + n) for n in range(20)]
        peer.send_frames(*frames)
        assert peer.frames(20) == [echo_of(frame) for frame in frames]
        assert machine.wait_exit() == 0


def test_guest_sends_to_a_peer_that_reads_late(vm, tmp_path):
    with StreamPeer(tmp_path) as peer:
        machine = vm(*peer.options, append="virtio-net mode=send step=1024 passes=5")
        peer.wait_full()
        assert "state=connected" in machine.hmp("info network")  # the VMM is not held up
        found = [int.from_bytes(frame[14:22], "little") for frame in peer.frames(5120)]
        assert found == list(range(1, 5121))
        assert machine.wait_exit() == 0


def test_two_networks(vm, tmp_path):
    """Each has its own frames, address and place."""
    with StreamPeer(tmp_path, "n0") as one, StreamPeer(tmp_path, "n1") as two:
        options = [*two.options[:2], *one.options, *two.options[2:-1]]
        machine = vm(*options, f"{two.options[-1]},id=second", append="virtio-net step=5 passes=1")
        machine.expect("ready")
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


def test_reset_and_stop(vm, tmp_path):
    with StreamPeer(tmp_path) as peer:
        machine = vm(*peer.options, append="virtio-net")
        for number in range(3):
            machine.expect("virtio-net ready")
            machine.hmp("stop")
            peer.send_frames(numbered(number))
            machine.hmp("cont")
            assert peer.frames(1) == [echo_of(numbered(number))]
            machine.hmp("system_reset")
        assert machine.stderr() == ""


@pytest.mark.parametrize("smp", [1, 2])
def test_evil_guest_with_a_network_harms_nobody_but_itself(vm, tmp_path, smp):
    """Broken rings and registers, while frames come from outside and the guest's are read."""
    with StreamPeer(tmp_path) as peer:
        rng = ("-device", "virtio-rng-device")
        machine = vm(*rng, *peer.options, *rng, append="virtio-attack step=32", smp=smp)
        machine.expect(r"attack \d+ broken [1-9]\d*\r\n")
        before, footprint = machine.memory_kib("Anonymous"), machine.footprint()
        for _ in range(8):
            peer.flood(numbered(1), numbered(2, 1500))
            machine.expect(r"attack \d+ broken \d+\r\n")
            assert machine.status == "running"
        assert "state=connected" in machine.hmp("info network")
        assert machine.footprint() == footprint
        assert machine.memory_kib("Anonymous") - before < 2048
        assert b"FAIL" not in machine.serial
        assert machine.stderr() == ""


@pytest.mark.parametrize("offload", ["", "offload"])
def test_host_and_guest_talk_over_a_tap(vm, offload):
    """ARP, ICMP and UDP with the host's own network stack; it drops what has a wrong sum."""
    with namespace():
        make_tap()
        machine = vm(*TAP, append=f"virtio-net {offload}")
        machine.expect("ready")
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            sock.settimeout(20)
            sock.connect((GUEST_IP, 7))
            for size in (1, 18, 1000, 1472):
                sock.send(b"u" * size)
                assert sock.recv(2000) == b"u" * size
        # With -W it would wait no longer for the last answer than for two like those before.
        ping = [needs.program("ping"), *"-n -q -c 5 -w 20 -i 0.01".split(), GUEST_IP]
        text = subprocess.run(ping, capture_output=True, text=True, check=False).stdout
        assert " 5 received, " in text
        assert "type=tap,ifname=tap0,script=no" in machine.hmp("info network")
        assert b"FAIL" not in machine.serial
        assert machine.stderr() == ""


def test_guest_reaches_passt(vm):
    """The gateway that passt plays answers the guest, and a port of the host's is the guest's."""
    needs.program("passt")
    with namespace():
        make_tap("up0")
        route = ["ip", "route", "add", "default", "via", GUEST_IP, "dev", "up0"]
        subprocess.run(route, check=True, capture_output=True)
        subprocess.run(["ip", "link", "set", "lo", "up"], check=True, capture_output=True)
        # The guest has the address that it always has, and the host another.
        network = f"passt,id=n0,address={GUEST_IP},udp-ports=7007:7,ipv6=off"
        machine = vm(
            *("-netdev", network, "-device", "virtio-net-device,netdev=n0"), append="virtio-net"
        )
        machine.expect("ready")
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            sock.settimeout(20)
            sock.connect((PEER_IP, 7007))
            sock.send(b"through passt")
            assert sock.recv(100) == b"through passt"
        assert "type=passt,state=connected" in machine.hmp("info network")


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
def test_wrong_options(vm, tmp_path, options, problem):
    from harness import process

    done = subprocess.run(
        [process.pyvmm(), "run", *options],
        cwd=tmp_path,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env=process.environment(),
    )
    assert done.returncode == 2
    assert problem in done.stderr
    assert done.stderr.count("\n") == 1
