"""The declarations of drivers: complete, true of their models, and all that the rest goes by."""

import subprocess
import sys
from types import SimpleNamespace

import pytest

from pyvmm._util.keyval import parse_keyval
from pyvmm.backends.block import BlockFile
from pyvmm.backends.net.factory import NetdevSet
from pyvmm.core.irq import IrqLine
from pyvmm.devices.virtio.device import VirtioDevice
from pyvmm.errors import ConfigError
from pyvmm.machine import drivers, help, options, shape
from pyvmm.machine.builder import add_pci
from pyvmm.machine.drivers.virtio import VirtioDriver
from pyvmm.testing.fake_parts import fake_platform, make_parts
from pyvmm.vmstate.fields import Description, u32

#: What a device of each driver needs at least, and other values of all of its properties.
NEEDED = {
    "virtio-blk-device": ["-drive", "file={image},format=raw,if=none,id=d"],
    "virtio-net-device": ["-netdev", "stream,id=n,addr.type=unix,addr.path=x,server=on"],
    "virtio-rng-device": ["-object", "rng-builtin,id=r"],
    "virtconsole": ["-device", "virtio-serial-device"],
    "virtserialport": ["-device", "virtio-serial-device"],
}
LEAST = {"virtio-blk-device": ",drive=d", "virtio-net-device": ",netdev=n"}
OTHERS = {
    "isa-debug-exit": "iobase=0x600,iosize=4",
    "isa-debugcon": "iobase=0x600,chardev=c",
    "pvpanic": "ioport=0x600",
    "vmcoreinfo": "",
    "pc-testdev": "",
    "virtio-blk-device": "drive=d,id=x,serial=s,write-cache=off,config-wce=off,discard=off,"
    "write-zeroes=off,logical_block_size=4096,physical_block_size=4096,queue-size=64,share-rw=on,"
    "werror=stop,rerror=stop",
    "virtio-net-device": "netdev=n,id=x,mac=52:54:00:aa:bb:cc,host_mtu=1400,rx_queue_size=64,"
    "tx_queue_size=64,mrg_rxbuf=off,status=off,csum=off,guest_csum=off,guest_tso4=off,"
    "guest_tso6=off,guest_ecn=off,host_tso4=off,host_tso6=off,host_ecn=off",
    "virtio-rng-device": "rng=r,id=x,max-bytes=64,period=500",
    "virtio-serial-device": "id=x,max_ports=4",
    "virtconsole": "id=x,chardev=c,name=a,nr=3",
    "virtserialport": "id=x,chardev=c,name=a,nr=3",
    "pci-testdev": "id=x,addr=7.0,multifunction=on,membar=1M",
}
ON_PCI = [name for name, file in drivers.FILES.items() if file == "virtio_pci"]
for _name in ON_PCI:
    _twin = drivers.find(_name).twin.name
    NEEDED[_name], LEAST[_name] = NEEDED.get(_twin, []), LEAST.get(_twin, "")
    OTHERS[_name] = (
        f"{OTHERS[_twin]},addr=7.0,multifunction=on,vectors=5,disable-legacy=on,disable-modern=off"
    )
#: Of a port these are compared with its device, of a function with its place.
SEEN_ELSEWHERE = {"name", "nr", "max_ports", "addr"}


class Irqs:
    """Has what devices ask of KVM."""

    def pulse(self, gsi, user):
        return lambda: None

    def kick(self, gpa, value, fd, user, size=4, *, is_port=False):
        pass

    def send_msi(self, address, data):
        pass

    def line(self, gsi, user):
        return IrqLine(gsi, lambda *_: None)


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """Reads a command line with one device, which may be made."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "image").write_bytes(bytes(1 << 20))
    made = []

    def parse(name, properties):
        words = [word.format(image=tmp_path / "image") for word in NEEDED.get(name, ())]
        words += ["-chardev", "null,id=c", "-device", f"{name}{properties}"]
        return options.parse(["-serial", "none", *words])

    def make(name, properties):
        close()  # the one before has the image and the address
        config = parse(name, properties)
        platform = fake_platform()
        platform.irqs = Irqs()
        parts = make_parts(config, platform)
        made.append(parts)
        for chardev in config.chardevs:
            parts.chardevs.create(chardev)
        for drive in config.drives:
            parts.drives[drive.id] = parts.opened.add(BlockFile(drive, parts.handover))
        parts.netdevs = parts.opened.add(NetdevSet(parts.loop, parts.handover))
        for netdev in config.netdevs:
            parts.netdevs.create(netdev)
        if config.has_pci:
            add_pci(parts, config)
        for device in config.devices:
            device.driver.add(parts, device)
        return [device for device in parts.devices if device is not parts.pci]

    def close():
        for parts in made:
            parts.opened.close()
            parts.loop.close()
        made.clear()

    yield SimpleNamespace(parse=parse, make=make)
    close()


def changes(name):
    """The values of one property after the other, each with those that it needs."""
    values = parse_keyval(OTHERS[name], "") if OTHERS[name] else {}
    driver = drivers.find(name)
    assert {one.name for one in driver.properties} - set(values) <= {"bus"}  # there is one
    needed = dict(part.split("=") for part in LEAST.get(name, "").split(",") if part)
    for one in driver.properties:
        if one.name in needed or one.name not in values:
            continue
        words = needed | {key: values[key] for key in (one.needs, one.name) if key}
        yield one, "".join(f",{key}={value}" for key, value in words.items())


def test_each_driver_is_where_the_list_says():
    assert set(OTHERS) == set(drivers.FILES)
    for name, file in drivers.FILES.items():
        assert drivers.find(name).name == name
        declared = sys.modules[f"pyvmm.machine.drivers.{file}"].DRIVERS
        assert set(declared) == {other for other in drivers.FILES if drivers.FILES[other] == file}
    with pytest.raises(ConfigError, match="did you mean pvpanic"):
        drivers.find("pvpanik")


@pytest.mark.parametrize("name", drivers.FILES)
def test_declaration_is_true_of_its_model(machine, name):
    driver = drivers.find(name)
    assert driver.help
    plain = machine.make(name, LEAST.get(name, ""))
    if driver.bus != "virtio-serial":
        assert plain[-1].name == name
        assert driver.model().name == (driver.twin.name if name in ON_PCI else name)
    for properties in (properties for _, properties in changes(name)):
        device = machine.make(name, properties)[-1]
        assert driver.bus == "virtio-serial" or device.name == name
        description = driver.description()
        assert (description is None) == (driver.bus not in ("virtio", "pci"))
        if description is not None:
            assert description.name == device.vmstate.name
            assert description.version == device.vmstate.version


@pytest.mark.parametrize("name", drivers.FILES)
def test_update_may_change_what_is_the_hosts_and_nothing_else(machine, name):
    before = shape.describe(machine.parse(name, LEAST.get(name, "")))
    for one, properties in changes(name):
        after = shape.describe(machine.parse(name, properties))
        assert (before == after) == (one.host and one.name not in SEEN_ELSEWHERE), one.name


def test_model_has_the_features_that_properties_switch(machine):
    (whole,) = machine.make("virtio-net-device", ",netdev=n")
    for one, properties in changes("virtio-net-device"):
        (device,) = machine.make("virtio-net-device", properties)
        assert (device.device.features != whole.device.features) == (
            one.name in ("mrg_rxbuf", "status", "host_mtu")  # a stream has no offloads
        )


def test_command_line_imports_what_it_names():
    code = """
import sys
from pyvmm.machine import options
options.parse(["-serial", "none", *sys.argv[1:]])
print(*sorted(n.rpartition(".")[2] for n in sys.modules if n.startswith("pyvmm.machine.drivers.")))
"""

    def imported(*words):
        done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True)
        assert done.stderr == ""
        return done.stdout.split()

    assert imported() == []
    assert imported("-device", "pvpanic") == ["isa"]
    assert imported("-device", "virtio-rng-device") == ["virtio", "virtio_rng"]


class Echo(VirtioDevice):
    """A device that nobody has declared yet."""

    virtio_id = 42
    name = "virtio-echo-device"
    queue_sizes = (8,)
    vmstate = Description("virtio-echo", [u32("served")])

    def __init__(self, loop, *, limit=0):
        super().__init__(loop)
        self.served, self.limit = 0, limit

    def properties(self):
        return {"limit": self.limit}


def test_new_driver_is_one_declaration_and_one_line(machine, monkeypatch):
    """All that goes by drivers knows it then: a forgotten place would be a trap."""
    declared = VirtioDriver(
        Echo.name,
        help="what the guest says",
        properties=(
            drivers.Property("limit", drivers.integer(1, 9)),
            drivers.Property("log", drivers.text, host=True),
        ),
        model=f"{__name__}:Echo",
        create=lambda model, parts, values, loop: model(
            loop, **drivers.chosen(values, limit="limit")
        ),
    )
    file = SimpleNamespace(DRIVERS={Echo.name: declared})
    monkeypatch.setitem(sys.modules, "pyvmm.machine.drivers.echo", file)
    monkeypatch.setattr(drivers, "echo", file, raising=False)
    monkeypatch.setitem(drivers.FILES, Echo.name, "echo")
    assert f"{Echo.name}    what the guest says" in help.describe("device", "")
    assert help.describe("device", Echo.name).split()[2:] == ["id", "limit", "log"]
    for properties, problem in (
        (",limit=0", "give a number from 1 to 9"),
        (",limits=1", "did you mean limit?"),
        (",limit=1 -device virtio-echo-devise", "did you mean virtio-echo-device?"),
    ):
        with pytest.raises(ConfigError, match=problem.replace("?", "[?]")):
            options.parse(["-device", *f"{Echo.name}{properties}".split()])
    one, other, third = (
        shape.describe(machine.parse(Echo.name, words))["-device"]
        for words in (",limit=3,log=a", ",limit=3,id=b", ",limit=4")
    )
    assert one == other == "virtio-echo-device limit=3" != third
    (described,) = (
        description
        for (name, _), description in shape.descriptions(machine.parse(Echo.name, "")).items()
        if name.endswith(f"/{Echo.name}")
    )
    (device,) = machine.make(Echo.name, ",limit=3,id=e")
    assert (device.id, device.properties()["limit"]) == ("e", 3)
    assert device.vmstate.name == described.name
