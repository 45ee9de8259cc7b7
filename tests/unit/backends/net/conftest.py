"""A front end that records frames, a pretended exec, and network namespaces."""

import os
import time

import pytest
from harness import network
from harness.images import making

from pyvmm.backends.net.base import HEADER, NetFrontend
from pyvmm.core.eventloop import EventLoop
from pyvmm.cpr.fdstore import FdStore

DEADLINE_S = 20


class Recorder(NetFrontend):
    """Takes frames, at most ``room`` of them, and remembers all that happens to it."""

    def __init__(self, backend, room=1 << 30):
        self.backend = backend
        self.room = room
        self.frames = []
        self.headers = []
        self.links = []
        self.writable = 0
        backend.frontend = self

    def start(self):
        """As a device does when its state is complete."""
        self.backend.start()
        self.backend.watch(True)
        self.handle_frames()

    def handle_frames(self):
        while (frame := self.backend.peek()) is not None:
            if len(self.frames) >= self.room:
                self.backend.watch(False)
                return
            self.headers.append(bytes(frame[:HEADER]))
            self.frames.append(bytes(frame[HEADER:]))
            self.backend.consume()

    def handle_writable(self):
        self.writable += 1

    def handle_link(self, up):
        self.links.append(up)


class Image:
    """One image of a VMM: a loop, a store of descriptors, and the back ends on them."""

    def __init__(self, inherited=None):
        self.loop = EventLoop()
        self.fds = FdStore(inherited)
        self._made = []

    def make(self, kind, id="n0", **options):
        """Build a back end; it is closed with the image."""
        backend = kind(id, self.loop, self.fds, **options)
        self._made.append(backend)
        return backend

    def until(self, condition):
        """Run the loop until ``condition()``."""
        end = time.monotonic() + DEADLINE_S
        while not condition():
            assert time.monotonic() < end, "it never happened"
            self.loop.run_once(0.2)

    def settle(self):
        """Run the loop until it has nothing to do at once."""
        for _ in range(5):
            self.loop.run_once(0)

    def exec(self):
        """What the next image inherits; this one is gone without having closed anything."""
        kept = self.fds.kept()
        inherited = {key: os.dup(fd) for key, fd in kept.items()}
        for backend in self._made:
            for owner, name in (
                (backend, "_sock"),
                (getattr(backend, "connector", 0), "_listener"),
            ):
                sock = getattr(owner, name, None)
                if sock is not None:
                    sock.detach()
            if hasattr(backend, "fd"):
                backend.fd = -1
        for fd in kept.values():
            os.close(fd)
        self.loop.close()
        self._made.clear()
        self.loop = None
        return inherited

    def close(self):
        if self.loop is not None:
            for backend in self._made:
                backend.close()
                backend.close()
            assert not self.fds.kept(), "kept after close"
            self.fds.close_unclaimed()
            self.loop.close()


@pytest.fixture
def images():
    yield from making(Image)


@pytest.fixture
def image(images):
    return images()


@pytest.fixture
def recorder():
    """The class of front ends that record."""
    return Recorder


@pytest.fixture
def namespace():
    """The test's thread is in a network namespace of its own."""
    with network.namespace():
        yield
