"""The other end of a chardev that a test talks through: a Unix socket that pyvmm connects to."""

import select
import socket

from harness.process import DEADLINE_S, Deadline


class Peer:
    """Listens in a folder; the connection is accepted when it is first used.

    :param folder: where the socket goes: the folder above that of the :class:`harness.Vm`
    :param name: the chardev's id
    """

    def __init__(self, folder, name):
        self.name = name
        self.option = f"socket,id={name},path=../{name}.sock"
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(folder / f"{name}.sock"))
        self._listener.listen(1)
        self._stream = None
        #: All that was received so far.
        self.received = bytearray()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    @property
    def stream(self):
        """The connection."""
        if self._stream is None:
            self._listener.settimeout(Deadline().left)
            self._stream, _ = self._listener.accept()
            self._stream.setblocking(False)
        return self._stream

    def send(self, data):
        """Send all of it; what comes meanwhile is received."""
        self.exchange(data, 0)

    def receive(self, count, *, keep=False, timeout=DEADLINE_S):
        """Wait until ``count`` bytes have come and return them; with ``keep`` they stay in
        :attr:`received`."""
        self.exchange(b"", count, timeout)
        data = bytes(self.received[:count])
        if not keep:
            del self.received[:count]
        return data

    def exchange(self, data, count, timeout=DEADLINE_S):
        """Send ``data`` and receive until there are ``count`` bytes; all that has come."""
        deadline = Deadline(timeout)
        rest = memoryview(data)
        while rest or len(self.received) < count:
            assert not deadline.over, f"{len(rest)} bytes unsent, {len(self.received)} received"
            writing = [self.stream] if rest else []
            readable, writable, _ = select.select([self.stream], writing, [], deadline.left)
            if readable:
                got = self.stream.recv(1 << 16)
                assert got or not rest, f"{self.name} was closed"
                if not got:
                    break
                self.received += got
            if writable:
                rest = rest[self.stream.send(rest) :]
        return bytes(self.received)

    def take(self):
        """Take what has arrived; how much was received so far."""
        while select.select([self.stream], [], [], 0)[0] and (got := self.stream.recv(1 << 16)):
            self.received += got
        return len(self.received)

    def wait_full(self):
        """Wait until no more comes because nothing is read: pyvmm's side of the socket is
        full."""
        deadline = Deadline()
        before = -1
        while (now := self._queued()) != before or not now:
            assert not deadline.over, "the peer has nothing to send"
            before = now
            select.select([], [], [], 0.05)

    def rest(self):
        """All that was sent and is still to be had, without waiting for more."""
        while select.select([self.stream], [], [], 0.2)[0]:
            got = self.stream.recv(1 << 16)
            if not got:
                break
            self.received += got
        return bytes(self.received)

    def close(self):
        """Hang up."""
        self._listener.close()
        if self._stream is not None:
            self._stream.close()

    def _queued(self):
        import fcntl
        import termios

        return int.from_bytes(fcntl.ioctl(self.stream, termios.FIONREAD, bytes(4)), "little")


def consoles(console, *ports):
    """Options for a console device: a console on the first peer, generic ports on the rest."""
    options = ["-device", "virtio-serial-device"]
    for peer in (console, *ports):
        options += ["-chardev", peer.option]
    options += ["-device", f"virtconsole,chardev={console.name}"]
    for peer in ports:
        options += ["-device", f"virtserialport,chardev={peer.name},name=org.test.{peer.name}"]
    return options
