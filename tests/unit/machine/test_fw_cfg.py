"""The items that a machine has, and ``-fw_cfg``."""

import os
import struct

import pytest

from pyvmm.cpr.handover import FW_CFG, Handover
from pyvmm.devices.fw_cfg import FILE_FIRST
from pyvmm.errors import ConfigError
from pyvmm.machine import fw_cfg_items, options, shape
from pyvmm.machine.fw_cfg_files import LARGEST, MOST, OWN_NAMES, FwCfgFiles
from pyvmm.testing import images
from pyvmm.testing.fake_parts import make_parts


def parse(*words):
    return options.parse(["-serial", "none", *words])


@pytest.fixture
def items():
    """Makes the items of a command line: a function of their keys, or of their names."""
    made = []

    def make(*words, files=None):
        config = parse(*words)
        parts = make_parts(config)
        made.append(parts)
        for device in config.devices:
            device.driver.add(parts, device)
        if config.fw_cfg:
            parts.fw_cfg_files = parts.opened.add(FwCfgFiles(config.fw_cfg, parts.handover))
        found = fw_cfg_items.make(parts, config, files or {})

        def read(key):
            if isinstance(key, str):
                key = directory(found)[key][1]
            item = found[key]
            return item.read(0, item.size)

        read.found = found
        return read

    yield make
    for parts in made:
        parts.opened.close()
        parts.loop.close()


def directory(found):
    """Size and key of each file by name, in their order."""
    data = found[0x19].read(0, found[0x19].size)
    (count,) = struct.unpack_from(">I", data)
    assert len(data) == 4 + 64 * count
    entries = [struct.unpack_from(">IHH56s", data, 4 + 64 * number) for number in range(count)]
    for size, key, reserved, _ in entries:
        assert (found[key].size, reserved) == (size, 0)
    names = [name.rstrip(b"\0").decode() for *_, name in entries]
    assert names == sorted(names)
    return {name: (size, key) for name, (size, key, *_) in zip(names, entries, strict=True)}


def test_numbers(items):
    read = items("-m", "5G", "-smp", "3")
    assert read(0) == b"QEMU"
    assert read(1) == b"\3\0\0\0"
    assert int.from_bytes(read(3), "little") == 5 << 30
    assert read(5) == read(15) == b"\3\0"
    assert read(2) == bytes(16)
    assert read(0x8002) == bytes(4)


def test_files_of_the_machine(items):
    read = items("-m", "5G", "-device", "pvpanic", "-device", "vmcoreinfo")
    assert set(directory(read.found)) == set(OWN_NAMES)
    assert struct.unpack("<QQIQQI", read("etc/e820")) == (0, 3 << 30, 1, 4 << 30, 2 << 30, 1)
    assert read("etc/pvpanic-port") == b"\x05\x05"
    assert read("etc/acpi/rsdp").startswith(b"RSD PTR ")
    assert read("etc/vmcoreinfo") == struct.pack("<HHIQ", 1, 0, 0, 0)
    small = items("-m", "64M", "-machine", "acpi=off")
    assert list(directory(small.found)) == ["etc/e820"]
    assert small("etc/e820") == struct.pack("<QQI", 0, 64 << 20, 1)


def test_keys_of_the_machine_are_never_given_away(items):
    """A guest's driver remembers them over an update."""
    assert OWN_NAMES[:6] == (
        *("etc/e820", "etc/acpi/rsdp", "etc/acpi/tables", "etc/table-loader"),
        *("etc/pvpanic-port", "etc/vmcoreinfo"),
    )
    found = directory(items("-fw_cfg", "opt/b,string=x", "-fw_cfg", "opt/a,string=yz").found)
    assert found["etc/e820"][1] == FILE_FIRST
    assert (found["opt/a"], found["opt/b"]) == ((2, 0x40), (1, 0x41))


def test_command_line_and_initrd(items, tmp_path):
    (tmp_path / "initrd").write_bytes(b"initrd")
    with (tmp_path / "initrd").open("rb") as file:
        words = ("-m", "64M", "-kernel", "k", "-append", "one two")
        read = items(*words, files={"-initrd": file.fileno()})
        assert read(0x15) == b"one two\0"
        assert int.from_bytes(read(0x14), "little") == 8
        assert int.from_bytes(read(0x13), "little") == 0x20000
        assert read(0x12) == b"initrd"
        assert struct.unpack("<II", read(0x0A) + read(0x0B)) == ((64 << 20) - 4096, 6)
        assert not {0x07, 0x08, 0x11, 0x17, 0x18} & set(read.found)


def test_linux_as_firmware_loads_it(items, tmp_path):
    code = bytes(range(256)) * 8
    image = images.bzimage(images.pack(b"x" * 5000, "gzip"), code)
    (tmp_path / "kernel").write_bytes(image)
    (tmp_path / "initrd").write_bytes(bytes(10000))
    with (tmp_path / "kernel").open("rb") as kernel, (tmp_path / "initrd").open("rb") as initrd:
        files = {"-kernel": kernel.fileno(), "-initrd": initrd.fileno()}
        read = items("-kernel", "k", "-m", "1G", files=files)
        setup = read(0x18)
        assert len(setup) == int.from_bytes(read(0x17), "little") == (image[0x1F1] + 1) * 512
        assert int.from_bytes(read(0x16), "little") == 0x10000
        assert int.from_bytes(read(0x07), "little") == 0x100000
        kernel_data = read(0x11)
        assert int.from_bytes(read(0x08), "little") == len(kernel_data)
        assert image[len(setup) :].startswith(kernel_data)
        assert setup[0x210] == 0xB0
        assert setup[0x211] & 0x81 == 0x81
        assert struct.unpack_from("<I", setup, 0x228) == (0x20000,)
        assert struct.unpack_from("<II", setup, 0x218) == struct.unpack(
            "<II", read(0xA) + read(0xB)
        )
        # Nothing else of the header is changed.
        changed = {at for at in range(len(setup)) if setup[at] != image[at]}
        assert changed <= {0x210, 0x211, *range(0x218, 0x220), 0x224, 0x225, *range(0x228, 0x22C)}


@pytest.mark.parametrize("content", [b"", b"x", b"\x7fELF", bytes(0x202) + b"HdrS"])
def test_other_kernels_have_no_parts(items, tmp_path, content):
    (tmp_path / "kernel").write_bytes(content)
    with (tmp_path / "kernel").open("rb") as file:
        read = items("-kernel", "k", files={"-kernel": file.fileno()})
    assert not {0x07, 0x08, 0x11, 0x17, 0x18} & set(read.found)
    assert read(0x15) == b"\0"


def test_contents_of_the_operator(items, tmp_path, capfd):
    path = tmp_path / "content"
    path.write_bytes(b"\0\1content")
    read = items(
        *("-fw_cfg", f"name=opt/org.example/file,file={path}"),
        *("-fw_cfg", "opt/org.example/text,string=a,,b=c", "-fw_cfg", "etc/mine,string="),
    )
    path.write_bytes(b"changed")
    assert read("opt/org.example/file") == b"\0\1content"
    assert read("opt/org.example/text") == b"a,b=c"
    assert read("etc/mine") == b""
    assert capfd.readouterr().err.count("names of users should begin with opt/") == 1


def test_contents_go_over_an_update(tmp_path):
    path = tmp_path / "content"
    path.write_bytes(b"content")
    config = parse("-fw_cfg", f"opt/x,file={path}").fw_cfg
    handover = Handover()
    first = FwCfgFiles(config, handover)
    path.unlink()
    (key, fd), *_ = handover.kept().items()
    assert key == (f"{FW_CFG}/opt/x", 0)
    second = FwCfgFiles(config, Handover({key: os.dup(fd)}, {}))
    first.close()
    assert second.items["opt/x"].read(0, 7) == b"content"
    second.close()


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["opt/x"], "give name= and one of"),
        (["string=x"], "give name= and one of"),
        (["opt/x,string=a,file=b"], "give name= and one of"),
        (["opt/x,file="], "give a path"),
        (["opt/x,strings=a"], "did you mean string"),
        (["o" * 56 + ",string=a"], "at most 55 ASCII"),
        (["opt/\u00e9,string=a"], "at most 55 ASCII"),
        (["etc/e820,string=a"], "the machine's own"),
        (["opt/x,string=a", "opt/x,string=b"], "given twice"),
        ([f"opt/{number},string=a" for number in range(MOST + 1)], "one too many"),
    ],
)
def test_names_that_cannot_be(words, problem):
    with pytest.raises(ConfigError, match=f"^-fw_cfg: .*{problem}"):
        parse(*(word for value in words for word in ("-fw_cfg", value)))


def test_name_of_the_longest_size(items):
    name = "opt/" + "n" * 51
    assert items("-fw_cfg", f"{name},string=a")(name) == b"a"


def test_files_that_cannot_be(tmp_path):
    with pytest.raises(ConfigError, match=r"-fw_cfg: file=.*No such file"):
        FwCfgFiles(parse("-fw_cfg", f"opt/x,file={tmp_path}/none").fw_cfg, Handover())
    with (tmp_path / "large").open("wb") as file:
        file.truncate(LARGEST + 1)
    before = os.listdir("/proc/self/fd")
    with pytest.raises(ConfigError, match="more than 256 MiB"):
        FwCfgFiles(parse("-fw_cfg", f"opt/x,file={tmp_path}/large").fw_cfg, Handover())
    assert os.listdir("/proc/self/fd") == before


def test_update_keeps_what_the_guest_was_told(tmp_path):
    def told(*values):
        words = [word for value in values for word in ("-fw_cfg", value)]
        return shape.describe(parse(*words))["-fw_cfg"]

    assert told() == ""
    assert told("opt/a,string=x", "opt/b,file=p") == told("opt/b,file=q", "opt/a,string=x")
    assert told("opt/a,string=x") != told("opt/a,string=y")
    assert told("opt/a,string=x") != told("opt/a,file=x")


@pytest.mark.parametrize(
    ("value", "reinjects"),
    [
        ("kvm-pit.lost_tick_policy=delay", True),
        ("kvm-pit.lost_tick_policy=discard", False),
        ("driver=kvm-pit,property=lost_tick_policy,value=discard", False),
    ],
)
def test_lost_ticks(value, reinjects):
    assert parse("-global", value).pit_reinjects == reinjects
    assert parse("-global", value, "-global", "kvm-pit.lost_tick_policy=delay").pit_reinjects


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        ("kvm-pit.lost_tick_policy=slew", "'slew': give delay or discard"),
        ("kvm-pit.lost_tick_policy", "'': give delay or discard"),
        ("virtio-blk.x=1", "'virtio-blk.x' cannot be set; what can is kvm-pit"),
        ("driver=kvm-pit,property=iobase,value=1", "'kvm-pit.iobase' cannot be set"),
        ("driver=kvm-pit,prop=iobase", "did you mean property"),
    ],
)
def test_other_globals_are_refused(value, problem):
    with pytest.raises(ConfigError, match=f"^-global: .*{problem}"):
        parse("-global", value)
