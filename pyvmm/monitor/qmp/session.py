"""One QMP monitor: greeting, negotiation, commands, events.

A client that does not read its replies gets no further command carried out, and of the events
only as many as fit the buffer. With the capability oob its commands queue up meanwhile, and
those given with exec-oob are carried out ahead of them.

The connection outlives a live update, and so does all that was negotiated on it, the migration
capability ``events`` included, which QEMU, whose clients connect anew, resets. What an update
finds half received or half sent is carried over, and what happened before the new image's
monitors were there is told then, so a client sees the events of both sides in QEMU's order:
MIGRATION setup, STOP, MIGRATION active, MIGRATION_PASS, MIGRATION device and completed from
the old image, MIGRATION setup and active, RESUME, MIGRATION completed (or failed) from the new.

Main loop thread only. Left out: a thread for out-of-band commands; they wait for the command
that is being carried out, none of which waits for anything but the host's files.
"""

from __future__ import annotations

import struct
import time

from pyvmm.chardev.base import CLOSED, NOT_READ, OPENED, Outbox
from pyvmm.chardev.rights import Rights
from pyvmm.core.threads import report_crash
from pyvmm.cpr.handover import MONITOR
from pyvmm.errors import CommandError, PyvmmError, VmStateError
from pyvmm.monitor.frontend import MonitorFrontend
from pyvmm.monitor.qmp import protocol
from pyvmm.monitor.registry import Argument, CommandNotFound, DeviceNotFound

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from pyvmm.chardev.base import Chardev
    from pyvmm.monitor.registry import Context

CHUNK = 4096
MAX_EVENTS = 1 << 20  # bytes of events that wait for a client to read
MAX_OUTPUT = 8 << 20  # those and one reply, the largest of which is a memory dump
MAX_ID = 4096  # characters of JSON; it is sent back, indented if so wanted
MAX_QUEUE = 8  # commands that wait for a client to read, as in QEMU
_MAX_DESC = 4096

_STATE = struct.Struct(">BB4I")  # version, flags, lengths of the four texts that follow
_VERSION = 2
_NEGOTIATED, _SKIPPING, _OOB = 1, 2, 4


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
        self._queue: list[bytes] = []
        self._negotiated = False
        self._oob = False
        self._open = False
        self._rights = Rights(context.machine.handover.parcel(MONITOR, f"{chardev.id}/fds"))
        self.rights = context.rights = self._rights
        context.machine.subscribe(self.handle_machine_event)

    def can_receive(self) -> int:
        if not self._takes_commands():
            return 0
        return max(CHUNK - len(self._splitter.waiting()), 0)

    def receive(self, data: bytes) -> None:
        self._splitter.push(data)
        self._process()

    def handle_event(self, event: str) -> None:
        if event == OPENED:
            if not self.chardev.is_inherited:
                self._forget_client()
                self._send({"QMP": {"version": self._version(), "capabilities": ["oob"]}})
            self._open = True
            self._outbox.flush()
            if self.chardev.is_inherited:
                for name, data, time_ns in self.context.migration.early_events:
                    self._tell(name, data, time_ns)
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
        self._tell(name, data, time.time_ns())

    def _tell(self, name: str, data: dict[str, Any] | None, time_ns: int) -> None:
        if not self._open or not self._negotiated:
            return
        seconds, microseconds = divmod(time_ns // 1000, 1_000_000)
        event: dict[str, Any] = {
            "timestamp": {"seconds": seconds, "microseconds": microseconds},
            "event": name,
        }
        if data is not None:
            event["data"] = data
        message = protocol.encode(event, self._pretty)
        # Cut short it would take the client out of step for good; so it is all or nothing.
        if self._outbox.size + len(message) <= MAX_EVENTS:
            self._outbox.send(message)
        else:
            self.chardev.drop(len(message), NOT_READ)

    def save_state(self) -> bytes:
        flags = (
            _NEGOTIATED * self._negotiated | _SKIPPING * self._splitter.skipping | _OOB * self._oob
        )
        texts = (
            b"".join(message + b"\n" for message in self._queue),
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
        limits = (2 * received, received, received, MAX_OUTPUT)
        if version != _VERSION or flags & ~7:
            raise VmStateError("monitor", f"version {version} with flags {flags:#x} is not known")
        if any(size > limit for size, limit in zip(sizes, limits, strict=True)):
            raise VmStateError("monitor", "a text is too long")
        if len(state) != _STATE.size + sum(sizes):
            raise VmStateError("monitor", f"{len(state)} bytes do not hold texts of {sizes}")
        self._negotiated = bool(flags & _NEGOTIATED)
        self._oob = bool(flags & _OOB)
        begin = _STATE.size + sizes[0]
        self._queue = _split(state[_STATE.size : begin])
        end = begin + sizes[1] + sizes[2]
        self._splitter.skipping = bool(flags & _SKIPPING)
        self._splitter.push(state[begin:end])
        self._outbox.send(state[end:])

    def close(self) -> None:
        self._rights.close()

    def _forget_client(self) -> None:
        self._splitter = protocol.Splitter()
        self._outbox.clear()
        self._queue.clear()
        self._negotiated = self._oob = False
        self._rights.close()

    def _takes_commands(self) -> bool:
        if not self._outbox.size:
            return True
        return (
            self._oob
            and len(self._queue) < MAX_QUEUE
            and sum(map(len, self._queue)) <= protocol.MAX_MESSAGE
            and self._outbox.size <= MAX_EVENTS
        )

    def _process(self) -> None:
        while self._takes_commands():
            if self._queue and not self._outbox.size:
                self._send(self._answer(self._queue.pop(0)))
                continue
            try:
                message = self._splitter.next()
            except protocol.ProtocolError as error:
                self._send(_failure(CommandError(str(error))))
                continue
            if message is None:
                return
            if self._outbox.size and not _is_oob(message):
                self._queue.append(message)
            else:
                self._send(self._answer(message))

    def _answer(self, message: bytes) -> dict[str, Any]:
        try:
            request = protocol.decode(message)
        except protocol.ProtocolError as error:
            return _failure(CommandError(str(error)))
        if not isinstance(request, dict):
            return _failure(CommandError("QMP input must be a JSON object"))
        if "id" not in request:
            return self._execute(request)
        if len(protocol.encode(request["id"])) > MAX_ID:
            return _failure(CommandError(f"QMP input member 'id' has more than {MAX_ID} bytes"))
        return {**self._execute(request), "id": request["id"]}

    def _execute(self, request: dict[str, Any]) -> dict[str, Any]:
        try:
            name, arguments = _check_request(request, self._oob)
            if name == "qmp_capabilities":
                return self._negotiate(arguments)
            if not self._negotiated:
                raise CommandNotFound("Expecting capabilities negotiation with 'qmp_capabilities'")
            command = self.context.registry.commands.get(name)
            if "exec-oob" in request and command is not None and not command.oob:
                raise CommandError(f"The command {name} does not support OOB")
            result = self.context.execute(name, arguments)
        except PyvmmError as error:
            return _failure(error)
        except Exception as error:
            # A bug in a command must not take the guest down with it.
            report_crash(error)
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
        for number, capability in enumerate(enable):
            name = f"enable[{number}]"
            Argument(name, "string", "").check(capability)
            if capability != "oob":
                raise CommandError(f"Parameter '{name}' does not accept value '{capability}'")
        self._oob = bool(enable)
        self._negotiated = True
        return {"return": {}}

    def _version(self) -> Any:
        return self.context.execute("query-version")

    def _send(self, message: dict[str, Any]) -> None:
        try:
            data = protocol.encode(message, self._pretty)
        except (TypeError, ValueError, RecursionError) as error:
            # A bug in a command: its answer cannot be told.
            report_crash(error)
            failure = _failure(CommandError(f"internal error ({type(error).__name__})"))
            id = {"id": message["id"]} if "id" in message else {}
            data = protocol.encode({**failure, **id}, self._pretty)
        self._outbox.send(data)


def _check_request(request: dict[str, Any], oob: bool) -> tuple[str, dict[str, Any]]:
    verbs = ("execute", "exec-oob") if oob else ("execute",)
    for member in request:
        if member not in (*verbs, "arguments", "id"):
            raise CommandError(f"QMP input member '{member}' is unexpected")
    given = [member for member in request if member in verbs]
    if not given:
        raise CommandError("QMP input lacks member 'execute'")
    if len(given) > 1:
        raise CommandError(f"QMP input member '{given[1]}' clashes with '{given[0]}'")
    name, arguments = request[given[0]], request.get("arguments", {})
    if not isinstance(name, str):
        raise CommandError(f"QMP input member '{given[0]}' must be a string")
    if not isinstance(arguments, dict):
        raise CommandError("QMP input member 'arguments' must be an object")
    return name, arguments


def _is_oob(message: bytes) -> bool:
    if b"exec-oob" not in message:
        return False
    try:
        request = protocol.decode(message)
    except protocol.ProtocolError:
        return False
    return isinstance(request, dict) and "exec-oob" in request


def _split(text: bytes) -> list[bytes]:
    splitter = protocol.Splitter()
    splitter.push(text)
    found = []
    try:
        while (message := splitter.next()) is not None:
            found.append(message)
    except protocol.ProtocolError as error:
        raise VmStateError("monitor", str(error)) from None
    return found


def _failure(error: PyvmmError) -> dict[str, Any]:
    known = isinstance(error, (CommandNotFound, DeviceNotFound))
    kind = type(error).__name__ if known else "GenericError"
    return {"error": {"class": kind, "desc": str(error)[:_MAX_DESC]}}
