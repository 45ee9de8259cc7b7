"""A machine without KVM, for the monitor: its state is set by the test, its acts are recorded.

Guest RAM, buses and run states are the real ones; vCPUs have registers that the test sets and
translate addresses by a dict of pages (identity by default).
"""

from __future__ import annotations

from types import SimpleNamespace

from pyvmm.chardev.factory import ChardevSet
from pyvmm.core.bus import Bus, BusDevice
from pyvmm.core.eventloop import EventLoop
from pyvmm.core.runstate import PAUSED, RUNNING, RunState
from pyvmm.core.threads import Lock
from pyvmm.cpr.handover import Handover
from pyvmm.errors import MigrationError, StateError
from pyvmm.memory.backend import RamBackend
from pyvmm.memory.config import RamConfig
from pyvmm.memory.guest import GuestMemory
from pyvmm.migration import params

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from pyvmm.backends.block import BlockFile
    from pyvmm.devices.pci.host import PciHost
    from pyvmm.memory.upkeep import Upkeep

RAM_SIZE = 1 << 20


class FakeVcpu:
    """Registers and page tables of one vCPU."""

    def __init__(self) -> None:
        gprs = "rax rbx rcx rdx rsi rdi rsp rbp r8 r9 r10 r11 r12 r13 r14 r15 rip rflags"
        self.regs = SimpleNamespace(**dict.fromkeys(gprs.split(), 0))
        self.regs.rflags = 2
        self.sregs = SimpleNamespace(cr0=0x11, cr2=0, cr3=0, cr4=0, cr8=0, efer=0)
        for name in ("es", "ss", "ds", "fs", "gs"):
            setattr(self.sregs, name, segment(3, db=1, g=1, selector=0x10))
        self.sregs.cs = segment(11, db=1, g=1, selector=0x8)
        self.sregs.ldt = segment(2, s=0, limit=0xFFFF)
        self.sregs.tr = segment(11, s=0, limit=0xFFFF)
        self.sregs.gdt = SimpleNamespace(base=0x1000, limit=0x27)
        self.sregs.idt = SimpleNamespace(base=0, limit=0x3FF)
        self.debugregs = SimpleNamespace(db=[0, 0, 0, 0], dr6=0xFFFF0FF0, dr7=0x400)
        self.xsave = bytearray(4096)
        self.xsave[0:2] = b"\x7f\x03"
        self.xsave[24:26] = b"\x80\x1f"
        self.mp_state = 0
        self.pages: dict[int, int] | None = None

    def get_regs(self) -> Any:
        """Return the general registers."""
        return self.regs

    def get_sregs(self) -> Any:
        """Return the system registers."""
        return self.sregs

    def get_debugregs(self) -> Any:
        """Return the debug registers."""
        return self.debugregs

    def get_xsave(self) -> bytes:
        """Return the XSAVE area."""
        return bytes(self.xsave)

    def get_mp_state(self) -> int:
        """Return the run state: running (0) or halted (3)."""
        return self.mp_state

    def translate(self, gva: int) -> int | None:
        """Return the physical address by ``pages``; None if the page is not there."""
        if self.pages is None:
            return gva
        page = self.pages.get(gva & ~0xFFF)
        return None if page is None else page | gva & 0xFFF


def segment(type: int, *, s: int = 1, limit: int = 0xFFFFFFFF, **fields: int) -> Any:
    """Return a present segment of ring 0, shaped as struct kvm_segment."""
    names = ("selector", "base", "dpl", "avl", "l", "db", "g", "unusable")
    known = dict.fromkeys(names, 0) | fields
    return SimpleNamespace(type=type, s=s, limit=limit, present=1, **known)


class FakeCpu:
    """A vCPU; what its thread would run is run at once."""

    def __init__(self, index: int) -> None:
        self.index = index
        self.thread_id = 31290 + index
        self.vcpu = FakeVcpu()
        self.is_unfinished = False

    def call(self, function: Callable[[Any], Any]) -> Any:
        """Run ``function`` on the vCPU and return its result."""
        return function(self.vcpu)


class PortRecorder(BusDevice):
    """A device that remembers writes and answers reads from a dict of offsets."""

    def __init__(self) -> None:
        self.lock = Lock()
        self.values: dict[int, int] = {}
        self.writes: list[tuple[int, int, int]] = []

    def on_read(self, offset: int, size: int) -> int:
        return self.values.get(offset, 0)

    def on_write(self, offset: int, size: int, value: int) -> None:
        self.writes.append((offset, size, value))


class FakeMachine:
    """A running machine with ``cpus`` vCPUs, 1 MiB of RAM and one device on 0x3f8.

    ``acts`` lists what was asked of it.
    """

    def __init__(self, cpus: int = 1, name: str = "") -> None:
        self.config = SimpleNamespace(
            name=name, smp=cpus, memory_size=RAM_SIZE, argv=[], only_migratable=False
        )
        self.handover = Handover()
        self.loop = EventLoop()
        self.runstate = RunState(RUNNING)
        self.memory = GuestMemory()
        self.ram_blocks = [RamBackend(RamConfig("memory-backend-memfd", "ram0", RAM_SIZE))]
        self.memory.add_ram(self.ram_blocks[0], [(0, RAM_SIZE, 0)])
        self.upkeep: Upkeep | None = None
        self.ports = Bus("I/O", 1 << 16)
        self.mmio = Bus("memory", 1 << 64)
        self.pci: PciHost | None = None
        self.port_recorder = PortRecorder()
        self.ports.add(0x3F8, 8, self.port_recorder, "serial")
        self.devices = [
            SimpleNamespace(
                name="isa-serial",
                id="",
                properties=lambda: {"chardev": "serial0", "iobase": 0x3F8, "wakeup": False},
            )
        ]
        self.drives: dict[str, BlockFile] = {}
        self.netdevs: Any = None
        self.chardevs = ChardevSet(self.loop, self.handover, lambda: None)
        self.cpus = [FakeCpu(index) for index in range(cpus)]
        self.acts: list[str] = []
        self.observers: list[Callable[[str, dict[str, Any] | None], None]] = []

    def stop(self) -> None:
        """Pause."""
        self.acts.append("stop")
        if self.runstate.running:
            self.runstate.set(PAUSED)
            self.emit("STOP")

    def cont(self) -> None:
        """Run."""
        if self.runstate.needs_reset():
            raise StateError("Resetting the Virtual Machine is required")
        self.acts.append("cont")
        if not self.runstate.running:
            self.emit("RESUME")
            self.runstate.set(RUNNING)

    def reset(self, reason: str = "host-qmp-system-reset") -> None:
        """Record a reset."""
        self.acts.append(f"reset {reason}")
        self.emit("RESET", {"guest": False, "reason": reason})

    def powerdown(self) -> None:
        """Record a press of the power button."""
        self.acts.append("powerdown")
        self.emit("POWERDOWN")

    def quit(self, exit_code: int = 0, reason: str = "host-qmp-quit") -> None:
        """Record the end."""
        self.acts.append(f"quit {exit_code} {reason}")

    def subscribe(self, callback: Callable[[str, dict[str, Any] | None], None]) -> None:
        """Have ``callback`` told of events."""
        self.observers.append(callback)

    def emit(self, name: str, data: dict[str, Any] | None = None) -> None:
        """Tell the observers."""
        for observer in self.observers:
            observer(name, data)

    def close(self) -> None:
        """Give memory and descriptors back."""
        self.chardevs.close()
        for drive in self.drives.values():
            drive.close()
        for backend in self.ram_blocks:
            backend.close()
        self.loop.close()


class FakeMigration:
    """A migration that ends when the test says so."""

    def __init__(self) -> None:
        self.parameters = params.parameters()
        self.capabilities = params.Capabilities(set())
        self.refuse: str | None = None
        self.started: list[tuple[str, bool]] = []
        self.acts: list[str] = []
        self.finish: Callable[[str | None], None] = lambda _error: None
        self.data: dict[str, Any] = {}
        self.early_events: list[tuple[str, dict[str, Any] | None, int]] = []
        self.status: str | None = None
        self.error: str | None = None

    def info(self) -> dict[str, Any]:
        """What query-migrate returns."""
        return self.data

    def take_error(self) -> str | None:
        """Return what is wrong with an update, once."""
        error, self.error = self.error, None
        return error

    def start(self, uri: str, detach: bool, done: Callable[[str | None], None]) -> None:
        """Record the start, or refuse it."""
        if self.refuse is not None:
            raise MigrationError(self.refuse)
        self.started.append((uri, detach))
        self.finish = done

    def update(self, command: list[str] | None, done: Callable[[str | None], None]) -> None:
        """Record the start, or refuse it."""
        self.start("update", command is None, done)

    def cancel(self) -> None:
        """Record it."""
        self.acts.append("cancel")

    def incoming(self, uri: str) -> None:
        """Record it."""
        self.acts.append(f"incoming {uri}")
