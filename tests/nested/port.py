"""The host's end of the port on which ``agent.sh`` takes commands."""

import base64
import re
import secrets
import select
import time

READY = re.compile(rb"nested: ready\n")
#: How much longer than the command's own deadline an answer may take.
GRACE_S = 30.0
#: No shorter than what :meth:`CommandPort.run` waits for.
ENDING_MAX = 32


class NestedError(RuntimeError):
    """The machine ended or does not answer."""


class CommandPort:
    """Sends commands and takes what they print.

    :param sock: a connected stream socket, owned from now on
    :param pidfd: of the process that has the machine
    """

    def __init__(self, sock, pidfd):
        self._sock = sock
        self._pidfd = pidfd
        self._data = b""

    def close(self):
        self._sock.close()

    def wait_ready(self, timeout):
        """Wait for the agent's first sign of life."""
        self._wait(READY, time.monotonic() + timeout, lambda data: None)

    def run(self, script, timeout, take):
        """Run a shell script; its exit status, 137 if it was killed at the deadline.

        :param take: is called with what it prints, in pieces as they come
        :raises NestedError: if no answer comes
        """
        # No command can print this by chance.
        mark = secrets.token_hex(8).encode()
        packed = base64.b64encode(script.encode())
        self._sock.sendall(b"%s %d %s\n" % (mark, max(1, round(timeout)), packed))
        ending = re.compile(rb"\n%s (\d+)\n" % mark)
        return int(self._wait(ending, time.monotonic() + timeout + GRACE_S, take)[1])

    def _wait(self, ending, end, take):
        """Give all that arrives to ``take`` until ``ending`` matches; the match."""
        while not (match := ending.search(self._data)):
            # What may be the beginning of the ending has to wait for the rest.
            newline = self._data.rfind(b"\n")
            is_near = newline >= 0 and len(self._data) - newline < ENDING_MAX
            size = newline if is_near else len(self._data)
            if size:
                take(self._data[:size])
                self._data = self._data[size:]
            left = max(0.0, end - time.monotonic())
            ready = select.select([self._sock, self._pidfd], [], [], left)[0]
            if not ready:
                raise NestedError("does not answer")
            data = self._sock.recv(1 << 16) if self._sock in ready else b""
            if not data:
                raise NestedError("ended")
            self._data += data
        if match.start():
            take(self._data[: match.start()])
        self._data = self._data[match.end() :]
        return match
