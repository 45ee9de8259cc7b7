"""One QMP monitor: greeting, negotiation, commands, events.

A client that does not read its replies gets no further command carried out, and of the events
only as many as fit the buffer. What a live update finds half received or half sent is carried
over; the client notices the update by its events only. Main loop thread only.

Left out: out-of-band commands (every command here is carried out at once).
"""

from __future__ import annotations

import struct
import sys
import time

from pyvmm.chardev.base import CLOSED, OPENED, Outbox
from pyvmm.errors import CommandError, PyvmmError, VmStateError
from pyvmm.monitor.frontend import MonitorFrontend
from pyvmm.monitor.qmp import protocol
from pyvmm.monitor.registry import CommandNotFound

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from pyvmm.chardev.base import Chardev
    from pyvmm.monitor.registry import Context

CHUNK = 4096
MAX_EVENTS = 1 << 20  # bytes of events that wait for a client to read
MAX_OUTPUT = 8 << 20  # those and one reply, the largest of which is a memory dump
MAX_ID = 4096  # characters of JSON; it is sent back, indented if so wanted
_MAX_DESC = 4096

_STATE = struct.Struct(">BB3I")  # version, flags, lengths of the three texts that follow
_VERSION = 1
_NEGOTIATED, _SKIPPING, _TOLD_STOP = 1, 2, 4


class QmpSession(MonitorFrontend):
    """A QMP server on a chardev, for one client after the other.

    :param chardev: attached to this front end by the caller
    :param context: whose commands it runs
    :param pretty: replies over several lines
    """

    def __init__(self, chardev: Chardev, context: Context, *, pretty: bool = False) -> None:
        self.chardev = chardev
        self.context = context
        self._pretty = pretty
        self._outbox = Outbox(chardev, MAX_OUTPUT)
        self._splitter = protocol.Splitter()
        self._negotiated = False
        self._told_stop = False
        self._open = False
        context.machine.subscribe(self.handle_machine_event)

    def can_receive(self) -> int:
        if self._outbox.pending():
            return 0
        return max(CHUNK - len(self._splitter.waiting()), 0)

    def receive(self, data: bytes) -> None:
        self._splitter.push(data)
        self._process()

    def handle_event(self, event: str) -> None:
        if event == OPENED:
            if not self.chardev.resumed:
                self._forget_client()
                self._send({"QMP": {"version": self._version(), "capabilities": []}})
            self._open = True
            self._outbox.flush()
            if self._told_stop and self.context.machine.runstate.running:
                # The guest went on before this monitor was there to tell.
                self.handle_machine_event("RESUME", None)
            self._process()
        elif event == CLOSED:
            self._forget_client()
            self._open = False

    def handle_writable(self) -> None:
        self._outbox.flush()
        self._process()
        self.chardev.accept_input()

    def handle_machine_event(self, name: str, data: dict[str, Any] | None) -> None:
        """Tell the client of an event of the machine."""
        if not self._open or not self._negotiated:
            return
        if name in ("STOP", "RESUME"):
            self._told_stop = name == "STOP"
        now_us = time.time_ns() // 1000
        event: dict[str, Any] = {
            "timestamp": {"seconds": now_us // 1_000_000, "microseconds": now_us % 1_000_000},
            "event": name,
        }
        if data is not None:
            event["data"] = data
        message = protocol.encode(event, self._pretty)
        # Cut short it would take the client out of step for good; so it is all or nothing.
        if len(self._outbox.pending()) + len(message) <= MAX_EVENTS:
            self._outbox.send(message)

    def save_state(self) -> bytes:
        flags = (
            _NEGOTIATED * self._negotiated
            | _SKIPPING * self._splitter.skipping
            | _TOLD_STOP * self._told_stop
        )
        texts = (
            bytes(self._splitter.partial),
            self._splitter.waiting(),
            self._outbox.pending(),
        )
        return _STATE.pack(_VERSION, flags, *map(len, texts)) + b"".join(texts)

    def load_state(self, state: bytes) -> None:
        if len(state) < _STATE.size:
            raise VmStateError("monitor", f"{len(state)} bytes are too few")
        version, flags, *sizes = _STATE.unpack_from(state)
        received = protocol.MAX_MESSAGE + CHUNK
        limits = (received, received, MAX_OUTPUT)
        if version != _VERSION or flags & ~7:
            raise VmStateError("monitor", f"version {version} with flags {flags:#x} is not known")
        if any(size > limit for size, limit in zip(sizes, limits, strict=True)):
            raise VmStateError("monitor", "a text is too long")
        if len(state) != _STATE.size + sum(sizes):
            raise VmStateError("monitor", f"{len(state)} bytes do not hold texts of {sizes}")
        end = _STATE.size + sizes[0] + sizes[1]
        self._negotiated = bool(flags & _NEGOTIATED)
        self._told_stop = bool(flags & _TOLD_STOP)
        self._splitter.skipping = bool(flags & _SKIPPING)
        self._splitter.push(state[_STATE.size : end])
        self._outbox.send(state[end:])

    def _forget_client(self) -> None:
        self._splitter = protocol.Splitter()
        self._outbox.clear()
        self._negotiated = self._told_stop = False

    def _process(self) -> None:
        while not self._outbox.pending():
            try:
                message = self._splitter.next()
                if message is None:
                    return
                request = protocol.decode(message)
            except protocol.ProtocolError as error:
                self._send(_failure(CommandError(str(error))))
                continue
            self._send(self._answer(request))

    def _answer(self, request: object) -> dict[str, Any]:
        if not isinstance(request, dict):
            return _failure(CommandError("QMP input must be a JSON object"))
        if "id" not in request:
            return self._execute(request)
        if len(protocol.encode(request["id"])) > MAX_ID:
            return _failure(CommandError(f"QMP input member 'id' has more than {MAX_ID} bytes"))
        return {**self._execute(request), "id": request["id"]}

    def _execute(self, request: dict[str, Any]) -> dict[str, Any]:
        try:
            name, arguments = _check_request(request)
            if name == "qmp_capabilities":
                return self._negotiate(arguments)
            if not self._negotiated:
                raise CommandNotFound("Expecting capabilities negotiation with 'qmp_capabilities'")
            result = self.context.execute(name, arguments)
        except PyvmmError as error:
            return _failure(error)
        except Exception as error:
            # A bug in a command must not take the guest down with it.
            sys.excepthook(type(error), error, error.__traceback__)
            return _failure(CommandError(f"internal error ({type(error).__name__})"))
        return {"return": {} if result is None else result}

    def _negotiate(self, arguments: dict[str, Any]) -> dict[str, Any]:
        if self._negotiated:
            raise CommandNotFound("Capabilities negotiation is already complete, command ignored")
        for key in arguments:
            if key != "enable":
                raise CommandError(f"Parameter '{key}' is unexpected")
        enable = arguments.get("enable", [])
        if not isinstance(enable, list):
            raise CommandError("Invalid parameter type for 'enable', expected: array")
        if enable:
            raise CommandError(f"Capability {enable[0]} not available")
        self._negotiated = True
        return {"return": {}}

    def _version(self) -> Any:
        return self.context.execute("query-version")

    def _send(self, message: dict[str, Any]) -> None:
        self._outbox.send(protocol.encode(message, self._pretty))


def _check_request(request: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    for member in request:
        if member not in ("execute", "arguments", "id"):
            raise CommandError(f"QMP input member '{member}' is unexpected")
    if "execute" not in request:
        raise CommandError("QMP input lacks member 'execute'")
    name, arguments = request["execute"], request.get("arguments", {})
    if not isinstance(name, str):
        raise CommandError("QMP input member 'execute' must be a string")
    if not isinstance(arguments, dict):
        raise CommandError("QMP input member 'arguments' must be an object")
    return name, arguments


def _failure(error: PyvmmError) -> dict[str, Any]:
    kind = "CommandNotFound" if isinstance(error, CommandNotFound) else "GenericError"
    return {"error": {"class": kind, "desc": str(error)[:_MAX_DESC]}}
