"""A QMP client for tests: one connection, replies and events apart."""

import array
import json
import select
import socket

from harness.process import Deadline


class QmpError(AssertionError):
    """The reply was an error; its class and text."""

    def __init__(self, error):
        super().__init__(f"{error['class']}: {error['desc']}")
        self.kind = error["class"]
        self.text = error["desc"]


class Qmp:
    """A client on a Unix socket.

    :param path: where pyvmm listens
    :param enable: capabilities to negotiate; None to negotiate nothing
    """

    def __init__(self, path, enable=()):
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.connect(str(path))
        self._data = b""
        #: Events that were not waited for yet.
        self.events = []
        self.greeting = self.read()
        if enable is not None:
            self.execute("qmp_capabilities", enable=list(enable))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def close(self):
        self.sock.close()

    def send(self, request, fds=()):
        """Send a request (a dict) or bytes as they are, with descriptors."""
        data = request if isinstance(request, bytes) else json.dumps(request).encode() + b"\n"
        if fds:
            rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))
            self.sock.sendmsg([data], [rights])
        else:
            self.sock.sendall(data)

    def read(self, deadline=None):
        """The next message, whatever it is."""
        deadline = deadline or Deadline()
        while b"\r\n" not in self._data:
            assert select.select([self.sock], [], [], deadline.left)[0], "no message in time"
            data = self.sock.recv(1 << 16)
            if not data:
                raise ConnectionResetError("pyvmm closed the connection")
            self._data += data
        line, _, self._data = self._data.partition(b"\r\n")
        return json.loads(line)

    def reply(self):
        """The next reply; events on the way to it are put aside."""
        deadline = Deadline()
        while "event" in (message := self.read(deadline)):
            self.events.append(message)
        return message

    def execute(self, name, fds=(), **arguments):
        """What a command returns.

        :raises QmpError: if that is an error
        """
        arguments = {key.replace("_", "-"): value for key, value in arguments.items()}
        self.send({"execute": name, "arguments": arguments}, fds)
        reply = self.reply()
        if "error" in reply:
            raise QmpError(reply["error"])
        return reply["return"]

    def wait(self, name, **data):
        """Wait for an event with at least these data; the names and states of all until then."""
        deadline = Deadline()
        seen = []
        while True:
            event = self.events.pop(0) if self.events else self.read(deadline)
            found = event.get("data", {})
            states = [str(value) for key, value in found.items() if not key.startswith("error-")]
            seen.append(" ".join([event["event"], *states]))
            if event["event"] == name and data.items() <= found.items():
                return seen
