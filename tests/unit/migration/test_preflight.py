"""What an update compares before it begins: the sections of the state, and what of carriers."""

import pytest

from pyvmm.errors import MigrationError
from pyvmm.kvm import carrier
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


USED = "fw_cfg[0]"


def compare_used(own, **changes):
    answer = {key: value for key, value in (own | changes).items() if value is not None}
    preflight.compare(own, answer, MemoryChannel(), [USED])


def test_what_the_guest_has_not_used_no_image_has_to_know(own):
    assert USED in own["optional"]
    assert USED not in own["places"]
    assert USED not in own["sections"]
    for optional in (None, {}, {USED: [7, 8]}):
        compare(own, optional=optional)


def test_what_the_guest_uses_the_new_image_has_to_know(own):
    compare_used(own)
    for optional in (None, {}):
        with pytest.raises(MigrationError, match=r"the guest uses fw_cfg\[0\], which the new"):
            compare_used(own, optional=optional)
    with pytest.raises(MigrationError, match=r"reads fw_cfg\[0\] in versions 7 to 8"):
        compare_used(own, optional={USED: [7, 8]})


def test_image_before_an_option_was_not_given_it(own):
    shape = {key: value for key, value in own["shape"].items() if key != "-fw_cfg"}
    compare(own, shape=shape)
    own["shape"]["-fw_cfg"] = "opt/x=y"
    with pytest.raises(MigrationError, match="-fw_cfg is nothing, this machine has opt/x=y"):
        compare(own, shape=shape)


def explain(own, **changes):
    """Why the guest stands through an exec to an image that answers the same but for that."""
    return preflight.explain_plain(compare(own, **changes))


@pytest.mark.parametrize(("oldest", "newest"), [(0, 0), (0, 1), (1, 0), (2, 3)])
def test_guest_runs_to_an_image_that_knows_this_carrier(own, oldest, newest):
    assert explain(own) == ""
    assert explain(own, carrier=[carrier.VERSION - oldest, carrier.VERSION + newest]) == ""


@pytest.mark.parametrize("versions", [None, [0, 0], [2, 9], [-9, 0], [2, 0]])
def test_guest_stands_if_the_new_image_knows_other_carriers(own, versions):
    if versions:
        versions = [carrier.VERSION - 1 + number for number in versions]
    reason = explain(own, carrier=versions, version="9.8")
    assert reason == "the new version 9.8 cannot take over from this carrier"


def test_guest_stands_if_the_new_image_does_not_go_on_with_it(own):
    assert "-incoming defer" in explain(own, incoming="defer")
    assert "-S" in explain(own, autostart=False)
    assert "-S" in explain(own, autostart=None)
