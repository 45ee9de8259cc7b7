"""The PCI bus."""

from __future__ import annotations

from pyvmm.devices.pci import function as pci
from pyvmm.monitor.registry import Command, Context

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from pyvmm.devices.pci.function import Bar, Function
    from pyvmm.monitor.registry import Shape

#: QEMU's names of classes, by base class and subclass.
_CLASSES = {
    0x0100: "SCSI controller",
    0x0200: "Ethernet controller",
    0x0600: "Host bridge",
}
_NOWHERE = -1


def query_pci(context: Context) -> list[dict[str, Any]]:
    """Return the buses with their devices: none, or the one. A region that the guest has not
    enabled has the address -1."""
    host = context.machine.pci
    if host is None:
        return []
    # Without the bus's lock, which a vCPU may hold for as long as a disk that it resets hangs.
    devices = [_device(function) for function in host.functions.values()]
    return [{"bus": 0, "devices": devices}]


def _device(function: Function) -> dict[str, Any]:
    get = function.get
    number = get(pci.CLASS + 1, 2)
    found: dict[str, Any] = {
        "bus": 0,
        "slot": function.slot,
        "function": function.number,
        "class_info": {"class": number},
        "id": {
            "device": get(pci.DEVICE_ID, 2),
            "vendor": get(pci.VENDOR_ID, 2),
            "subsystem": get(pci.SUBSYSTEM_ID, 2),
            "subsystem-vendor": get(pci.SUBSYSTEM_VENDOR_ID, 2),
        },
        "irq_pin": get(pci.INTERRUPT_PIN, 1),
        "qdev_id": function.id,
        "regions": [_region(bar) for bar in function.bars],
    }
    if number in _CLASSES:
        found["class_info"]["desc"] = _CLASSES[number]
    if function.has_pin:
        found["irq"] = get(pci.INTERRUPT_LINE, 1)
    return found


def _region(bar: Bar) -> dict[str, Any]:
    region = bar.region
    found: dict[str, Any] = {
        "bar": bar.index,
        "type": "io" if bar.flags & pci.BAR_IO else "memory",
        "address": _NOWHERE if region is None else region.start,
        "size": bar.size,
    }
    if not bar.flags & pci.BAR_IO:
        found["prefetch"] = bool(bar.flags & pci.BAR_PREFETCHABLE)
        found["mem_type_64"] = bool(bar.flags & pci.BAR_64)
    return found


_REGION: Shape = {
    "bar": "int",
    "type": "str",
    "address": "int",
    "size": "int",
    "*prefetch": "bool",
    "*mem_type_64": "bool",
}
_ID: Shape = {"device": "int", "vendor": "int", "*subsystem": "int", "*subsystem-vendor": "int"}
_DEVICE: Shape = {
    "bus": "int",
    "slot": "int",
    "function": "int",
    "class_info": {"*desc": "str", "class": "int"},
    "id": _ID,
    "*irq": "int",
    "irq_pin": "int",
    "qdev_id": "str",
    "regions": [_REGION],
}

COMMANDS = (Command("query-pci", query_pci, returns=[{"bus": "int", "devices": [_DEVICE]}]),)
