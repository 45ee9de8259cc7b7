"""The object tree, for clients that look around in it: the machine, its memory, its devices.

Made up from the machine whenever it is asked for. Left out: partial paths, links, setting a
property, types and their properties.
"""

from __future__ import annotations

from pyvmm.errors import CommandError
from pyvmm.machine.config import MACHINE_TYPE
from pyvmm.monitor.registry import Argument, Command, Context, DeviceNotFound

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


class Node:
    """An object of the tree.

    :param type: its QOM type
    :param properties: names and values, beside ``type``
    :param children: by name
    """

    __slots__ = ("children", "properties", "type")

    def __init__(
        self,
        type: str,
        properties: dict[str, Any] | None = None,
        children: dict[str, Node] | None = None,
    ) -> None:
        self.type = type
        self.properties = {"type": type, **(properties or {})}
        self.children = children or {}


def qom_list(context: Context, path: str) -> list[dict[str, Any]]:
    """Return the properties of an object, its children among them."""
    node = _find(context, path)
    found = [{"name": name, "type": _type(value)} for name, value in node.properties.items()]
    found += [
        {"name": name, "type": f"child<{child.type}>"} for name, child in node.children.items()
    ]
    return found


def qom_get(context: Context, path: str, property: str) -> Any:
    """Return the value of a property; of a child, its path."""
    node = _find(context, path)
    if property in node.properties:
        return node.properties[property]
    if property in node.children:
        return f"{path.rstrip('/')}/{property}"
    raise CommandError(f"Property '{node.type}.{property}' not found")


def _find(context: Context, path: str) -> Node:
    node = _tree(context)
    if not path.startswith("/"):
        raise DeviceNotFound(f"Device '{path}' not found")
    for name in filter(None, path.split("/")):
        if name not in node.children:
            raise DeviceNotFound(f"Device '{path}' not found")
        node = node.children[name]
    return node


def _tree(context: Context) -> Node:
    machine = context.machine
    cpus = {
        f"cpu[{cpu.index}]": Node("host-x86_64-cpu", {"apic-id": cpu.index}) for cpu in machine.cpus
    }
    devices = {
        f"device[{index}]": Node(device.name, device.properties())
        for index, device in enumerate(machine.devices)
    }
    chardevs = {
        label: Node("chardev", {"filename": chardev.filename})
        for label, chardev in machine.chardevs.items()
    }
    # The machine's own memory is no object, and gives way to one of its name.
    renamed = {backend.id for backend in machine.ram_blocks if backend.name != backend.id}
    memory = {
        backend.id: Node(
            backend.config.kind,
            {
                "size": backend.size,
                "share": backend.config.share,
                "prealloc": backend.config.prealloc,
                "merge": backend.config.merge,
                "dump": backend.config.dump,
            },
        )
        for backend in machine.ram_blocks
        if backend.name != backend.id or backend.id not in renamed
    }
    board = Node(
        f"{MACHINE_TYPE}-machine",
        {"memory": machine.config.memory_size, "smp": machine.config.smp},
        {**cpus, "unattached": Node("container", children=devices)},
    )
    return Node(
        "container",
        children={
            "machine": board,
            "objects": Node("container", children=memory),
            "chardevs": Node("container", children=chardevs),
        },
    )


def _type(value: object) -> str:
    if isinstance(value, bool):
        return "bool"
    return "int" if isinstance(value, int) else "string"


_PATH = Argument("path", "string", "path of the object, e.g. /machine")

COMMANDS = (
    Command("qom-list", qom_list, _PATH, returns=[{"name": "str", "type": "str"}]),
    Command(
        "qom-get",
        qom_get,
        _PATH,
        Argument("property", "string", "name of the property"),
        returns="any",
    ),
)
