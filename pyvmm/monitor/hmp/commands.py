"""The table of the human monitor's commands: names, arguments, help, and what each shows.

Each calls commands of the registry and renders what they return.
"""

from __future__ import annotations

from pyvmm import __version__
from pyvmm.errors import CommandError
from pyvmm.migration.params import split_command
from pyvmm.monitor.hmp import render
from pyvmm.monitor.hmp.parser import ParseError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from pyvmm.monitor.hmp.parser import Format
    from pyvmm.monitor.hmp.session import HmpSession, Reply

    Arguments = dict[str, Any]
    Function = Callable[[HmpSession, Reply, Arguments], str | None]


class HumanCommand:
    """One command.

    :param names: separated by ``|``, the full one first
    :param arguments: as in :mod:`pyvmm.monitor.hmp.parser`
    :param parameters: the same for people
    :param run: called with the interpreter, the reply (for those that finish later) and the
        arguments; returns the output
    """

    __slots__ = ("arguments", "help", "names", "parameters", "run")

    def __init__(
        self, names: str, arguments: str, parameters: str, help: str, run: Function
    ) -> None:
        self.names = names.split("|")
        self.arguments = arguments
        self.parameters = parameters
        self.help = help
        self.run = run

    @property
    def name(self) -> str:
        """The full name."""
        return self.names[0]

    def usage(self, prefix: str = "") -> str:
        """Return the line that ``help`` shows."""
        head = " ".join(filter(None, (prefix + "|".join(self.names), self.parameters)))
        return f"{head} -- {self.help}\n"


def _simple(command: str) -> Function:
    """Return the function of a command without arguments and without output."""

    def run(session: HmpSession, _reply: Reply, _arguments: Arguments) -> None:
        session.context.execute(command)

    return run


def _shown(command: str, show: Callable[[Any], str]) -> Function:
    """Return the function of a query whose result ``show`` turns into text."""

    def run(session: HmpSession, _reply: Reply, _arguments: Arguments) -> str:
        return show(session.context.execute(command))

    return run


def _help(_session: HmpSession, _reply: Reply, arguments: Arguments) -> str:
    words = (arguments["name"] or "").split()
    if not words:
        return "".join(command.usage() for command in _COMMANDS)
    if words[0] == "info" and len(words) == 1:
        return _info(_session, _reply, arguments)
    table, prefix, name = (COMMANDS, "", words[0])
    if words[0] == "info":
        table, prefix, name = (INFO, "info ", words[1])
    if name not in table:
        raise ParseError(f"unknown command: '{prefix}{name}'")
    return table[name].usage(prefix)


def _info(_session: HmpSession, _reply: Reply, _arguments: Arguments) -> str:
    return "".join(item.usage("info ") for item in _INFO)


def _quit(session: HmpSession, reply: Reply, _arguments: Arguments) -> None:
    session.context.execute("quit")
    # No prompt after this; a caller that does not wait gets its empty answer at once.
    reply.deferred = session.can_wait


# --- memory and ports --------------------------------------------------------------------------


def _examine(physical: bool) -> Function:
    def run(session: HmpSession, _reply: Reply, arguments: Arguments) -> str:
        fmt: Format = arguments["fmt"]
        kind = fmt.kind or session.dump_kind
        if kind == "i":
            raise CommandError("Disassembly is not available: pyvmm contains no disassembler")
        size = 1 if kind == "c" else fmt.size or session.dump_size
        session.dump_kind, session.dump_size = kind, fmt.size or session.dump_size
        count = 1 if fmt.count is None else fmt.count
        if not count:
            return ""
        text = session.context.execute(
            "x-read-memory",
            {
                "address": arguments["addr"],
                "size": count * size,
                "physical": physical,
                "cpu-index": session.context.cpu_index,
            },
        )
        data = bytes.fromhex(text)
        shown = render.dump(arguments["addr"], data, kind, size, 8 if physical else 16)
        return shown if len(data) == count * size else f"{shown}Cannot access memory\n"

    return run


def _print(_session: HmpSession, _reply: Reply, arguments: Arguments) -> str:
    kind = arguments["fmt"].kind or "d"
    if kind == "i":
        raise CommandError("An expression cannot be shown as an instruction")
    return render.number(arguments["val"], kind) + "\n"


def _port_size(session: HmpSession, arguments: Arguments) -> int:
    # As in QEMU: the size of the last x, xp, i or o goes on, and 8 bytes are none for a port.
    session.dump_size = arguments["fmt"].size or session.dump_size
    return session.dump_size if session.dump_size <= 4 else 1


def _input(session: HmpSession, _reply: Reply, arguments: Arguments) -> str:
    size, port = _port_size(session, arguments), arguments["addr"] & 0xFFFF
    if arguments["index"] is not None:
        write = {"port": port, "size": 1, "value": arguments["index"] & 0xFF}
        session.context.execute("x-write-port", write)
        port += 1
    value = session.context.execute("x-read-port", {"port": port & 0xFFFF, "size": size})
    suffix = {1: "b", 2: "w", 4: "l"}[size]
    return f"port{suffix}[0x{port:04x}] = 0x{value:0{2 * size}x}\n"


def _output(session: HmpSession, _reply: Reply, arguments: Arguments) -> None:
    write = {
        "port": arguments["addr"] & 0xFFFF,
        "size": _port_size(session, arguments),
        "value": arguments["val"],
    }
    session.context.execute("x-write-port", write)


# --- CPUs --------------------------------------------------------------------------------------


def _cpu(session: HmpSession, _reply: Reply, arguments: Arguments) -> None:
    if not 0 <= arguments["index"] < len(session.context.machine.cpus):
        raise CommandError("invalid CPU index")
    session.context.cpu_index = arguments["index"]


def _info_cpus(session: HmpSession, _reply: Reply, _arguments: Arguments) -> str:
    return render.cpus(session.context.execute("query-cpus-fast"), session.context.cpu_index)


def _info_registers(session: HmpSession, _reply: Reply, arguments: Arguments) -> str:
    context = session.context
    chosen = context.cpu_index if arguments["vcpu"] is None else arguments["vcpu"]
    if not arguments["all"] and not 0 <= chosen < len(context.machine.cpus):
        return f"CPU#{chosen} not available\n"
    indices = range(len(context.machine.cpus)) if arguments["all"] else [chosen]
    return "".join(
        render.registers(context.execute("x-query-registers", {"cpu-index": index}))
        for index in indices
    )


# --- migration ---------------------------------------------------------------------------------


def _migrate(session: HmpSession, reply: Reply, arguments: Arguments) -> None:
    if arguments["detach"] or not session.can_wait:
        options = {"uri": arguments["uri"], "resume": arguments["resume"]}
        session.context.execute("migrate", options)
    else:
        session.context.migration.start(arguments["uri"], False, _wait(reply))


def _update(session: HmpSession, reply: Reply, arguments: Arguments) -> None:
    text = arguments["command"]
    command = split_command(text) if text else None
    if arguments["detach"] or not session.can_wait:
        session.context.execute("update", {"command": command} if command else {})
    else:
        session.context.migration.update(command, _wait(reply))


def _wait(reply: Reply) -> Callable[[str | None], None]:
    # The prompt comes back when the migration ends; after an exec the new image shows it.
    reply.deferred = True
    return lambda error: reply.finish(f"Error: {error}\n" if error else "")


def _migrate_incoming(session: HmpSession, _reply: Reply, arguments: Arguments) -> None:
    session.context.execute("migrate-incoming", {"uri": arguments["uri"]})


def _set_parameter(session: HmpSession, _reply: Reply, arguments: Arguments) -> None:
    session.context.migration.parameters.set_text(arguments["parameter"], arguments["value"])


def _set_capability(session: HmpSession, _reply: Reply, arguments: Arguments) -> None:
    state = render.switch(arguments["state"])
    session.context.migration.capabilities.set_text(arguments["capability"], state)


def _info_migrate(session: HmpSession, _reply: Reply, arguments: Arguments) -> str:
    text = render.migrate(session.context.execute("query-migrate"))
    if arguments["all"]:
        text += render.migrate_globals(session.context.machine.config.only_migratable)
    return text


def _info_parameters(session: HmpSession, _reply: Reply, _arguments: Arguments) -> str:
    parameters = session.context.migration.parameters
    return "".join(f"{name}: {parameters.text(name)}\n" for name in parameters.names())


def _capabilities(data: list[dict[str, Any]]) -> str:
    return "".join(f"{one['capability']}: {render.switch(one['state'])}\n" for one in data)


_INFO = (
    HumanCommand(
        "block",
        "",
        "",
        "show the disks and their images",
        _shown("query-block", render.block),
    ),
    HumanCommand(
        "chardev",
        "",
        "",
        "show the character devices",
        _shown("query-chardev", render.chardev),
    ),
    HumanCommand("cpus", "", "", "show the vCPUs and their threads", _info_cpus),
    HumanCommand(
        "kvm",
        "",
        "",
        "show whether KVM is in use",
        _shown("query-kvm", lambda _: "kvm support: enabled\n"),
    ),
    HumanCommand(
        "memdev",
        "",
        "",
        "show the memory backends",
        _shown("query-memdev", render.memdev),
    ),
    HumanCommand(
        "messages",
        "",
        "",
        "show how many messages standard error did not take",
        _shown(
            "x-query-messages",
            lambda data: f"messages that standard error did not take: {data['dropped']}\n",
        ),
    ),
    HumanCommand(
        "migrate",
        "all:-a",
        "[-a]",
        "show how the last migration or live update went (-a: with global settings)",
        _info_migrate,
    ),
    HumanCommand(
        "migrate_capabilities",
        "",
        "",
        "show which migration capabilities are on",
        _shown("query-migrate-capabilities", _capabilities),
    ),
    HumanCommand("migrate_parameters", "", "", "show the migration parameters", _info_parameters),
    HumanCommand(
        "mtree",
        "",
        "",
        "show the address spaces and who answers in them",
        _shown("x-query-mtree", render.mtree),
    ),
    HumanCommand(
        "pci",
        "",
        "",
        "show the PCI bus and its devices",
        _shown("query-pci", render.pci),
    ),
    HumanCommand(
        "name",
        "",
        "",
        "show the name of the machine",
        _shown("query-name", lambda data: f"{data.get('name', '')}\n"),
    ),
    HumanCommand(
        "network",
        "",
        "",
        "show the network devices and what they are connected to",
        _shown("x-query-network", render.network),
    ),
    HumanCommand(
        "qtree",
        "",
        "",
        "show the devices and their properties",
        _shown("x-query-qtree", render.qtree),
    ),
    HumanCommand(
        "ramblock",
        "",
        "",
        "show the blocks of memory and where pyvmm has them",
        _shown("x-query-ramblock", render.ramblock),
    ),
    HumanCommand(
        "registers",
        "all:-a,vcpu:i?",
        "[-a|vcpu]",
        "show the registers of the current vCPU, of one, or of all (-a)",
        _info_registers,
    ),
    HumanCommand(
        "status",
        "",
        "",
        "show whether the machine runs, and if not why",
        _shown("query-status", render.status),
    ),
    HumanCommand(
        "version",
        "",
        "",
        "show the version of pyvmm",
        _shown("query-version", lambda _: f"{__version__}\n"),
    ),
)

_INFO_COMMAND = HumanCommand("info", "", "[subcommand]", "show something; see help info", _info)

_COMMANDS = (
    HumanCommand("cont|c", "", "", "let the paused guest run", _simple("cont")),
    HumanCommand("cpu", "index:i", "index", "choose the vCPU that x and info mean", _cpu),
    HumanCommand("help|?", "name:S?", "[command]", "show all commands, or one", _help),
    HumanCommand(
        "i",
        "fmt:/,addr:i,index:i.",
        "/fmt addr [.index]",
        "read from a port (/b, /h or /w: 1, 2 or 4 bytes; an index is written to it first)",
        _input,
    ),
    _INFO_COMMAND,
    HumanCommand(
        "migrate",
        "detach:-d,resume:-r,uri:s",
        "[-d] [-r] uri",
        "migrate, or update pyvmm in place, by way of uri (-d: do not wait for the end)",
        _migrate,
    ),
    HumanCommand("migrate_cancel", "", "", "cancel the migration", _simple("migrate_cancel")),
    HumanCommand(
        "migrate_incoming",
        "uri:s",
        "uri",
        "load the state that -incoming defer waits for",
        _migrate_incoming,
    ),
    HumanCommand(
        "migrate_set_capability",
        "capability:s,state:b",
        "capability on|off",
        "switch a migration capability",
        _set_capability,
    ),
    HumanCommand(
        "migrate_set_parameter",
        "parameter:s,value:S",
        "parameter value",
        "set a migration parameter",
        _set_parameter,
    ),
    HumanCommand(
        "o", "fmt:/,addr:i,val:i", "/fmt addr value", "write to a port (sizes as for i)", _output
    ),
    HumanCommand("print|p", "fmt:/,val:l", "/fmt expr", "show the value of an expression", _print),
    HumanCommand("quit|q", "", "", "end pyvmm and the guest", _quit),
    HumanCommand("stop|s", "", "", "pause the guest", _simple("stop")),
    HumanCommand(
        "system_powerdown",
        "",
        "",
        "press the power button",
        _simple("system_powerdown"),
    ),
    HumanCommand("system_reset", "", "", "press the reset button", _simple("system_reset")),
    HumanCommand(
        "update",
        "detach:-d,command:S?",
        "[-d] [command]",
        "update pyvmm in place, with its own command line or another (-d: do not wait)",
        _update,
    ),
    HumanCommand(
        "x",
        "fmt:/,addr:l",
        "/fmt addr",
        "show memory at a virtual address (fmt: count, x d u o or c, and b h w or g)",
        _examine(physical=False),
    ),
    HumanCommand(
        "xp",
        "fmt:/,addr:l",
        "/fmt addr",
        "show memory at a guest-physical address",
        _examine(physical=True),
    ),
)

#: By every name they have.
COMMANDS = {name: command for command in _COMMANDS for name in command.names}
INFO = {command.name: command for command in _INFO}
