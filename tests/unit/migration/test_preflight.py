"""What an update compares before it stops the guest: the sections of the state."""

import pytest

from pyvmm.errors import MigrationError
from pyvmm.migration import preflight
from pyvmm.migration.channel import MemoryChannel
from pyvmm.testing import streams

RNG = ("-device", "virtio-rng-device", "-incoming", "memfd:")
PLACE = "virtio-mmio@feb00000/virtio-rng-device[0]"
FORMER = "virtio-rng-device[0]"


@pytest.fixture
def own():
    """What a machine with one virtio device says of itself."""
    return preflight.describe(streams.machine_config(*RNG))


def compare(own, **changes):
    """With an image that answers the same but for that; None takes an entry away."""
    answer = {key: value for key, value in (own | changes).items() if value is not None}
    preflight.compare(own, answer, MemoryChannel())
    return answer


def test_sections_are_told_by_either_name(own):
    assert PLACE in own["places"]
    assert FORMER not in own["places"]
    assert FORMER in own["sections"]
    assert PLACE not in own["sections"]
    assert preflight.reads_places(compare(own))


def test_image_that_knows_the_former_names_only(own):
    assert not preflight.reads_places(compare(own, places=None))
    for sections in ({}, own["sections"] | {"another[0]": [1, 1]}, {FORMER: [9, 9]}):
        with pytest.raises(MigrationError, match=r"has no device|reads .* in versions"):
            compare(own, places=None, sections=sections)


def test_places_decide_if_they_are_told(own):
    compare(own, sections={})
    elsewhere = own["places"] | {"virtio-mmio@feb00200/virtio-rng-device[0]": [1, 1]}
    with pytest.raises(MigrationError, match="this machine has no device virtio-mmio@feb00200"):
        compare(own, places=elsewhere)
    del elsewhere[PLACE]
    with pytest.raises(MigrationError, match=f"has no device {PLACE[:20]}"):
        compare(own, places=elsewhere)
    with pytest.raises(MigrationError, match=r"reads virtio-mmio@.* in versions 7 to 8"):
        compare(own, places=own["places"] | {PLACE: [7, 8]})
