"""The options of the entropy device."""

import pytest

from pyvmm.errors import ConfigError
from pyvmm.machine import options, shape

SOURCE = ["-object", "rng-random,id=r"]


def parse(*words):
    return options.parse(["-serial", "none", *words])


def test_source_and_limits():
    config = parse(
        *("-device", "virtio-rng-device,rng=r,max-bytes=1024,period=1000", *SOURCE),
        *("-object", "rng-builtin,id=b", "-device", "virtio-rng-device,rng=b"),
        *("-object", "rng-random,id=f,filename=/dev/hwrng", "-m", "64M"),
    )
    assert [(one.id, one.filename) for one in config.rngs] == [
        ("r", "/dev/urandom"),
        ("b", ""),
        ("f", "/dev/hwrng"),
    ]
    assert config.objects == []
    # The guest knows nothing of it.
    plain = parse(*["-device", "virtio-rng-device"] * 2, "-m", "64M")
    assert shape.describe(config) == shape.describe(plain)


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["-device", "virtio-rng-device,rng=r"], "rng='r': there is no such source; add -object"),
        ([*SOURCE, *["-device", "virtio-rng-device,rng=r"] * 2], "in use by another device"),
        ([*SOURCE, *SOURCE], "the id r is given twice"),
        ([*SOURCE, "-object", "memory-backend-memfd,id=r,size=128M"], "the id r is given twice"),
        (["-object", "rng-egd,id=r"], "'rng-egd' is no source; give one of rng-builtin"),
        (["-object", "rng-random"], "id= is missing"),
        (["-object", "rng-builtin,id=r,filename=x"], "'filename' is not known here"),
        (["-device", "virtio-rng-device,max-bytes=0"], "max-bytes='0' is not possible"),
        (["-device", "virtio-rng-device,period=5"], "period= is of max-bytes=; add that"),
        (["-device", "virtio-rng-device,max-byte=5"], "did you mean max-bytes?"),
    ],
)
def test_refused(words, problem):
    with pytest.raises(ConfigError) as caught:
        parse(*words)
    assert problem in str(caught.value)
    assert "\n" not in str(caught.value)
