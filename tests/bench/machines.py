"""The machines that are measured: of any version of pyvmm, and of QEMU with the same options."""

import re
import subprocess
import tempfile
import time
from pathlib import Path

from harness import DEADLINE_S, UpdateError, Vm, VmExitedError, versions, wait_until
from harness.process import descriptors

from pyvmm.boot import builtin

MIB = 1 << 20
COUNTER = 0x200000  # where the built-in guest's counter program counts


class BenchError(Exception):
    """Something could not be measured; the text says why."""


class Vmm(Vm):
    """A pyvmm process in a temporary folder. Use as a context manager.

    :param options: further options of ``pyvmm run``
    :param size: guest RAM in bytes
    :param version: the :class:`harness.versions.Version` that is run, default this one
    :param folder: an existing one: the machine's own is a new one in it
    :cvar label: what its rows are called
    :cvar memory: what guest RAM is in
    """

    program = label = "pyvmm"
    memory = "memfd, shared"

    def __init__(self, *options, size=256 * MIB, version=None, folder=None, **arguments):
        self.size = size
        self._scratch = None
        if folder is None:
            self._scratch = tempfile.TemporaryDirectory(prefix="pyvmm-bench-")
            folder = self._scratch.name
        own = Path(tempfile.mkdtemp(prefix="vm-", dir=folder))
        words = self.words(version)
        super().__init__(own, *options, memory=f"{size // MIB}M", program=words, **arguments)

    def words(self, version):
        """The first words of the command."""
        return (version or versions.present()).run

    def close(self):
        super().close()
        if self._scratch:
            self._scratch.cleanup()

    def memfd(self):
        """Path under /proc of the memfd that guest RAM is in."""
        for fd, target in descriptors(self.pid).items():
            path = Path(f"/proc/{self.pid}/fd/{fd}")
            if target.startswith("/memfd:") and path.stat().st_size == self.size:
                return str(path)
        raise BenchError(f"{self.program} has no memfd of {self.size} bytes")


class Qemu(Vmm):
    """The same with QEMU's microvm machine. It drops connections in an update."""

    program = "qemu-system-x86_64"
    label = "qemu"
    machine = ("-machine", "microvm,accel=kvm,acpi=off,aux-ram-share=on")
    prompt = b"(qemu) "
    reconnects = True

    def words(self, version):
        """QEMU has to be told what pyvmm does by itself."""
        return [*self.command(self.size), "-kernel", builtin.path(builtin.GUEST)]

    @classmethod
    def command(cls, size):
        """The first words of a command without a kernel."""
        return [
            *(cls.program, "-nodefaults", "-no-user-config", "-display", "none"),
            *(*cls.machine, *cls.ram(size)),
        ]

    @staticmethod
    def ram(size):
        """Options: memory of the kind that pyvmm's is."""
        ram = f"memory-backend-memfd,id=ram0,size={size // MIB}M,share=on"
        return ["-object", ram, "-machine", "memory-backend=ram0"]

    def hmp(self, command, timeout=DEADLINE_S):
        """As :meth:`harness.Vm.hmp`; without the echo, which is the first line."""
        return super().hmp(command, timeout).partition("\n")[2]

    def update(self, timeout=DEADLINE_S):
        """As :meth:`harness.Vm.update`."""
        uri = "file:vm.state"
        self.set_update(uri=uri)
        start = time.monotonic_ns()
        try:
            raise UpdateError(f"migrate: {self.hmp(f'migrate -d {uri}', timeout)!r}")
        except VmExitedError:
            self._take_over()
        wait_until(lambda: self.status == "running", "the guest runs again", timeout)
        return start, time.monotonic_ns()

    def _take_over(self):
        while self._streams:
            self._streams.popitem()[1].close()
        self._replies.clear()
        self._greeted = False
        self._accept()


class QemuVirtio(Qemu):
    """QEMU with virtio devices where the guest looks for them."""

    machine = (
        *("-machine", "microvm,accel=kvm,acpi=on,ioapic2=off,rtc=off"),
        *("-global", "virtio-mmio.force-legacy=false"),
    )


class QemuDefault(QemuVirtio):
    """The same with the memory that QEMU takes if it is not told, which no update carries over."""

    label = "qemu, own memory"
    memory = "anonymous, private"

    @staticmethod
    def ram(size):
        """Options: none."""
        return []


def qemu_version(path=Qemu.program):
    """(major, minor) of a QEMU, (0, 0) if it does not tell, or is not there."""
    try:
        output = subprocess.run([path, "--version"], capture_output=True, timeout=10).stdout
    except (OSError, subprocess.TimeoutExpired):
        return 0, 0
    found = re.search(rb"version (\d+)\.(\d+)", output)
    return (int(found[1]), int(found[2])) if found else (0, 0)
