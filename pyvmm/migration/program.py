"""The program of an update: where it is, and whether it can be executed at all."""

from __future__ import annotations

import os
import stat

from pyvmm.errors import MigrationError


def find(name: str) -> str:
    """Return the path of the program that execve is to be given.

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
    raise MigrationError(f"{name} cannot be executed: {problem}")


def _check_interpreter(path: str) -> None:
    # execve of a script whose interpreter is missing fails only then.
    try:
        with open(path, "rb") as file:
            head = file.read(256)
    except PermissionError:
        return  # may be executed and not read
    except OSError as error:
        raise MigrationError(f"{path}: {error.strerror}") from None
    if head[:2] == b"#!":
        words = head[2:].split(b"\n")[0].split()
        if not words or not os.access(words[0], os.X_OK):
            shown = words[0].decode("utf-8", "replace") if words else ""
            raise MigrationError(f"{path}: its interpreter {shown!r} cannot be executed")
    elif head[:4] != b"\x7fELF":
        raise MigrationError(f"{path} is neither a program nor a script")
