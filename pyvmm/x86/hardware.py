"""What the firmware tables tell a kernel of the machine."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence


class PciHardware:
    """The PCI bus.

    :param ecam: address of the configuration space in memory
    :param io: first port of the window for BARs, and the one behind the last
    :param memory: first address of each window for BARs, and the one behind the last
    :param routes: ``(slot, GSI)`` of each INTA
    """

    __slots__ = ("ecam", "io", "memory", "routes")

    def __init__(
        self,
        ecam: int,
        io: tuple[int, int],
        memory: Sequence[tuple[int, int]],
        routes: Sequence[tuple[int, int]],
    ) -> None:
        self.ecam = ecam
        self.io = io
        self.memory = memory
        self.routes = routes


class Hardware:
    """What the tables tell of.

    :param cpus: number of processors, whose APIC ids are 0 to *cpus* - 1
    :param pm1_base: first port of the PM1 event block; the control block is 4 ports higher, and
        the timer 8
    :param sci: GSI of the power management interrupt
    :param s5: SLP_TYP of soft off
    :param serials: ``(first port, number of ports, interrupt)`` of each serial port
    :param virtio_mmio: ``(address, size, GSI)`` of each virtio-mmio device, edge-triggered
    :param pvpanic: its port, if there is one
    :param has_fw_cfg: whether there is QEMU's fw_cfg
    :param pci: the PCI bus, if there is one
    """

    __slots__ = (
        *("cpus", "has_fw_cfg", "pci", "pm1_base", "pvpanic", "s5", "sci", "serials"),
        "virtio_mmio",
    )

    def __init__(
        self,
        cpus: int,
        *,
        pm1_base: int,
        sci: int,
        s5: int = 0,
        serials: Sequence[tuple[int, int, int]] = (),
        virtio_mmio: Sequence[tuple[int, int, int]] = (),
        pvpanic: int | None = None,
        has_fw_cfg: bool = False,
        pci: PciHardware | None = None,
    ) -> None:
        self.cpus = cpus
        self.pm1_base = pm1_base
        self.sci = sci
        self.s5 = s5
        self.serials = serials
        self.virtio_mmio = virtio_mmio
        self.pvpanic = pvpanic
        self.has_fw_cfg = has_fw_cfg
        self.pci = pci
