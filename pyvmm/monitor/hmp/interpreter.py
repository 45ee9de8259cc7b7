"""Runs one line of the human monitor: finds the command, reads its arguments, shows the result.

Main loop thread only. A result may come later (``migrate`` without -d): the line's reply is a
callback, called once.
"""

from __future__ import annotations

from pyvmm.core.threads import report_crash
from pyvmm.errors import PyvmmError
from pyvmm.monitor.hmp.commands import COMMANDS, INFO
from pyvmm.monitor.hmp.parser import ParseError, first_word, parse_arguments

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


class Interpreter:
    """The human monitor of one user.

    :param can_wait: whether a command may reply later
    """

    def __init__(self, context: Context, *, can_wait: bool = True) -> None:
        self.context = context
        self.can_wait = can_wait
        # x and xp go on in the format they were last told.
        self.dump_kind = "x"
        self.dump_size = 4

    def execute(self, line: str, done: Callable[[str], None]) -> None:
        """Run a line.

        :param done: called once with the output, lines ending in a newline; of a line that
            ends the machine, not at all
        """
        reply = Reply(done)
        try:
            text = self._run(line, reply)
        except ParseError as error:
            text = f"{error}\n"
        except PyvmmError as error:
            text = f"Error: {error}\n"
        except Exception as error:
            # A bug in a command must not take the guest down with it.
            report_crash(error)
            text = f"Error: internal error ({type(error).__name__}); details are on stderr\n"
        else:
            if reply.deferred:
                return
        reply.finish(text)

    def _run(self, line: str, reply: Reply) -> str:
        name, rest = first_word(line)
        if not name or name.startswith("#"):
            return ""
        command = COMMANDS.get(name)
        full = name
        if command is not None and command.name == "info":
            item, after = first_word(rest)
            if item:
                full = f"info {item}"
                command, rest = INFO.get(item), after
        if command is None:
            raise ParseError(f"unknown command: '{full}'")
        try:
            arguments = parse_arguments(full, command.arguments, rest, self.register)
        except ParseError as error:
            raise ParseError(f'{error}\nTry "help {full}" for more information') from None
        return command.run(self, reply, arguments) or ""

    def register(self, name: str) -> int | None:
        """The value of a register of the current CPU, by the names that ``$name`` takes."""
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
