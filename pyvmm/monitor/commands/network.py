"""Networks: devices, and the back ends that they sit on."""

from __future__ import annotations

from pyvmm.errors import CommandError
from pyvmm.monitor.registry import Argument, Command, Context

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from pyvmm.monitor.registry import Shape

_MODEL = "virtio-net-device"


def _devices(context: Context) -> list[tuple[str, Any]]:
    """Names (the id, or one that QEMU would give) and network devices."""
    found = [device for device in context.machine.devices if device.name == _MODEL]
    return [(each.id or f"{_MODEL}.{n}", each.device) for n, each in enumerate(found)]


def _mac(device: Any) -> str:
    return ":".join(f"{byte:02x}" for byte in device.mac)


def query_network(context: Context) -> list[dict[str, Any]]:
    """The network back ends, each with the device that sits on it."""
    devices = {device.backend.id: (name, device) for name, device in _devices(context)}
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
            name, device = devices[id]
            entry["nic"] = {"name": name, "model": device.name, "mac": _mac(device)}
        found.append(entry)
    return found


def query_rx_filter(context: Context, name: str | None = None) -> list[dict[str, Any]]:
    """What the network devices pass on to the guest: without a control queue, all there is."""
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
            "main-mac": _mac(device),
            "vlan-table": [],
            "unicast-table": [],
            "multicast-table": [],
        }
        for id, device in _devices(context)
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
