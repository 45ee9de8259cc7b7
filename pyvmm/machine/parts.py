"""What a machine is put together of, before there is a machine: what its devices sit on, and the
devices.

``builder`` makes the parts in boot order, drivers add devices to them, and ``Machine`` takes
them over. Whatever holds something of the host's goes to :class:`Opened` as soon as it is there:
one list closes a build that failed half way, and a machine at its end.
"""

from __future__ import annotations

from pyvmm._util import log
from pyvmm.chardev.config import ChardevConfig
from pyvmm.errors import ConfigError, HostError, InternalError, place

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, Protocol, TypeVar

    from pyvmm.backends.block import BlockFile
    from pyvmm.backends.net.factory import NetdevSet
    from pyvmm.backends.rng import RngConfig
    from pyvmm.chardev.base import Chardev
    from pyvmm.chardev.factory import ChardevSet
    from pyvmm.core.bus import Bus
    from pyvmm.core.eventloop import EventLoop
    from pyvmm.cpr.handover import Handover
    from pyvmm.devices.acpi_pm import AcpiPm
    from pyvmm.devices.base import Device
    from pyvmm.devices.fw_cfg import FwCfg
    from pyvmm.devices.pci.host import PciHost
    from pyvmm.machine.fw_cfg_files import FwCfgFiles
    from pyvmm.machine.guest_end import GuestEnd
    from pyvmm.memory.backend import RamBackend
    from pyvmm.memory.guest import GuestMemory
    from pyvmm.x86.platform import Platform

    Listener = Callable[[str, dict[str, Any] | None], None]

    class Closable(Protocol):
        """What holds something of the host's."""

        def close(self) -> None:
            """Give it back."""

    C = TypeVar("C", bound=Closable)


class Opened:
    """What was opened, in that order."""

    def __init__(self) -> None:
        self._things: list[tuple[Closable, bool]] = []

    def add(self, thing: C, *, in_vm: bool = False) -> C:
        """Have ``thing`` closed with the rest; return it.

        :param in_vm: it is the VM or its memory, which stay while somebody still is in there
        """
        self._things.append((thing, in_vm))
        return thing

    def close(self, *, stuck: bool = False) -> None:
        """Close all of it, in the opposite order.

        :param stuck: a vCPU's thread does not leave the VM
        """
        while self._things:
            thing, in_vm = self._things.pop()
            if stuck and in_vm:
                continue
            try:
                thing.close()
            except HostError as error:
                # A device: the host still reads or writes guest memory.
                log.say(str(error))
                stuck = True


class Events:
    """Tells whoever listens of what happens to the machine, with QMP's names. Main loop."""

    def __init__(self) -> None:
        self._listeners: list[Listener] = []

    def subscribe(self, listener: Listener) -> None:
        """Have ``listener(name, data)`` called for each event."""
        self._listeners.append(listener)

    def emit(self, name: str, data: dict[str, Any] | None) -> None:
        """Tell the listeners of an event."""
        for listener in self._listeners:
            try:
                listener(name, data)
            except Exception as error:
                # A monitor's: what the event is about goes on.
                report_bug(error, listener)


class Parts:
    """The parts of one machine. Main loop thread.

    :ivar loop: serves all that is not on a vCPU's or a device's own thread
    :ivar handover: what an update hands over, and what the process before did
    :ivar opened: closes all of them at the end
    :ivar events: tells of what happens to the machine
    :ivar end: takes what devices report of the guest's end
    :ivar ram_blocks: the host's memory behind ``memory``, in the order in which states have it
    :ivar fw_cfg: what guests made for QEMU ask
    :ivar drives: the disk images by id
    :ivar netdevs: the network back ends; None if there are none
    :ivar rngs: what ``-object rng-...`` asks for, by id; the device opens it
    :ivar fw_cfg_files: what ``-fw_cfg`` gives it; None if that is nothing
    :ivar devices: in the order in which they were added, which their state has, too
    :ivar pci: the PCI bus; None if there is none
    :ivar virtio_mmio: address, size in bytes and GSI of each virtio-mmio device, in the order of
        their numbers
    :ivar monitors: what each monitor sits on, in the order of the options
    """

    def __init__(
        self,
        *,
        loop: EventLoop,
        handover: Handover,
        opened: Opened,
        events: Events,
        end: GuestEnd,
        memory: GuestMemory,
        ram_blocks: list[RamBackend],
        platform: Platform,
        ports: Bus,
        mmio: Bus,
        power: AcpiPm,
        fw_cfg: FwCfg,
        chardevs: ChardevSet,
        drives: dict[str, BlockFile],
        netdevs: NetdevSet | None,
        rngs: dict[str, RngConfig],
    ) -> None:
        self.loop = loop
        self.handover = handover
        self.opened = opened
        self.events = events
        self.end = end
        self.memory = memory
        self.ram_blocks = ram_blocks
        self.platform = platform
        self.ports = ports
        self.mmio = mmio
        self.power = power
        self.fw_cfg = fw_cfg
        self.chardevs = chardevs
        self.drives = drives
        self.netdevs = netdevs
        self.rngs = rngs
        self.fw_cfg_files: FwCfgFiles | None = None
        self.devices: list[Device] = []
        self.pci: PciHost | None = None
        self.virtio_mmio: list[tuple[int, int, int]] = []
        self.monitors: list[Chardev] = []

    def add_isa(self, device: Device, port: int, count: int, width: int = 1) -> None:
        """Put a device on ``count`` ports from ``port`` on.

        :param width: bytes of its widest access
        :raises ConfigError: another device has one of them
        """
        self.devices.append(self.opened.add(device))
        try:
            self.ports.add(port, count, device, device.name, width=width)
        except InternalError as error:
            raise ConfigError(f"-device {device.name}: {error}; choose other ports") from None

    def claim(self, chardev: str | None) -> Chardev | None:
        """Return the ``-chardev`` of that id for one front end; None for no id.

        :raises ConfigError: there is none, or it has a front end and no mux
        """
        if chardev is None:
            return None
        return self.chardevs.claim(ChardevConfig("chardev", chardev, {}, "-device"))


def report_bug(error: Exception, function: Callable[..., None]) -> None:
    """A call failed, by a bug: say so, and have the owner of ``function`` recover if it can."""
    log.say(f"internal error in {place(error)}: {error!r}")
    recover = getattr(getattr(function, "__self__", None), "recover", None)
    if recover is not None:
        try:
            recover()
        except Exception as second:
            log.say(f"internal error in {place(second)}: {second!r}")
