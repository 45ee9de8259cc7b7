"""Puts monitors on their chardevs, once the guest runs.

Which kind a monitor is, is known from its mode and from whether a person sits there.
"""

from __future__ import annotations

import os

from pyvmm._util import log
from pyvmm.cpr.handover import MONITOR
from pyvmm.errors import VmStateError
from pyvmm.monitor.commands import build_registry
from pyvmm.monitor.registry import Context

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from pyvmm.chardev.base import Chardev
    from pyvmm.cpr.handover import Handover
    from pyvmm.machine.config import MonitorConfig
    from pyvmm.machine.machine import Machine
    from pyvmm.migration.manager import Migration
    from pyvmm.monitor.frontend import MonitorFrontend


def open_monitors(
    machine: Machine, migration: Migration, specs: list[tuple[MonitorConfig, Chardev]]
) -> list[MonitorFrontend]:
    """Attach a monitor to each chardev and return the monitors; main loop thread.

    Each goes on with what the image before left for it, and is a passenger of the next exec. The
    caller closes them at the end.
    """
    registry = build_registry()
    monitors: list[MonitorFrontend] = []
    for config, chardev in specs:
        monitor = kind(config, chardev)(Context(machine, migration, registry))
        name = _unused(chardev.id, machine.handover)
        parcel = machine.handover.parcel(MONITOR, name)
        state = parcel.take_state()
        if state:
            try:
                monitor.load_state(state)
            except VmStateError as error:
                # The guest runs; that somebody has to type a line again must not end it.
                log.say(f"monitor {name}: {error}")
        parcel.board(monitor)
        monitors.append(monitor)
        chardev.attach(monitor)
    return monitors


def kind(config: MonitorConfig, chardev: Chardev) -> Callable[[Context], MonitorFrontend]:
    """Return what makes a monitor of the kind that a chardev is to have. Any thread."""
    if config.mode == "control":
        from pyvmm.monitor.qmp.session import QmpSession

        return lambda context: QmpSession(chardev, context, pretty=config.pretty)
    if chardev.is_terminal and os.environ.get("TERM", "dumb") not in ("", "dumb", "unknown"):
        from pyvmm.monitor.hmp.console import Console

        return lambda context: Console(chardev, context)
    from pyvmm.monitor.hmp.lines import LineMonitor

    echo = chardev.is_terminal or chardev.is_typed
    return lambda context: LineMonitor(chardev, context, echo=echo)


def _unused(id: str, handover: Handover) -> str:
    # A mux has several monitors on one chardev.
    name, number = id, 1
    while handover.parcel(MONITOR, name).is_boarded:
        number += 1
        name = f"{id}.{number}"
    return name
