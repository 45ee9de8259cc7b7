"""The command of a cpr-exec: can it be executed, and is it a pyvmm of the same shape?

All of it is looked at while the guest runs, so that a command that cannot work costs nothing.
"""

from __future__ import annotations

import os
import stat

from pyvmm.errors import ConfigError, MigrationError
from pyvmm.machine import options
from pyvmm.migration.uri import FileUri

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pyvmm.machine.config import MachineConfig


def find_program(name: str) -> str:
    """The path of the program that execve is to be given.

    :raises MigrationError: if there is none that can be executed
    """
    folders = [""] if "/" in name else os.get_exec_path()
    problem = "No such file or directory"
    for folder in folders:
        path = os.path.join(folder, name)
        try:
            status = os.stat(path)
        except OSError as error:
            if folders == [""]:
                problem = error.strerror or problem
            continue
        if stat.S_ISREG(status.st_mode) and os.access(path, os.X_OK):
            _check_interpreter(path)
            return path
        problem = "Permission denied"
    raise MigrationError(f"cpr-exec-command: {name} cannot be executed: {problem}")


def check(command: list[str], machine: MachineConfig, uri: FileUri) -> None:
    """See that ``command`` continues this machine from ``uri``.

    :raises MigrationError: naming the option that differs, and both values
    """
    arguments = _arguments(command)
    if "-incoming" not in arguments and "--incoming" not in arguments:
        raise MigrationError(
            "cpr-exec-command: -incoming is missing; without it the new pyvmm would start a "
            f"guest of its own: add -incoming {uri.text}"
        )
    try:
        new = options.parse(arguments)
    except ConfigError as error:
        raise MigrationError(f"cpr-exec-command: {error}") from None
    except options.HelpRequested:
        raise MigrationError("cpr-exec-command: it only prints help") from None
    if new.incoming != "defer" and FileUri(new.incoming) != uri:
        raise MigrationError(
            f"cpr-exec-command: -incoming {new.incoming}: the state goes to {uri.text}; "
            "make them equal"
        )
    own, other = machine.shape(), new.shape()
    for option, value in own.items():
        if other[option] != value:
            raise MigrationError(
                f"cpr-exec-command: {option} is {other[option] or 'nothing'}, "
                f"this machine has {value or 'nothing'}; make them equal"
            )


def _arguments(command: list[str]) -> list[str]:
    # "pyvmm run ...", "python -m pyvmm run ...", "env X=Y /venv/bin/pyvmm run ...".
    if "run" not in command:
        raise MigrationError(
            f"cpr-exec-command: {' '.join(command)} is no pyvmm run command; give 'pyvmm run ...'"
        )
    return command[command.index("run") + 1 :]


def _check_interpreter(path: str) -> None:
    # execve of a script whose interpreter is missing fails only then.
    with open(path, "rb") as file:
        head = file.read(256)
    if head[:2] == b"#!":
        words = head[2:].split(b"\n")[0].split()
        if not words or not os.access(words[0], os.X_OK):
            shown = words[0].decode("utf-8", "replace") if words else ""
            raise MigrationError(
                f"cpr-exec-command: {path}: its interpreter {shown!r} cannot be executed"
            )
    elif head[:4] != b"\x7fELF":
        raise MigrationError(f"cpr-exec-command: {path} is neither a program nor a script")
