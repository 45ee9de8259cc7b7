"""The human monitor's commands, through the machine monitor."""

from __future__ import annotations

from pyvmm.monitor.hmp.interpreter import Interpreter
from pyvmm.monitor.registry import Argument, Command, Context


def human_monitor_command(context: Context, command_line: str, cpu_index: int | None = None) -> str:
    """Run a line of the human monitor and return what it prints.

    A command that would wait there (migrate without -d) does not wait here.
    """
    own = Context(context.machine, context.migration, context.registry)
    if cpu_index is not None:
        own.cpu(cpu_index)
        own.cpu_index = cpu_index
    texts: list[str] = []
    Interpreter(own, can_wait=False).execute(command_line, texts.append)
    return "".join(texts).replace("\n", "\r\n")


COMMANDS = (
    Command(
        "human-monitor-command",
        human_monitor_command,
        Argument("command-line", "string", "as typed at the prompt"),
        Argument("cpu-index", "integer", "whose registers and memory it means", optional=True),
        returns="str",
    ),
)
