"""Help on options, and on the kinds of things that they make."""

import pytest

from pyvmm.errors import ConfigError
from pyvmm.machine import help, options


def asked(*words):
    with pytest.raises(options.HelpRequested) as request:
        options.parse(list(words))
    return help.describe(*request.value.args)


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (["-help"], ["usage: pyvmm run", "  -netdev tap|", "  -m SIZE"]),
        (["-device", "help"], ["virtio-blk-device", "-device KIND,help"]),
        (["-device", "virtio-blk-device,help"], ["  drive\n", "  logical_block_size\n"]),
        (["-device", "virtserialport,?"], ["  nr\n"]),
        (["-device", "driver=isa-debug-exit,help"], ["  iobase\n"]),
        (["-netdev", "tap,help"], ["  ifname\n"]),
        (["-netdev", "passt,id=n0,help"], ["  tcp-ports\n"]),
        (["-chardev", "socket,help"], ["  reconnect\n"]),
        (["-cpu", "help"], [" avx512f ", "core-capability"]),
        (["-cpu", "host,help"], [" avx512f "]),
        (["-drive", "help"], ["file.locking"]),
    ],
)
def test_help(words, wanted):
    text = asked(*words)
    assert all(part in text for part in wanted), text
    assert max(map(len, text.splitlines())) < 200


def test_help_on_what_there_is_not():
    with pytest.raises(ConfigError, match=r"-device: 'virtio-blk-pcie'.*mean virtio-blk-pci"):
        asked("-device", "virtio-blk-pcie,help")
    with pytest.raises(ConfigError, match=r"-netdev: 'l2tpv3'.*give one of tap, stream, passt"):
        asked("-netdev", "l2tpv3,help")


def test_help_may_be_a_text():
    assert options.parse(["-append", "quiet,help", "-kernel", "help"]).kernel.kernel == "help"
