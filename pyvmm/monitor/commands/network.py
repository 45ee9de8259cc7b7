"""Networks: devices, and the back ends that they sit on."""

from __future__ import annotations

from pyvmm.errors import CommandError
from pyvmm.monitor.registry import Argument, Command, Context

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from pyvmm.monitor.registry import Shape


def _devices(context: Context) -> list[tuple[str, str, dict[str, Any]]]:
    """Return for each device on a network its name (the id, or one that QEMU would give), its model
    and its properties."""
    found: list[tuple[str, str, dict[str, Any]]] = []
    for device in context.machine.devices:
        properties = device.properties()
        if "netdev" in properties:
            number = sum(model == device.name for _, model, _ in found)
            found.append((device.id or f"{device.name}.{number}", device.name, properties))
    return found


def query_network(context: Context) -> list[dict[str, Any]]:
    """Return the network back ends, each with the device that uses it."""
    devices = {found["netdev"]: (name, model, found) for name, model, found in _devices(context)}
    netdevs = context.machine.netdevs
    found = []
    for id, netdev in netdevs.items() if netdevs is not None else ():
        entry: dict[str, Any] = {
            "id": id,
            "type": netdev.kind,
            "link-up": netdev.link_up,
            "properties": {key: str(value) for key, value in netdev.info.items()},
        }
        if id in devices:
            name, model, properties = devices[id]
            entry["nic"] = {"name": name, "model": model, "mac": properties["mac"]}
        found.append(entry)
    return found


def query_rx_filter(context: Context, name: str | None = None) -> list[dict[str, Any]]:
    """Return what the network devices pass on to the guest: without a control queue, everything."""
    found = [
        {
            "name": id,
            "promiscuous": True,
            "multicast": "all",
            "unicast": "all",
            "vlan": "all",
            "broadcast-allowed": True,
            "multicast-overflow": False,
            "unicast-overflow": False,
            "main-mac": properties["mac"],
            "vlan-table": [],
            "unicast-table": [],
            "multicast-table": [],
        }
        for id, _, properties in _devices(context)
        if name in (None, id)
    ]
    if name is not None and not found:
        raise CommandError(f"invalid net client name: {name}")
    return found


_FILTER_STATE: Shape = ("normal", "none", "all")

COMMANDS = (
    Command(
        "x-query-network",
        query_network,
        returns=[
            {
                "id": "str",
                "type": ("tap", "stream", "passt"),
                "link-up": "bool",
                "properties": "any",
                "*nic": {"name": "str", "model": "str", "mac": "str"},
            }
        ],
    ),
    Command(
        "query-rx-filter",
        query_rx_filter,
        Argument("name", "string", "which device; by default all", optional=True),
        returns=[
            {
                "name": "str",
                "promiscuous": "bool",
                "multicast": _FILTER_STATE,
                "unicast": _FILTER_STATE,
                "vlan": _FILTER_STATE,
                "broadcast-allowed": "bool",
                "multicast-overflow": "bool",
                "unicast-overflow": "bool",
                "main-mac": "str",
                "vlan-table": ["int"],
                "unicast-table": ["str"],
                "multicast-table": ["str"],
            }
        ],
    ),
)
