"""Where -device puts functions on the PCI bus, and what is refused."""

import pytest

from pyvmm.errors import ConfigError
from pyvmm.machine import options, shape


def parse(*devices, machine=""):
    words = ["-machine", machine] if machine else []
    for device in devices:
        words += ["-device", device]
    return options.parse(words)


def places(*devices):
    return [device.place for device in parse(*devices).devices]


def test_next_free_slot():
    assert places(*["virtio-rng-pci"] * 3) == [(1, 0), (2, 0), (3, 0)]
    assert places("virtio-rng", "virtio-rng,addr=1", "virtio-rng") == [(2, 0), (1, 0), (3, 0)]
    assert places("virtio-rng,addr=1f", "virtio-rng") == [(31, 0), (1, 0)]
    assert places("virtio-rng,addr=2.0,multifunction=on", "virtio-rng,addr=2.7") == [(2, 0), (2, 7)]
    assert places(*["virtio-rng-pci"] * 31)[-1] == (31, 0)


@pytest.mark.parametrize(
    ("devices", "machine", "error"),
    [
        (["virtio-rng-pci,addr=0"], "", "addr='0' is no place on the bus; give a slot from 1"),
        (["virtio-rng-pci,addr=20"], "", "addr='20' is no place"),
        (["virtio-rng-pci,addr=1.8"], "", "addr='1.8' is no place"),
        (["virtio-rng-pci,addr=1."], "", "addr='1.' is no place"),
        (["virtio-rng-pci,addr=x"], "", "addr='x' is no place"),
        (["virtio-rng-pci,bus=pci.1"], "", "bus='pci.1': give one of pci.0, pcie.0"),
        (["virtio-rng-pci,addr=1"] * 2, "", "addr=1.0 is given twice"),
        (["virtio-rng-pci,addr=1.1"], "", "addr=1.1: guests look for function 0 first"),
        (
            ["virtio-rng-pci,addr=1", "virtio-rng-pci,addr=1.1"],
            "",
            "addr=1.1: function 0 says that it is alone; give it multifunction=on",
        ),
        (["virtio-rng-pci"] * 32, "", "the PCI bus is full; at most 31 slots"),
        (["virtio-rng-pci"], "pci=off", "pci=off says that there is no bus; give pci=on"),
        (["virtio-rng-pci,id=a", "virtio-rng-device,id=a"], "", "the id 'a' is given twice"),
    ],
)
def test_mistake_is_one_line_with_its_mend(devices, machine, error):
    with pytest.raises(ConfigError, match=r"^-device") as raised:
        parse(*devices, machine=machine)
    assert error in str(raised.value)
    assert "\n" not in str(raised.value)


def test_bus_is_there_for_a_device_or_if_it_is_asked_for():
    assert not parse("virtio-rng-device").has_pci
    assert not parse(machine="pci=off").has_pci
    assert parse(machine="pci=on").has_pci
    assert parse("virtio-rng-pci").has_pci
    assert "-machine" not in shape.describe(parse("virtio-rng-device"))
    both = [shape.describe(parse("virtio-rng-pci", machine=machine)) for machine in ("", "pci=on")]
    assert both[0] == both[1]


def test_an_update_compares_places():
    def device(*devices):
        return shape.describe(parse(*devices))["-device"]

    plain = device("virtio-rng-pci", "virtio-rng-pci")
    assert plain == "virtio-rng-pci at 1.0,virtio-rng-pci at 2.0"
    assert device("virtio-rng,addr=1", "virtio-rng-pci,addr=02.0,bus=pci.0") == plain
    assert device("virtio-rng-pci,addr=2", "virtio-rng-pci,addr=3") != plain
    assert device("virtio-rng-pci,vectors=4", "virtio-rng-pci") != plain


def test_sections_are_called_by_their_places():
    def sections(*devices):
        return [name for name, _ in shape.descriptions(parse(*devices)) if "/" in name]

    devices = ["virtio-rng-pci,addr=5", "virtio-serial", "virtio-rng-device", "virtconsole"]
    assert sections(*devices) == [
        "0000:00:05.0/virtio-rng-pci",
        "0000:00:01.0/virtio-serial-pci",
        "virtio-mmio@feb00000/virtio-rng-device",
    ]
    more = sections(*devices, "virtio-rng-pci", "virtio-rng-device")
    assert set(more) - set(sections(*devices)) == {
        "0000:00:02.0/virtio-rng-pci",
        "virtio-mmio@feb00200/virtio-rng-device",
    }
