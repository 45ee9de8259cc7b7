"""What the PIT counts once is not counted anew by an update."""

import time

import pytest

from pyvmm._native import ffi, lib

HZ = 1193182
ONCE, AGAIN = (0, 1, 4, 5), (2, 3, 0xFF)


def aged(mode, count, age_s):
    """The counts of all channels, set to ``count`` so long ago."""
    pit = ffi.new("struct kvm_pit_state2 *")
    for channel in pit.channels:
        channel.mode, channel.count = mode, count
        channel.count_load_time = time.monotonic_ns() - int(age_s * 1e9)
    lib.pyvmm_age_pit(pit)
    return [channel.count for channel in pit.channels]


@pytest.mark.parametrize("mode", ONCE)
def test_a_count_goes_on(mode):
    before = time.monotonic()
    counts = aged(mode, 60000, 0.02)
    most = 60000 - int(0.02 * HZ)
    least = most - int((time.monotonic() - before) * HZ) - 2
    assert all(least <= count <= most + 1 for count in counts)


@pytest.mark.parametrize("mode", ONCE)
@pytest.mark.parametrize("age", [0.05, 1, 100])
def test_a_count_that_is_over(mode, age):
    # Channel 0 would raise its interrupt a second time.
    assert aged(mode, 1000, age) == [1000, 1, 1]


@pytest.mark.parametrize("mode", AGAIN)
def test_a_count_that_repeats_begins_anew(mode):
    assert aged(mode, 1000, 0.0005) == [1000] * 3


def test_a_count_of_another_boot():
    assert aged(0, 1000, -5) == [1000] * 3
