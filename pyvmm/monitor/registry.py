"""One registry of commands, for both monitors: what each is called, takes, and returns.

A command is a function over a :class:`Context` that takes its arguments by name and returns
plain data (dict, list, str, int, None), ready to be written as JSON; the human monitor renders
the same data as text. Everything here runs on the main loop thread.
"""

from __future__ import annotations

from pyvmm.core.runstate import INMIGRATE
from pyvmm.errors import CommandError, StateError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from typing import Any

    from pyvmm.chardev.rights import Rights

    # What a value looks like: a type of _TYPES or a QAPI built-in (str, int, number, bool,
    # null, any), a tuple of words, [shape of the elements], or {member: shape}, where a
    # member with a * may be absent.
    Shape = str | tuple[str, ...] | list["Shape"] | dict[str, "Shape"]

_TYPES: dict[str, tuple[type, ...]] = {
    "string": (str,),
    "integer": (int,),
    "boolean": (bool,),
    "object": (dict,),
    "array": (list,),
    "value": (str, int, bool, list, dict),
}


class CommandNotFound(CommandError):
    """No command has that name (QMP's error class of the same name)."""


class DeviceNotFound(CommandError):
    """Nothing has that path (QMP's error class of the same name)."""


class Argument:
    """One argument.

    :param type: ``string``, ``integer``, ``boolean``, ``object``, ``array``, or ``value`` for
        any of them
    :param shape: what query-qmp-schema says, if that is more than the type
    """

    __slots__ = ("doc", "name", "optional", "shape", "type")

    def __init__(
        self,
        name: str,
        type: str,
        doc: str,
        *,
        optional: bool = False,
        shape: Shape | None = None,
    ) -> None:
        self.name = name
        self.type = type
        self.doc = doc
        self.optional = optional
        self.shape: Shape = type if shape is None else shape

    def check(self, value: object) -> None:
        """Refuse a value of another type; a boolean is no integer.

        :raises CommandError: with QMP's text
        """
        allowed = _TYPES[self.type]
        if not isinstance(value, allowed) or (isinstance(value, bool) and bool not in allowed):
            raise CommandError(f"Invalid parameter type for '{self.name}', expected: {self.type}")
        if isinstance(value, int) and not -(1 << 63) <= value < 1 << 64:
            raise CommandError(f"Parameter '{self.name}' is out of range")


class Command:
    """A command's function and what is said about it; its doc is the function's docstring.

    :param function: called as ``function(context, **arguments)``, dashes in argument names
        written as underscores
    :param in_migrate: allowed while the machine waits for an incoming migration
    :param oob: may be executed out of band
    :param returns: what it returns, for query-qmp-schema
    """

    __slots__ = ("arguments", "function", "in_migrate", "name", "oob", "returns")

    def __init__(
        self,
        name: str,
        function: Callable[..., Any],
        *arguments: Argument,
        in_migrate: bool = True,
        oob: bool = False,
        returns: Shape | None = None,
    ) -> None:
        self.name = name
        self.function = function
        self.arguments = arguments
        self.in_migrate = in_migrate
        self.oob = oob
        self.returns: Shape = {} if returns is None else returns

    @property
    def doc(self) -> str:
        """What the command does, one line."""
        return (self.function.__doc__ or "").partition("\n")[0]


class Registry:
    """Commands by their QMP names."""

    def __init__(self, commands: Iterable[Command]) -> None:
        self.commands = {command.name: command for command in commands}

    def execute(self, context: Context, name: str, arguments: dict[str, Any]) -> Any:
        """Check the arguments, in QMP's types and names, run the command, and return its result.

        :raises CommandNotFound: no such command
        :raises PyvmmError: it was refused; the text is for the user
        """
        command = self.commands.get(name)
        if command is None:
            raise CommandNotFound(f"The command {name} has not been found")
        if not command.in_migrate and context.machine.runstate.state == INMIGRATE:
            raise StateError(f"The command {name} has to wait for the incoming migration")
        wanted = {argument.name: argument for argument in command.arguments}
        for argument in command.arguments:
            if argument.name in arguments:
                argument.check(arguments[argument.name])
            elif not argument.optional:
                raise CommandError(f"Parameter '{argument.name}' is missing")
        for key in arguments:
            if key not in wanted:
                raise CommandError(f"Parameter '{key}' is unexpected")
        return command.function(
            context, **{key.replace("-", "_"): value for key, value in arguments.items()}
        )


class Context:
    """What the commands of one monitor act on.

    :param machine: the machine
    :param migration: its migration manager
    :param registry: the commands
    :param rights: the descriptors that its client sent along, if it can
    """

    __slots__ = ("cpu_index", "machine", "migration", "registry", "rights")

    def __init__(
        self,
        machine: Any,
        migration: Any,
        registry: Registry,
        rights: Rights | None = None,
    ) -> None:
        self.machine = machine
        self.migration = migration
        self.registry = registry
        self.rights = rights
        #: The vCPU whose registers and memory the human monitor shows.
        self.cpu_index = 0

    def execute(self, name: str, arguments: dict[str, Any] | None = None) -> Any:
        """Run a command and return its result; see :meth:`Registry.execute`."""
        return self.registry.execute(self, name, arguments or {})

    def cpu(self, index: int | None = None) -> Any:
        """Return the vCPU with that index, by default the monitor's own.

        :raises CommandError: there is none
        """
        index = self.cpu_index if index is None else index
        if not 0 <= index < len(self.machine.cpus):
            raise CommandError(f"CPU#{index} not available")
        return self.machine.cpus[index]
