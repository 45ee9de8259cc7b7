import pytest
from harness.uart import Port

from pyvmm.testing.memory_chardev import MemoryChardev
from pyvmm.vmstate.cursor import Cursor


def encode(device):
    """The device's section as bytes, saved twice to see that saving changes nothing."""
    outs = [bytearray(), bytearray()]
    for out in outs:
        device.vmstate.save(out, device.save())
    assert outs[0] == outs[1]
    return bytes(outs[0])


def decode(device, data):
    """Load ``device`` from all of ``data``."""
    source = Cursor(data)
    record = device.vmstate.load(source, device.vmstate.version)
    assert source.at == len(data)
    device.load(record)
    return device


@pytest.fixture(name="encode")
def _encode():
    return encode


@pytest.fixture(name="decode")
def _decode():
    return decode


@pytest.fixture
def carry():
    """Carry the state of one device over to another; the bytes that it took."""

    def carry(old, new):
        data = encode(old)
        decode(new, data)
        assert encode(new) == data
        return data

    return carry


@pytest.fixture
def memory_chardev():
    """Makes chardevs whose other end is the test."""
    made = []

    def make(**options):
        made.append(MemoryChardev(**options))
        return made[-1]

    yield make
    for chardev in made:
        chardev.close()


@pytest.fixture
def make_port(memory_chardev):
    return lambda **options: Port(memory_chardev(**options))


@pytest.fixture
def port(make_port):
    return make_port()
