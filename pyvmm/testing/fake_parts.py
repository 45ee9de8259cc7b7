"""The parts of a machine, made by hand: without memory, and with whatever a test has for a VM."""

from __future__ import annotations

from types import SimpleNamespace

from pyvmm.chardev.factory import ChardevSet
from pyvmm.core.bus import Bus
from pyvmm.core.eventloop import EventLoop
from pyvmm.core.irq import IrqLine
from pyvmm.cpr.handover import Handover
from pyvmm.devices.acpi_pm import AcpiPm
from pyvmm.devices.fw_cfg import FwCfg
from pyvmm.machine.guest_end import GuestEnd
from pyvmm.machine.parts import Events, Opened, Parts
from pyvmm.memory.guest import GuestMemory

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from pyvmm.machine.config import MachineConfig


def fake_platform() -> Any:
    """Return a VM with one vCPU that does nothing."""
    vcpu = SimpleNamespace(index=0, set_immediate_exit=lambda _on: None)
    return SimpleNamespace(vcpus=[vcpu], vm=None, close=lambda: None)


def make_parts(config: MachineConfig, platform: Any = None, loop: EventLoop | None = None) -> Parts:
    """Return parts for a machine of that configuration, whose end stops the loop.

    :param platform: has ``vcpus``, ``vm`` and ``close()``
    """
    loop = loop or EventLoop()
    handover = Handover()
    opened, events = Opened(), Events()
    end = GuestEnd(loop, config.actions, events.emit, loop.stop)
    memory = GuestMemory()
    return Parts(
        loop=loop,
        handover=handover,
        opened=opened,
        events=events,
        end=end,
        memory=memory,
        ram_blocks=[],
        platform=opened.add(platform or fake_platform(), in_vm=True),
        ports=Bus("I/O", 1 << 16),
        mmio=Bus("memory", 1 << 64, memory),
        power=AcpiPm(IrqLine(9, lambda _gsi, _level: None), end.request_power_off, loop),
        fw_cfg=FwCfg(memory, loop),
        chardevs=opened.add(ChardevSet(loop, handover, end.quit)),
        drives={},
        netdevs=None,
        rngs={rng.id: rng for rng in config.rngs},
    )
