"""The client's side of a VM's monitors, found in the run directory."""

from __future__ import annotations

import json
import os
import socket
import time
from typing import Any, Self

from pyvmm import rundir
from pyvmm.errors import CommandError, HostError

TIMEOUT_S = 10.0
_PROMPT = b"(pyvmm) "
_CHUNK = 65536


class DisconnectedError(HostError):
    """The VM ended, or closed the connection."""


class UnresponsiveError(HostError):
    """The VM does not answer in time."""


def find(name: str) -> str:
    """Return the directory of the running VM of that name.

    :raises HostError: there is none; the message names those that run
    """
    running = rundir.names()
    if name not in running:
        known = f"these run: {', '.join(map(printable, running))}" if running else "none runs"
        raise HostError(f"{printable(name)}: there is no VM of that name; {known}")
    return rundir.directory(name)


def printable(name: str) -> str:
    """Return a name with ``?`` for what a terminal must not get: it may have any characters."""
    return "".join(char if char.isprintable() else "?" for char in name)


class Client:
    """A connection to one of a VM's sockets.

    :param path: the VM's directory
    :param file: the socket in it
    :param timeout_s: for the connection, and for each reply; None is for ever
    :raises HostError: nobody listens there, or does so as the protocol has it
    """

    def __init__(self, path: str, file: str, timeout_s: float | None = TIMEOUT_S) -> None:
        self.name = printable(rundir.decode_name(os.path.basename(path)))
        self.timeout_s = timeout_s
        self.socket = socket.socket(socket.AF_UNIX)
        self._received = bytearray()
        self._deadline: float | None = None
        self._start()
        try:
            self._connect(os.path.join(path, file))
            self._greet()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the connection."""
        self.socket.close()

    def _greet(self) -> None:
        """What the protocol begins with."""

    def _connect(self, path: str) -> None:
        try:
            # It waits for room in the backlog.
            self.socket.settimeout(self.timeout_s)
            self.socket.connect(path)
        except TimeoutError:
            raise self._unresponsive() from None
        except OSError as error:
            file = os.path.basename(path)
            raise HostError(f"{self.name}: {file} cannot be used: {error.strerror}") from None

    def _start(self) -> None:
        """A new exchange begins; the time for it runs from now."""
        self._deadline = None if self.timeout_s is None else time.monotonic() + self.timeout_s

    def _send(self, data: bytes) -> None:
        try:
            self.socket.sendall(data)
        except TimeoutError:
            raise self._unresponsive() from None
        except OSError:
            raise self.disconnected() from None

    def _receive(self) -> None:
        """Wait for more of what the VM sends."""
        try:
            left = None if self._deadline is None else self._deadline - time.monotonic()
            if left is not None and left <= 0:
                raise self._unresponsive()
            self.socket.settimeout(left)
            data = self.socket.recv(_CHUNK)
        except TimeoutError:
            raise self._unresponsive() from None
        except OSError:
            data = b""
        if not data:
            raise self.disconnected()
        self._received += data

    def _unresponsive(self) -> HostError:
        return UnresponsiveError(f"{self.name}: the VM does not answer in {self.timeout_s:g} s")

    def disconnected(self) -> DisconnectedError:
        """Return the error that says that the VM closed the connection."""
        return DisconnectedError(f"{self.name}: the VM closed the connection")


class HmpClient(Client):
    """A session of the human monitor.

    :ivar banner: what it greeted with
    """

    def __init__(self, path: str, timeout_s: float | None = TIMEOUT_S) -> None:
        self.banner = ""
        super().__init__(path, rundir.HMP_SOCKET, timeout_s)

    def run(self, line: str) -> str:
        """Run one line; return what it prints, with plain newlines.

        :raises DisconnectedError: the VM ended meanwhile, as quit makes it
        :raises UnresponsiveError: no answer in time
        """
        self._start()
        self._send(line.encode("utf-8", "surrogateescape") + b"\n")
        return self._read_reply()

    def _greet(self) -> None:
        self.banner = self._read_reply()

    def _read_reply(self) -> str:
        # A prompt stands at the start of a line and nothing follows it.
        received = self._received
        while received != _PROMPT and not received.endswith(b"\n" + _PROMPT):
            self._receive()
        text = received[: -len(_PROMPT)].decode("utf-8", "surrogateescape")
        received.clear()
        return text.replace("\r\n", "\n")


class QmpClient(Client):
    """A QMP session, negotiated; events are passed over."""

    def __init__(self, path: str, timeout_s: float | None = TIMEOUT_S) -> None:
        super().__init__(path, rundir.QMP_SOCKET, timeout_s)

    def _greet(self) -> None:
        self._read_message()
        self.execute("qmp_capabilities")

    def execute(self, command: str, arguments: dict[str, Any] | None = None) -> Any:
        """Run a command; return its result.

        :raises CommandError: it was refused
        :raises HostError: no answer
        """
        self._start()
        request = {"execute": command, "arguments": arguments or {}}
        self._send(json.dumps(request).encode() + b"\n")
        while True:
            message = self._read_message()
            if "error" in message:
                raise CommandError(str(message["error"].get("desc", message["error"])))
            if "return" in message:
                return message["return"]

    def _read_message(self) -> dict[str, Any]:
        while b"\n" not in self._received:
            self._receive()
        line, _, rest = self._received.partition(b"\n")
        self._received[:] = rest
        try:
            message = json.loads(line)
        except (ValueError, RecursionError):
            message = None
        if not isinstance(message, dict):
            raise HostError(f"{self.name}: what answers on {rundir.QMP_SOCKET} is no QMP server")
        return message
