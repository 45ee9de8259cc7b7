"""A front end that records frames, a pretended exec, and network namespaces."""

import pytest
from harness import network
from harness.images import BareImage, making

from pyvmm.backends.net.base import HEADER, NetFrontend


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


class Image(BareImage):
    """With back ends."""

    def make(self, kind, id="n0", **options):
        """Build a back end; it is closed with the image."""
        backend = kind(id, self.loop, self.handover, **options)
        self._made.append(backend)
        return backend

    def abandon(self):
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

    def close(self):
        if self.loop is not None:
            for backend in self._made:
                backend.close()
                backend.close()
            assert not self.handover.kept(), "kept after close"
            self.handover.settle()
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
