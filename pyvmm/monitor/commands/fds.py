"""Descriptors that clients pass over a Unix socket, kept by name or in numbered sets.

They are preserved over live updates under their own numbers, so a path /proc/self/fd/N (N is
what add-fd returned) means the same file before and after. The hand-over is
the only list of them: name and ``opaque`` are part of the id there. Unlike QEMU's they belong to
the machine, not to the monitor they came through, and are kept until they are removed.
"""

from __future__ import annotations

from pyvmm.cpr.handover import CLIENT
from pyvmm.errors import CommandError
from pyvmm.monitor.registry import Argument, Command, Context

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

_NAMED, _SET = "name/", "set/"  # begin the ids of the two kinds
_MAX_TEXT = 100  # bytes; in hexadecimal it has to fit a name of the CPR state
_MAX_FDS = 256
_MAX_SET = (1 << 63) - 1


def getfd(context: Context, fdname: str) -> None:
    """Keep the descriptor that came along under a name; one of that name is closed."""
    handover, fd = context.machine.handover, _receive(context)
    try:
        if fdname[:1].isdigit() or not fdname:
            raise CommandError("Parameter 'fdname' expects a name not starting with a digit")
        parcel = handover.parcel(CLIENT, _NAMED + _pack("fdname", fdname))
    except CommandError:
        handover.close(fd)
        raise
    old = parcel.kept()
    if old is not None:
        parcel.close(old)
    parcel.keep(fd)


def closefd(context: Context, fdname: str) -> None:
    """Close the descriptor of that name."""
    # What cannot be a name is not found either.
    id = _NAMED + fdname.encode("utf-8", "surrogatepass").hex()
    parcel = context.machine.handover.parcel(CLIENT, id)
    fd = parcel.kept()
    if fd is None:
        raise CommandError(f"File descriptor named '{fdname}' not found")
    parcel.close(fd)


def add_fd(
    context: Context, fdset_id: int | None = None, opaque: str | None = None
) -> dict[str, Any]:
    """Put the descriptor that came along into a set, by default a new one; return both numbers."""
    handover, fd = context.machine.handover, _receive(context)
    try:
        if fdset_id is not None and not 0 <= fdset_id <= _MAX_SET:
            raise CommandError("Parameter 'fdset-id' expects a non-negative value")
        label = "" if opaque is None else "=" + _pack("opaque", opaque)
    except CommandError:
        handover.close(fd)
        raise
    if fdset_id is None:
        used = {entry["fdset-id"] for entry in query_fdsets(context)}
        fdset_id = next(number for number in range(len(used) + 1) if number not in used)
    handover.parcel(CLIENT, f"{_SET}{fdset_id}{label}").keep(fd, fd)
    return {"fdset-id": fdset_id, "fd": fd}


def remove_fd(context: Context, fdset_id: int, fd: int | None = None) -> None:
    """Close one descriptor of a set, or all."""
    found = [
        (key, number)
        for id, _, key, number in _sets(context)
        if id == fdset_id and fd in (None, number)
    ]
    if not found:
        what = f"fdset-id:{fdset_id}" + (f", fd:{fd}" if fd is not None else "")
        raise CommandError(f"File descriptor named '{what}' not found")
    for key, number in found:
        context.machine.handover.parcel(CLIENT, key).close(number, number)


def query_fdsets(context: Context) -> list[dict[str, Any]]:
    """Return the sets and their descriptors."""
    sets: dict[int, list[dict[str, Any]]] = {}
    for id, opaque, _, number in _sets(context):
        entry = {"fd": number} if opaque is None else {"fd": number, "opaque": opaque}
        sets.setdefault(id, []).append(entry)
    return [{"fdset-id": id, "fds": fds} for id, fds in sorted(sets.items())]


def _receive(context: Context) -> int:
    fd = context.rights.take() if context.rights is not None else None
    if fd is None:
        raise CommandError("No file descriptor supplied via SCM_RIGHTS")
    if len(context.machine.handover.kept_of(CLIENT)) >= _MAX_FDS:
        context.machine.handover.close(fd)
        raise CommandError(f"There are {_MAX_FDS} file descriptors already; remove some")
    return fd


def _pack(parameter: str, text: str) -> str:
    raw = text.encode()
    if len(raw) > _MAX_TEXT:
        raise CommandError(f"Parameter '{parameter}' expects at most {_MAX_TEXT} bytes")
    return raw.hex()


def _sets(context: Context) -> list[tuple[int, str | None, str, int]]:
    """Return set, opaque, id and number of every descriptor in a set."""
    found = []
    for key, number in sorted(context.machine.handover.kept_of(CLIENT)):
        if key.startswith(_SET):
            id, equals, opaque = key.removeprefix(_SET).partition("=")
            try:
                text = bytes.fromhex(opaque).decode() if equals else None
                found.append((int(id), text, key, number))
            except ValueError:
                pass  # no id of ours: the image before was another program
    return found


_FDSET = Argument("fdset-id", "integer", "number of the set")

COMMANDS = (
    Command("getfd", getfd, Argument("fdname", "string", "the name to keep it under")),
    Command("closefd", closefd, Argument("fdname", "string", "its name")),
    Command(
        "add-fd",
        add_fd,
        Argument("fdset-id", "integer", "number of the set", optional=True),
        Argument("opaque", "string", "whatever the client wants to find again", optional=True),
        returns={"fdset-id": "int", "fd": "int"},
    ),
    Command(
        "remove-fd",
        remove_fd,
        _FDSET,
        Argument("fd", "integer", "which of its descriptors; by default all", optional=True),
    ),
    Command(
        "query-fdsets",
        query_fdsets,
        returns=[{"fdset-id": "int", "fds": [{"fd": "int", "*opaque": "str"}]}],
    ),
)
