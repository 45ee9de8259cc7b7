"""What Tab offers on the human monitor's command line; knows nothing of terminals.

Called on the console's thread: it reads only what does not change, or changes whole.
"""

from __future__ import annotations

import os

from pyvmm.monitor.hmp.commands import COMMANDS, INFO

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

    from pyvmm.migration.params import Settings
    from pyvmm.monitor.registry import Context

_REGISTERS = (
    *("rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rbp", "rsp", "rip", "rflags"),
    *(f"r{number}" for number in range(8, 16)),
    *("eax", "ebx", "ecx", "edx", "esi", "edi", "ebp", "esp", "eip"),
    *("cs", "ds", "es", "fs", "gs", "ss", "fs.base", "gs.base"),
    *("cr0", "cr2", "cr3", "cr4", "cr8", "efer", "pc"),
    *("dr0", "dr1", "dr2", "dr3", "dr6", "dr7"),
)
_MAX_FILES = 200


def complete(line: str, context: Context) -> list[tuple[str, str]]:
    """Return what the last word of ``line`` may become: (word, what it means), in order."""
    *before, word = line.lstrip().split(" ")
    before = [one for one in before if one]
    return [(text, about) for text, about in _candidates(before, word, context) if text != word]


def _candidates(before: list[str], word: str, context: Context) -> Iterable[tuple[str, str]]:
    dollar = word.rfind("$")
    if before and dollar >= 0:
        start = word[: dollar + 1]
        return [(start + name, "") for name in _REGISTERS if name.startswith(word[dollar + 1 :])]
    if before and word.startswith("file:") and before[0].startswith("migrate"):
        return [(f"file:{path}", "") for path in _files(word[5:])]
    return [one for one in _words(before, context) if one[0].startswith(word)]


def _words(before: list[str], context: Context) -> Iterable[tuple[str, str]]:
    if not before or before == ["help"] or before == ["?"]:
        return [(name, command.help) for name, command in sorted(COMMANDS.items())]
    if before[-1] == "info" and len(before) == (2 if before[0] in ("help", "?") else 1):
        return [(name, command.help) for name, command in INFO.items()]
    command, *arguments = before
    if command == "info" and arguments == ["registers"]:
        return [("-a", "all vCPUs"), *_cpus(context)]
    if before == ["info", "migrate"]:
        return [("-a", "with global settings")]
    if command == "cpu" and not arguments:
        return _cpus(context)
    if command == "migrate" and all(one.startswith("-") for one in arguments):
        switches = [("-d", "do not wait for the end")] if not arguments else []
        return [*switches, ("file:", "a file")]
    if command == "migrate_incoming" and not arguments:
        return [("file:", "a file")]
    if command == "migrate_set_parameter":
        return _settings(arguments, context.migration.parameters)
    if command == "migrate_set_capability":
        return _settings(arguments, context.migration.capabilities)
    return []


def _cpus(context: Context) -> list[tuple[str, str]]:
    return [(str(cpu.index), "") for cpu in context.machine.cpus]


def _settings(arguments: list[str], settings: Settings) -> Iterable[tuple[str, str]]:
    if not arguments:
        return [(name, "") for name in settings.names()]
    if len(arguments) == 1:
        return [(word, "") for word in settings.words(arguments[0])]
    return []


def _files(start: str) -> list[str]:
    folder, _, prefix = start.rpartition("/")
    shown = folder + "/" if "/" in start else ""
    found = []
    try:
        with os.scandir(shown or ".") as entries:
            for entry in entries:
                hidden = entry.name.startswith(".") and not prefix.startswith(".")
                if entry.name.startswith(prefix) and not hidden:
                    found.append(shown + entry.name + ("/" if entry.is_dir() else ""))
                if len(found) == _MAX_FILES:
                    break
    except OSError:
        return []
    return sorted(found)
