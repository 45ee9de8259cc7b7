"""Debian's network driver on a tap: TCP both ways, checked, while updates come."""

import hashlib
import os
import socket
import threading

from harness import linux
from harness.network import GUEST_IP, PEER_IP, make_tap, namespace

BOOT_S = 240
CHUNK = os.urandom(1 << 16)
UPDATES = 10
MODULES = ("virtio_mmio", "virtio_net")
NETWORK = ("-netdev", "tap,id=n0,ifname=tap0,script=no", "-device", "virtio-net-device,netdev=n0")


def test_tcp_goes_on_over_updates(vm, tmp_path):
    """The host sends what it made up; the guest sends it back over the same connection."""
    script = f"""
mkdir -p /sys
mount -t sysfs sysfs /sys
ip addr add {GUEST_IP}/24 dev eth0
ip link set eth0 up
echo address $(cat /sys/class/net/eth0/address)
mkfifo /copy
md5sum </copy >/sum &
nc {PEER_IP} 7007 -e tee /copy
wait
echo received $(cat /sum)
poweroff -f
"""
    with namespace(), socket.create_server(("0.0.0.0", 7007)) as listener:
        make_tap()
        machine = vm(
            *linux.options(tmp_path, script, modules=MODULES), *NETWORK, memory="256M", smp=2
        )
        machine.expect(r"address 52:54:00:12:34:56\r?\n", BOOT_S)
        listener.settimeout(BOOT_S)
        stream, _ = listener.accept()
        with stream:
            stream.settimeout(BOOT_S)
            sent, returned, updated = hashlib.md5(), hashlib.md5(), threading.Event()

            def send():
                # Numbered, so that no part of it is like another.
                number = 0
                while not updated.is_set():
                    chunk = number.to_bytes(8, "little") + CHUNK
                    stream.sendall(chunk)
                    sent.update(chunk)
                    number += 1
                stream.shutdown(socket.SHUT_WR)

            def receive():
                while got := stream.recv(1 << 16):
                    returned.update(got)

            threads = [threading.Thread(target=each, daemon=True) for each in (send, receive)]
            for thread in threads:
                thread.start()
            for _ in range(UPDATES):
                machine.update(BOOT_S)
            updated.set()
            for thread in threads:
                thread.join(BOOT_S)
            assert returned.hexdigest() == sent.hexdigest()
        machine.expect(f"received {sent.hexdigest()}", BOOT_S)
        assert machine.wait_exit(BOOT_S) == 0
        assert machine.stderr() == ""
