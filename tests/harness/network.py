"""The other end of a network: a stream socket that pyvmm connects to, or a namespace."""

import contextlib
import ctypes
import os
import struct
import subprocess

from harness import needs
from harness.stream import Peer

GUEST_MAC = bytes.fromhex("525400123456")
PEER_MAC = bytes.fromhex("020000000001")
GUEST_IP = "10.9.0.2"
PEER_IP = "10.9.0.1"
#: A network device on what :func:`make_tap` makes.
TAP = ("-netdev", "tap,id=n0,ifname=tap0,script=no", "-device", "virtio-net-device,netdev=n0")
TYPE_TEST = b"\x88\xb5"  # IEEE 802: for local experiments
CLONE_NEWNET = 0x40000000


class StreamPeer(Peer):
    """The peer of a ``-netdev stream``.

    :param folder: where the socket goes: the folder above that of the :class:`harness.Vm`
    """

    def __init__(self, folder, name="n0"):
        super().__init__(folder, name)
        address = f"addr.type=unix,addr.path=../{name}.sock"
        self.options = ["-netdev", f"stream,id={name},{address}"]
        self.options += ["-device", f"virtio-net-device,netdev={name}"]
        self._torn = b""

    def send_frames(self, *frames, cut=None):
        """Send frames; with ``cut`` only so many bytes of the last one, which is torn until the
        next call."""
        data = self._torn + b"".join(struct.pack(">I", len(frame)) + frame for frame in frames)
        end = len(data) if cut is None else len(data) - 4 - len(frames[-1]) + cut
        self._torn = data[end:]
        self.send(data[:end])

    def flood(self, *frames):
        """Send these again and again until pyvmm takes no more; drop what comes."""
        data = b"".join(struct.pack(">I", len(frame)) + frame for frame in frames) * 50
        self._torn = self._torn or data
        try:
            while True:
                self._torn = self._torn[self.stream.send(self._torn) :] or data
        except BlockingIOError:
            self.rest()
            self.received.clear()

    def frames(self, count):
        """Wait for so many frames."""
        found = []
        while len(found) < count:
            found += self.arrived(count - len(found))
            if len(found) < count:
                self.exchange(b"", len(self.received) + 1)
        return found

    def arrived(self, count=None):
        """The frames that were received whole."""
        frames, at = [], 0
        while count is None or len(frames) < count:
            end = at + 4 + int.from_bytes(self.received[at : at + 4], "big")
            if len(self.received) < max(end, at + 5):
                break
            frames.append(bytes(self.received[at + 4 : end]))
            at = end
        del self.received[:at]
        return frames


def numbered(number, size=60):
    """A frame for the guest, which it sends back."""
    head = GUEST_MAC + PEER_MAC + TYPE_TEST + struct.pack("<Q", number)
    return head + bytes([number & 0xFF]) * (size - len(head))


def echo_of(frame):
    """What the guest makes of it."""
    return frame[6:12] + frame[:6] + frame[12:]


@contextlib.contextmanager
def namespace():
    """This thread, and what it starts, is in a network namespace of its own; root only, with
    what makes taps there."""
    needs.root("network namespaces")
    needs.program("ip")
    needs.device("/dev/net/tun")
    libc = ctypes.CDLL(None, use_errno=True)
    before = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        if libc.unshare(CLONE_NEWNET):
            needs.missing(f"network namespaces: {os.strerror(ctypes.get_errno())}")
        try:
            yield
        finally:
            # Behind a failure, too: this thread fetches packages later, which takes the network.
            assert libc.setns(before, CLONE_NEWNET) == 0
    finally:
        os.close(before)


def make_tap(name="tap0"):
    """A tap of this namespace with the peer's address, which lives without a VM."""
    for command in (
        f"tuntap add {name} mode tap",
        f"link set {name} up",
        f"addr add {PEER_IP}/24 dev {name}",
    ):
        subprocess.run(["ip", *command.split()], check=True, capture_output=True)
