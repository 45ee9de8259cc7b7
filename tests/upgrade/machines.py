"""A machine of every device with somebody at the other end of each, and what its guest does."""

import re

from faults.tools import check_ticking, options, update
from harness.network import StreamPeer, echo_of, numbered
from harness.stream import Peer, consoles

DISK_SIZE = 4 << 20
#: A predecessor does not know what the way back of later versions needs, and what a reset loads.
UNWANTED = re.compile(
    r"pyvmm: nothing wanted the inherited descriptor (cpr/way-back|boot/\w+)\[0\]"
)
#: Devices without anybody at the other end.
QUIET = [
    *("-device", "pvpanic", "-device", "isa-debug-exit,iobase=0xf4"),
    *("-chardev", "null,id=debug", "-device", "isa-debugcon,iobase=0xe9,chardev=debug"),
    *("-serial", "null", "-device", "virtio-rng-device"),
]


def disk(path, name):
    """A disk of an image."""
    drive = f"if=none,id={name},file={path},format=raw"
    return ["-drive", drive, "-device", f"virtio-blk-device,drive={name}"]


class Peers:
    """Everybody that a machine of every device talks to.

    :param folder: the one above the machine's
    """

    def __init__(self, folder):
        self.console, self.port = Peer(folder, "con0"), Peer(folder, "con1")
        self.network = StreamPeer(folder)
        images = [folder / f"{name}.img" for name in ("disk", "second")]
        for image in images:
            image.write_bytes(bytes(DISK_SIZE))
        # Of some there are two, with others in between.
        self.options = [
            *(*QUIET, *disk(images[0], "d0"), *consoles(self.console, self.port)),
            *(*self.network.options, *disk(images[1], "d1"), "-device", "virtio-rng-device"),
            *("-qmp", "unix:qmp.sock,server=on,wait=off"),
        ]

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for peer in (self.console, self.port, self.network):
            peer.close()


def upgrade(machine, version):
    """Update to a version; the guest goes on there."""
    assert update(machine, [*version.run, *options(machine)]) == ""
    assert "completed" in machine.hmp("info migrate")
    assert version.pyvmm in machine.cmdline


def complaints(machine):
    """What pyvmm said on its standard error beside :data:`UNWANTED`."""
    lines = machine.stderr().splitlines()
    return [line.removeprefix("pyvmm: ") for line in lines if not UNWANTED.fullmatch(line)]


class Work:
    """A program of the guest, and how to see that it goes on with nothing lost.

    :ivar append: the kernel command line
    :ivar smp: on how many vCPUs: half of the programs on one
    """

    append = ""
    smp = 1

    def begin(self, machine, peers):
        """Wait until the guest works."""
        self.machine, self.peers = machine, peers

    def before(self):
        """Right before each update: have something under way."""

    def check(self):
        """After each update."""


class Ticker(Work):
    """Timer interrupts, and output on the serial port."""

    append = "ticker period=10"
    smp = 2

    def begin(self, machine, peers):
        super().begin(machine, peers)
        machine.expect(r"tick 2\r\n")

    def check(self):
        check_ticking(self.machine)


class Shell(Work):
    """Input on the serial port; typed in part before the update, in part behind it."""

    def begin(self, machine, peers):
        super().begin(machine, peers)
        machine.expect("guest> ")
        self._count = 0

    def before(self):
        self.machine.type("echo be")

    def check(self):
        self._count += 1
        self.machine.type(f"hind{self._count}\n")
        self.machine.expect(rf"echo behind{self._count}\r\nbehind{self._count}\r\nguest> ")


class Counted(Work):
    """A program that tells how far it is.

    :ivar told: what it says, with a number that goes up by :attr:`step`
    """

    told = ""
    step = 1

    def begin(self, machine, peers):
        super().begin(machine, peers)
        machine.expect(self.told)

    def check(self):
        machine = self.machine
        machine.seen = len(machine.serial)
        for _ in range(2):
            machine.expect(self.told + r"\r\n")
        assert b"FAIL" not in machine.serial
        text = machine.serial[: machine.serial.rindex(b"\n")].decode()
        found = [int(number) for number in re.findall(rf"{self.told}\r", text)]
        assert found == list(range(found[0], found[-1] + 1, self.step))


class Disk(Counted):
    """Each pass checks what the one before wrote."""

    append = "virtio-blk depth=32 mb=1"
    smp = 2
    told = r"blk pass (\d+) ok"


class Entropy(Counted):
    """Random bytes by virtio."""

    append = "virtio-rng step=16"
    told = r"rng (\d+)"
    step = 16


class Memory(Counted):
    """Every word of RAM holds what it has to."""

    append = "memhash mb=4"
    told = r"memhash pass (\d+) ok"


class Console(Work):
    """What is sent to a port of the virtio console comes back."""

    append = "virtio-console mode=echo port=1"
    smp = 2

    def begin(self, machine, peers):
        super().begin(machine, peers)
        machine.expect("ready")
        self._count = 0

    def before(self):
        self._count += 1
        self._data = bytes([64 + self._count]) * 9973
        self.peers.port.send(self._data)

    def check(self):
        assert self.peers.port.receive(len(self._data)) == self._data


class Network(Work):
    """Frames come back, also one that is torn by the update."""

    append = "virtio-net"

    def begin(self, machine, peers):
        super().begin(machine, peers)
        machine.expect("ready")
        self._count = 0

    def before(self):
        self._frames = [numbered(self._count + n, 60 + n * 37) for n in range(20)]
        self._count += len(self._frames)
        self.peers.network.send_frames(*self._frames, cut=30)

    def check(self):
        self.peers.network.send_frames()
        assert self.peers.network.frames(len(self._frames)) == [echo_of(f) for f in self._frames]


WORKS = (Ticker, Shell, Disk, Entropy, Console, Network)
