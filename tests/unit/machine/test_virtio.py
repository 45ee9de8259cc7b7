"""The options of virtio devices: what is taken, where it goes, and what each mistake is told."""

import subprocess
import sys

import pytest

from pyvmm.errors import ConfigError
from pyvmm.machine import options, shape
from pyvmm.machine.drivers import virtio_console

SERIAL = ["-device", "virtio-serial-device"]


def parse(*words):
    return options.parse(["-serial", "none", *words]).devices


def describe(*words):
    return shape.describe(options.parse(["-serial", "none", *words]))


def ports(*words):
    """Numbers and drivers of the ports of the first serial device, and how many there may be."""
    serial = next(one for one in parse(*words) if one.driver is virtio_console.SERIAL)
    found = {number: port.values["id"] for number, port in serial.values["ports"].items()}
    return found, serial.values["max_ports"]


def sections(*words):
    return [key for key in shape.descriptions(options.parse([*words])) if "virt" in key[0]]


def test_sections_are_called_by_their_places():
    config = options.parse(
        [
            *("-device", "virtio-rng-device,id=a", "-device", "pvpanic"),
            *("-device", "virtio-serial-device,id=b", "-device", "virtconsole"),
            *("-device", "virtio-rng-device,id=c"),
        ]
    )
    places = [
        ("virtio-mmio@feb00000/virtio-rng-device", 0),
        ("virtio-mmio@feb00200/virtio-serial-device", 0),
        ("virtio-mmio@feb00400/virtio-rng-device", 0),
    ]
    assert [key for key in shape.descriptions(config) if "virt" in key[0]] == places
    former = [("virtio-rng-device", 0), ("virtio-serial-device", 0), ("virtio-rng-device", 1)]
    assert shape.former_names(config) == dict(zip(former, places, strict=True))


def test_a_device_more_changes_no_other_s_section():
    words = ["-device", "virtio-serial-device", "-device", "virtio-rng-device"]
    few = sections(*words)
    assert sections(*words, "-device", "virtio-rng-device")[: len(few)] == few
    assert sections("-device", "pvpanic", *words) == few
    # One of another kind in the place of the first: that of the second stays, which was not so by
    # the number among devices of a name.
    other = sections("-device", "virtio-rng-device", "-device", "virtio-rng-device")
    assert other[1] == few[1]


def test_shape_has_the_virtio_devices_in_order():
    first = ["-device", "virtio-rng-device", "-device", "pvpanic", "-device", "isa-debug-exit"]
    second = [*SERIAL, "-device", "virtconsole"]
    whole = describe(*first, *second)
    assert whole["-device"] == (
        "isa-debug-exit,pvpanic,virtio-rng-device,virtio-serial-device,virtconsole"
    )
    assert describe(*second, *first)["-device"] != whole["-device"]


def test_shape_has_which_network_is_which():
    def networks(*netdevs):
        words = [
            *("-netdev", "stream,id=a,addr.path=x", "-netdev", "stream,id=b,addr.path=y"),
            *(word for id in netdevs for word in ("-device", f"virtio-net-device,netdev={id}")),
        ]
        return describe(*words)["-device"]

    assert networks("a", "b") != networks("b", "a")


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("", ",logical_block_size=4096", False),
        (",queue-size=64,serial=a", ",serial=a,queue-size=64", True),
        (",serial=a", ",serial=b", False),
        (",share-rw=on", ",id=x,write-cache=off", True),
    ],
)
def test_shape_has_what_the_guest_was_told(one, other, same):
    def disk(properties):
        words = ("-drive", "file=a,format=raw,if=none,id=d")
        words += ("-device", f"virtio-blk-device,drive=d{properties}")
        return describe(*words)

    assert (disk(one) == disk(other)) == same


def test_kinds_of_chardevs():
    words = ["-chardev", "socket,id=a,path=x,server=on", "-chardev", "pty,id=b,mux=on"]
    words += ["-serial", "chardev:b", "-monitor", "tcp:localhost:1,server=on", "-serial", "none"]
    assert shape.chardev_kinds(options.parse(words)) == {
        "a": "unix socket",
        "b": "pty,mux=on",
        "compat_monitor0": "tcp socket",
    }


def test_shape_has_the_ports():
    def ports(*words):
        return describe(*words).get("-device virtio-serial-device")

    assert ports("-device", "virtio-rng-device") is None
    port = ["-device", "virtserialport,name=a"]
    assert ports(*SERIAL, "-device", "virtconsole", *port) == (
        "2 ports: 0 virtconsole, 1 virtserialport a"
    )
    assert ports(*SERIAL) == "1 ports:"
    assert ports("-device", "virtio-serial-device,max_ports=4", *port) == (
        "4 ports: 1 virtserialport a"
    )


def test_ports_find_their_numbers():
    console, port = ["-device", "virtconsole,id=c"], ["-device", "virtserialport,id=p"]
    assert ports(*SERIAL) == ({}, 1)
    assert ports(*SERIAL, *console) == ({0: "c"}, 1)
    assert ports(*SERIAL, *port) == ({1: "p"}, 2)
    assert ports(*SERIAL, *port, "-device", "virtconsole,id=c") == ({0: "c", 1: "p"}, 2)
    assert ports(*SERIAL, "-device", "virtconsole,id=c", "-device", "virtconsole,id=d", *port) == (
        {0: "c", 1: "d", 2: "p"},
        3,
    )
    assert ports(*SERIAL, "-device", "virtserialport,id=p,nr=5", *console) == ({0: "c", 5: "p"}, 6)
    assert ports("-device", "virtio-serial-device,max_ports=8", *console) == ({0: "c"}, 8)


def test_ports_sit_on_the_bus_that_they_name():
    words = [
        *("-device", "virtio-serial-device,id=one", "-device", "virtio-serial-device,id=two"),
        *("-device", "virtconsole,id=x,bus=one.0", "-device", "virtconsole,id=y"),
    ]
    one, two = (one for one in parse(*words) if one.driver is virtio_console.SERIAL)
    assert one.values["ports"][0].values["id"] == "x"
    assert two.values["ports"][0].values["id"] == "y"


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["virtio-rngs"], "'virtio-rngs' is no device; did you mean virtio-rng-pci?"),
        (["virtio-rng-device,foo=1"], "'foo' is not known here; the keys are id"),
        (["virtio-rng-device"] * 9, "one virtio device too many; at most 8"),
        (["virtio-rng-device,id=a", "virtio-rng-device,id=a"], "the id 'a' is given twice"),
        (["virtconsole"], "put -device virtio-serial-device in front of it"),
        (["virtconsole", "virtio-serial-device"], "put -device virtio-serial-device in front"),
        (["virtio-serial-device,id=a", "virtconsole,bus=b.0"], "bus='b.0': there is no such bus"),
        (["virtio-serial-device,max_ports=0"], "max_ports='0' is not possible"),
        (["virtio-serial-device,max_ports=32"], "max_ports='32' is not possible"),
        (
            ["virtio-serial-device,max_ports=1", "virtserialport"],
            "port 1 is one too many for max_ports=1",
        ),
        (["virtio-serial-device", *["virtconsole"] * 32], "port 31 is one too many"),
        (["virtio-serial-device", "virtserialport,nr=0"], "port 0 is kept for a virtconsole"),
        (["virtio-serial-device", "virtconsole,nr=2", "virtserialport,nr=2"], "nr=2: that port"),
        (["virtio-serial-device", "virtconsole,nr=31"], "nr='31' is not possible"),
        (["virtio-serial-device", "virtconsole,size=3"], "'size' is not known here"),
        (["virtio-serial-device", f"virtserialport,name={'x' * 129}"], "name: at most 128 bytes"),
        (["virtio-serial-device", "virtserialport,name=\udcff"], "characters that can be printed"),
        (["virtio-serial-device", "virtconsole,chardev=none"], "none"),
    ],
)
def test_mistake_is_one_line_with_its_mend(words, error):
    with pytest.raises(ConfigError, match=r"^-device") as raised:
        parse(*(word for device in words for word in ("-device", device)))
    assert error in str(raised.value)
    assert "\n" not in str(raised.value)


def test_chardev_is_not_given_to_two():
    with pytest.raises(ConfigError, match="con"):
        parse(
            *("-chardev", "null,id=con", *SERIAL, "-device", "virtconsole,chardev=con"),
            *("-device", "virtserialport,chardev=con"),
        )


def test_machine_without_virtio_imports_none_of_it():
    code = """
import sys
from pyvmm.machine import builder, options, shape
shape.descriptions(options.parse(["-device", "pvpanic"]))
sys.exit(", ".join(name for name in sys.modules if "virtio" in name) or 0)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
