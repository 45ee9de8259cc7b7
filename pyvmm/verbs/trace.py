"""Where ``pyvmm update --trace`` writes to, and what: Chrome trace events, or
:mod:`pyvmm.verbs.picture`'s.
"""

from __future__ import annotations

import json
import os
import stat
from typing import Any, Self

from pyvmm.errors import ConfigError, HostError
from pyvmm.verbs.picture import draw
from pyvmm.verbs.timeline import lanes

_SVG = ".svg"


def events(title: str, pid: int, timeline: list[dict[str, Any]]) -> dict[str, Any]:
    """Return an update as Chrome trace events, the object of the JSON Object Format: what
    ui.perfetto.dev and chrome://tracing open.

    :param title: the process's name there
    :param pid: of the VM
    :param timeline: see :mod:`pyvmm.verbs.timeline`
    """
    found: list[dict[str, Any]] = [_named("process_name", pid, 0, title)]
    for tid, lane in enumerate(lanes(timeline)):
        found.append(_named("thread_name", pid, tid, lane.name))
        found.append(_event("thread_sort_index", pid, tid, {"sort_index": tid}))
        found += [
            {
                "name": span.name,
                "cat": "update",
                "ph": "X",
                "ts": span.begin,
                "dur": round(span.end - span.begin, 3),
                "pid": pid,
                "tid": tid,
            }
            for span in lane.spans
        ]
    return {"traceEvents": found, "displayTimeUnit": "ms"}


def _named(kind: str, pid: int, tid: int, name: str) -> dict[str, Any]:
    return _event(kind, pid, tid, {"name": name})


def _event(kind: str, pid: int, tid: int, arguments: dict[str, Any]) -> dict[str, Any]:
    # Metadata: "M" has no time.
    return {"name": kind, "ph": "M", "pid": pid, "tid": tid, "args": arguments}


def render(path: str, title: str, pid: int, timeline: list[dict[str, Any]]) -> str:
    """Return what is to be written to ``path``: a picture if it ends in .svg, else events."""
    if path.lower().endswith(_SVG):
        return draw(title, lanes(timeline))
    return json.dumps(events(title, pid, timeline), indent=1) + "\n"


class TraceFile:
    """The file that ``--trace`` names. It is opened before the update begins, so what is wrong
    with it is told then; what is in it stays until there is something to write. Use as a context
    manager.

    :raises ConfigError: it cannot be written
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self._written = False
        try:
            self._created = not os.path.lexists(path)
            flags = os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC
            self._file = open(os.open(path, flags, 0o666), "w", encoding="utf-8")  # noqa: SIM115
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise ConfigError(
                f"--trace {path}: {reason}; name a file in a directory that you may write to"
            ) from None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self._file.close()
        except OSError:
            pass  # It was told of, or nothing was written.
        if self._created and not self._written:
            os.unlink(self.path)

    def write(self, title: str, pid: int, timeline: list[dict[str, Any]]) -> None:
        """Write it, in place of what was in it.

        :raises HostError: the host has no room for it
        """
        text = render(self.path, title, pid, timeline)
        try:
            if stat.S_ISREG(os.fstat(self._file.fileno()).st_mode):
                self._file.truncate(0)
            self._file.write(text)
            self._file.flush()
        except OSError as error:
            raise HostError(f"--trace {self.path}: {error.strerror}; it is incomplete") from None
        self._written = True
