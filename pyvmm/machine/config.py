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


#: Properties of devices that are the host's affair, or part of the state, or (of ports) compared
#: with their device.
_NOT_TOLD = frozenset(
    "id drive netdev chardev bus nr name mac share-rw write-cache werror rerror max_ports"
    " rng max-bytes period".split()
)


class MonitorConfig:
    """A monitor on a chardev.

    :ivar mode: ``readline`` (HMP) or ``control`` (QMP), QEMU's names
    """

    __slots__ = ("chardev", "mode", "pretty")

    def __init__(self, chardev: ChardevConfig, mode: str, pretty: bool = False) -> None:
        self.chardev = chardev
        self.mode = mode
        self.pretty = pretty


class DeviceConfig:
    """A ``-device``: driver name and properties."""

    __slots__ = ("driver", "properties")

    def __init__(self, driver: str, properties: dict[str, str]) -> None:
        self.driver = driver
        self.properties = properties

    def shape(self) -> str:
        """What has to stay the same over a live update: which disk or network is which, and all
        that the guest was told."""
        behind = self.properties.get("drive") or self.properties.get("netdev")
        told = [f"{k}={v}" for k, v in sorted(self.properties.items()) if k not in _NOT_TOLD]
        return " ".join([self.driver, *([f"({behind})"] if behind else []), *told])


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
        self.topology = Topology(1, 1, 1)
        self.cpu_changes: dict[str, bool] = {}  # features that -cpu wants, and does not want
        self.acpi = True  # whether the guest finds ACPI tables
        self.kernel = KernelConfig()
        self.bios = ""
        self.chardevs: list[ChardevConfig] = []
        self.serials: list[ChardevConfig | None] = []  # None is a port with nobody there
        self.monitors: list[MonitorConfig] = []
        self.drives: list[BlockConfig] = []
        self.netdevs: list[NetdevConfig] = []
        self.devices: list[DeviceConfig] = []
        self.incoming = ""  # URI, "defer", or none
        self.start_paused = False
        self.only_migratable = False
        self.actions = {event: values[0] for event, values in ACTIONS.items()}

    @property
    def smp(self) -> int:
        """Number of vCPUs."""
        return self.topology.count

    def shape(self) -> dict[str, str]:
        """What the next image of a live update must have too, by the option that says it."""
        return {
            "-m": str(self.memory_size),
            "-smp": str(self.topology),
            "-cpu": ",".join(["host", *("-+"[on] + name for name, on in self.cpu_changes.items())]),
            "-object": ", ".join(f"{block.id} ({block.size} bytes)" for block in self.objects),
            "-serial": str(len(self.serials)),
            "-drive": " ".join(sorted(drive.shape() for drive in self.drives)),
            # What a back end can do is part of what the guest was told.
            "-netdev": ", ".join(netdev.shape() for netdev in self.netdevs),
            # Of virtio devices the order decides where they are.
            "-device": ",".join(
                sorted(
                    [device.shape() for device in self.devices],
                    key=lambda driver: "~" if driver.startswith("virt") else driver,
                )
            ),
            **self._ports(),
        }

    def chardev_kinds(self) -> dict[str, str]:
        """Of what kind each chardev is: one that an update keeps goes on with the descriptors
        and the state that it has."""
        places = [*self.chardevs, *self.serials, *(monitor.chardev for monitor in self.monitors)]
        return {one.id: one.shape() for one in places if one is not None and one.kind != "chardev"}

    def _ports(self) -> dict[str, str]:
        if not any(device.driver == "virtio-serial-device" for device in self.devices):
            return {}
        from pyvmm.machine import virtio

        return {"-device virtio-serial-device": virtio.shape(self.devices)}
