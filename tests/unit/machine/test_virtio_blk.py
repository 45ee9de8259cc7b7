"""The properties of a disk."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyvmm.errors import ConfigError
from pyvmm.machine.drivers import virtio_blk

NAMES = [one.name for one in virtio_blk.DRIVER.properties]


def read(properties):
    device = virtio_blk.DRIVER.parse(properties, "-device virtio-blk-device")
    return virtio_blk.config(device.values)


def test_device_properties():
    config = read({"drive": "d"})
    assert (config.write_cache, config.config_wce, config.queue_size) == (None, True, 256)
    assert (config.discard, config.write_zeroes, config.block_size) == (True, True, 0)
    config = read({"drive": "d", "write-cache": "off", "logical_block_size": "4096"})
    assert config.write_cache is False
    assert config.block_size == 4096


@pytest.mark.parametrize(
    ("properties", "problem"),
    [
        ({}, "drive= is missing"),
        ({"drive": "d", "serial": "x" * 21}, "give at most 20 ASCII characters"),
        ({"drive": "d", "serial": "é"}, "give at most 20 ASCII characters"),
        ({"drive": "d", "queue-size": "100"}, "queue-size=100 is no power of two"),
        ({"drive": "d", "queue-size": "2048"}, "give a number from 4 to 1024"),
        ({"drive": "d", "logical_block_size": "8192"}, "give a number from 512 to 4096"),
        (
            {"drive": "d", "logical_block_size": "4096", "physical_block_size": "512"},
            "physical_block_size=512 is below logical_block_size=4096",
        ),
        ({"drive": "d", "seriel": "x"}, "did you mean serial?"),
    ],
)
def test_device_refused(properties, problem):
    with pytest.raises(ConfigError) as caught:
        read(properties)
    assert str(caught.value).startswith("-device virtio-blk-device")
    assert problem in str(caught.value)


@given(st.dictionaries(st.sampled_from(NAMES), st.text() | st.sampled_from(["on", "512"])))
def test_only_config_errors(properties):
    problem = ""
    try:
        problem = read(properties).drive
    except ConfigError as error:
        problem = str(error)
    assert problem
