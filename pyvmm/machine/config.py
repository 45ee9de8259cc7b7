"""What machine to build: the options as values, before anything is opened."""

from __future__ import annotations

from pyvmm.boot.config import KernelConfig
from pyvmm.x86.cpuid import Topology

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pyvmm.backends.block_config import BlockConfig
    from pyvmm.backends.net.config import NetdevConfig
    from pyvmm.backends.rng import RngConfig
    from pyvmm.chardev.config import ChardevConfig
    from pyvmm.machine.drivers import DeviceConfig
    from pyvmm.machine.fw_cfg_files import FwCfgConfig
    from pyvmm.memory.config import RamConfig

MACHINE_TYPE = "pyvmm"
MAX_SERIALS = 2

#: ``-action``: what follows an event of the guest; the first value is the default.
ACTIONS = {
    "reboot": ("reset", "shutdown"),
    "shutdown": ("poweroff", "pause"),
    "panic": ("shutdown", "pause", "exit-failure", "none"),
    "internal-error": ("pause", "exit-failure"),
}


class MonitorConfig:
    """A monitor on a chardev.

    :ivar mode: ``readline`` (HMP) or ``control`` (QMP), QEMU's names
    """

    __slots__ = ("chardev", "mode", "pretty")

    def __init__(self, chardev: ChardevConfig, mode: str, pretty: bool = False) -> None:
        self.chardev = chardev
        self.mode = mode
        self.pretty = pretty


class MachineConfig:
    """Everything that ``pyvmm run`` was told. Sizes in bytes."""

    def __init__(self) -> None:
        self.argv: list[str] = []
        self.name = ""
        self.memory_size = 128 << 20
        self.objects: list[RamConfig] = []
        self.rngs: list[RngConfig] = []
        self.memory_backend = ""  # id of the object that is main memory
        self.anon_alloc = "memfd"  # where memory without an object comes from: memfd, mmap
        self.ram_collapse = True  # whether memory is made huge pages of
        self.topology = Topology(1, 1, 1)
        self.cpu_changes: dict[str, bool] = {}  # features that -cpu wants, and does not want
        self.acpi = True  # whether the guest finds ACPI tables
        self.pci: bool | None = None  # whether there is a PCI bus; None: if a device sits on it
        self.kernel = KernelConfig()
        self.bios = ""
        self.chardevs: list[ChardevConfig] = []
        self.serials: list[ChardevConfig | None] = []  # None is a port with nobody there
        self.monitors: list[MonitorConfig] = []
        self.drives: list[BlockConfig] = []
        self.netdevs: list[NetdevConfig] = []
        self.devices: list[DeviceConfig] = []
        self.fw_cfg: list[FwCfgConfig] = []
        self.pit_reinjects = True  # whether ticks that the guest missed are delivered later
        self.incoming = ""  # URI, "defer", or none
        self.start_paused = False
        self.only_migratable = False
        self.actions = {event: values[0] for event, values in ACTIONS.items()}

    @property
    def has_pci(self) -> bool:
        """Whether there is a PCI bus."""
        return bool(self.pci) or any(device.driver.bus == "pci" for device in self.devices)

    @property
    def smp(self) -> int:
        """Number of vCPUs."""
        return self.topology.count
