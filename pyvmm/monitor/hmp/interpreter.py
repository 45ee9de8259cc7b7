"""Runs one line of the human monitor: finds the command, reads its arguments, shows the result.

Main loop thread only. A result may come later (``migrate`` without -d): the line's reply is a
callback, called once.
"""

from __future__ import annotations

from pyvmm.core.threads import report_crash
from pyvmm.errors import PyvmmError
from pyvmm.monitor.hmp.commands import COMMANDS, INFO
from pyvmm.monitor.hmp.parser import ParseError, first_word, parse_arguments
from pyvmm.monitor.hmp.session import HmpSession, Reply

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from pyvmm.monitor.registry import Context


class Interpreter:
    """The human monitor of one user.

    :param can_wait: whether a command may reply later
    """

    def __init__(self, context: Context, *, can_wait: bool = True) -> None:
        self.session = HmpSession(context, can_wait=can_wait)

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
            arguments = parse_arguments(full, command.arguments, rest, self.session.register)
        except ParseError as error:
            raise ParseError(f'{error}\nTry "help {full}" for more information') from None
        return command.run(self.session, reply, arguments) or ""
