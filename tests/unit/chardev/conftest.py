"""A loop that runs until something is so, a front end that records, and a pretended exec."""

import socket

import pytest
from harness.images import BareImage, making

from pyvmm.chardev.base import Frontend
from pyvmm.chardev.factory import ChardevSet


class Recorder(Frontend):
    """Remembers all that happens to it.

    :param room: how many bytes it takes before it is full; None for no limit
    """

    def __init__(self, room=None):
        self.room = room
        self.data = bytearray()
        self.events = []
        self.writable = 0

    def can_receive(self):
        return 1 << 16 if self.room is None else self.room

    def receive(self, data):
        assert data, "receive() of nothing"
        assert len(data) <= self.can_receive(), "more than there is room for"
        if self.room is not None:
            self.room -= len(data)
        self.data += data

    def handle_event(self, event):
        self.events.append(event)

    def handle_writable(self):
        self.writable += 1


class Image(BareImage):
    """With chardevs."""

    def __init__(self, inherited=None, states=None):
        super().__init__(inherited, states)
        self.quits = 0
        self.chardevs = ChardevSet(self.loop, self.handover, self._quit)

    def _quit(self):
        self.quits += 1

    def make(self, kind, id="c0", **options):
        """Build a chardev; it is closed with the image."""
        chardev = kind(id, self.loop, self.handover, **options)
        self._made.append(chardev)
        return chardev

    def abandon(self):
        for chardev in [*self._made, *(chardev for _id, chardev in self.chardevs.items())]:
            connector = getattr(chardev, "connector", None)
            if connector is not None and connector._listener is not None:
                connector._listener.detach()
            if connector is not None and connector._calling is not None:
                connector._calling.close()  # close-on-exec
        self.chardevs = None

    def close(self):
        if self.loop is not None:
            for chardev in self._made:
                chardev.close()
            self.chardevs.close()
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
def _in_folder(tmp_path, monkeypatch):
    # Relative paths: a temporary folder's may be longer than a socket's can be.
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def clients():
    """A maker of client sockets that are closed in the end."""
    made = []

    def connect(path_or_address="s"):
        family = socket.AF_UNIX if isinstance(path_or_address, str) else socket.AF_INET
        made.append(socket.socket(family))
        made[-1].settimeout(20)
        made[-1].connect(path_or_address)
        return made[-1]

    yield connect
    for sock in made:
        sock.close()
