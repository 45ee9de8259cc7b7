"""One user of the human monitor as commands see it: what they act on, and where their output goes.

Main loop thread only.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from pyvmm.monitor.registry import Context

_SEGMENT_REGISTERS = ("es", "cs", "ss", "ds", "fs", "gs")
_WIDE = {"pc": "rip", "flags": "rflags"}


class Reply:
    """Where a line's output goes, all of it at once."""

    __slots__ = ("_done", "deferred")

    def __init__(self, done: Callable[[str], None]) -> None:
        self._done: Callable[[str], None] | None = done
        #: Set by a command whose result comes later.
        self.deferred = False

    def finish(self, text: str) -> None:
        """Hand the output over; the first call counts."""
        done, self._done = self._done, None
        if done is not None:
            done(text)


class HmpSession:
    """What lasts from one line of a user's to the next.

    :param can_wait: whether a command may reply later
    """

    def __init__(self, context: Context, *, can_wait: bool) -> None:
        self.context = context
        self.can_wait = can_wait
        # x and xp go on in the format they were last told.
        self.dump_kind = "x"
        self.dump_size = 4

    def register(self, name: str) -> int | None:
        """Return the value of a register of the current CPU, by the names that ``$name`` takes;
        None if there is none of that name."""
        known = self.context.execute("x-query-registers", {"cpu-index": self.context.cpu_index})
        name = _WIDE.get(name, name)
        if name in _SEGMENT_REGISTERS:
            return int(known[name]["selector"])
        segment, _, field = name.partition(".")
        if segment in _SEGMENT_REGISTERS and field in ("base", "limit"):
            return int(known[segment][field])
        if name[:1] == "e" and isinstance(known.get("r" + name[1:]), int) and name != "efer":
            return int(known["r" + name[1:]]) & 0xFFFFFFFF
        value = known.get(name)
        return value if type(value) is int and name != "cpu-index" else None
