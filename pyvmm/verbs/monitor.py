"""``pyvmm monitor``: one command, a script on standard input, or a session with line editing.

The lines are edited here; the VM sees whole ones. A live update of the VM leaves the session
alone, since the VM keeps the connection.
"""

from __future__ import annotations

import asyncio
import os
import socket
import sys
from typing import TYPE_CHECKING

from pyvmm.errors import ConfigError
from pyvmm.verbs.client import DisconnectedError, HmpClient, find

if TYPE_CHECKING:
    from collections.abc import Iterable

    from prompt_toolkit import PromptSession

_PROMPT = "(pyvmm) "
_QUIT = ("quit", "q")


def talk(name: str, command: str) -> int:
    """Run ``command`` in the monitor of a VM, or what a person or a script types; return the exit
    code: 1 if a command failed, or the VM went away unasked."""
    if "\n" in command or "\r" in command:
        raise ConfigError("COMMAND has more than one line; give several to standard input")
    with HmpClient(find(name)) as client:
        # A command may take its time: migrate is done when the guest runs on.
        client.timeout_s = None
        if command:
            return run(client, [command])
        if sys.stdin.isatty() and sys.stdout.isatty():
            return interact(client)
        return run(client, (line.rstrip("\n") for line in sys.stdin))


def run(client: HmpClient, lines: Iterable[str]) -> int:
    """Run lines and print their output; return the exit code."""
    code = 0
    for line in lines:
        try:
            text = client.run(line)
        except DisconnectedError:
            if line.strip() in _QUIT:
                return code
            raise
        print(text, end="", flush=True)
        code |= failed(text)
    return code


def failed(text: str) -> bool:
    """Return whether the output of a command says that it was not done."""
    last = text.rstrip("\n").rpartition("\n")[2]
    return text.startswith(("Error: ", "unknown command: ")) or last.startswith('Try "help ')


def interact(client: HmpClient) -> int:
    """Hold a session on the terminal until Ctrl-D or the VM's end; return the exit code."""
    session = _session(client)
    print(f"{client.banner}Ctrl-D leaves; the VM runs on.")
    while True:
        try:
            text = session.prompt(_PROMPT, pre_run=lambda: _watch(session, client))
        except KeyboardInterrupt:
            continue
        except EOFError:
            return 0
        for line in text.splitlines():
            try:
                print(client.run(line), end="", flush=True)
            except DisconnectedError:
                if line.strip() in _QUIT:
                    return 0
                raise


def _session(client: HmpClient) -> PromptSession[str]:
    from prompt_toolkit import PromptSession
    from prompt_toolkit.completion import NestedCompleter
    from prompt_toolkit.shortcuts import CompleteStyle

    from pyvmm.monitor.hmp.console_prompt import history

    # Not every terminal answers when it is asked where its cursor is.
    os.environ.setdefault("PROMPT_TOOLKIT_NO_CPR", "1")
    commands: dict[str, object] = dict.fromkeys(_names(client.run("help")))
    commands["info"] = dict.fromkeys(_names(client.run("help info"), skip="info "))
    return PromptSession(
        history=history(),
        completer=NestedCompleter.from_nested_dict(commands),
        complete_while_typing=False,
        complete_style=CompleteStyle.READLINE_LIKE,
    )


def _names(text: str, skip: str = "") -> list[str]:
    """Return the commands that ``help`` lists."""
    heads = [line.removeprefix(skip).partition(" ")[0] for line in text.splitlines()]
    return [name for head in heads for name in head.split("|") if name]


def _watch(session: PromptSession[str], client: HmpClient) -> None:
    """Leave the prompt when the VM closes the connection."""

    def readable() -> None:
        loop.remove_reader(client.socket)
        if not client.socket.recv(1, socket.MSG_PEEK):
            session.app.exit(exception=client.disconnected())

    loop = asyncio.get_running_loop()
    loop.add_reader(client.socket, readable)
