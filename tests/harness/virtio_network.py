"""A virtio network device with a driver and a peer."""

import os
import socket
import struct

from pyvmm.backends.net.base import HEADER
from pyvmm.backends.net.stream import StreamBackend
from pyvmm.core.eventloop import EventLoop
from pyvmm.cpr.handover import Handover
from pyvmm.devices.virtio import mmio
from pyvmm.devices.virtio.net import VirtioNet
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
        self.backend = StreamBackend("n0", self.loop, Handover())
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


def frame(text, size=60):
    return text.ljust(size, b".")


def received(queue):
    """What the guest finds in the buffers that came back."""
    return [request.data(written) for request, written in queue.reap()]


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
