import os

import pytest

from pyvmm.cpr import handover as module
from pyvmm.cpr.handover import ADDED, CHARDEV, OWN, RAM, RESERVED, RUN, Handover, Passenger
from pyvmm.errors import InternalError, MigrationError


@pytest.fixture
def fds():
    """Three inheritable descriptors."""
    opened = [os.memfd_create(f"fd{n}", 0) for n in range(3)]
    yield opened
    for fd in opened:
        try:
            os.close(fd)
        except OSError:
            pass


def is_open(fd):
    return os.path.exists(f"/proc/self/fd/{fd}")


def test_inherited_descriptors_close_on_exec_from_the_start(fds):
    handover = Handover({("a", n): fd for n, fd in enumerate(fds)})
    assert handover.is_incoming
    assert not any(os.get_inheritable(fd) for fd in fds)


def test_taken_once(fds):
    handover = Handover({("a", 0): fds[0], ("a", 1): fds[1], ("b", 0): fds[2]})
    parcel = handover.parcel(RAM, "a")
    assert parcel.peek() == fds[0]
    assert parcel.take() == fds[0]
    assert parcel.take() is parcel.peek() is None
    assert handover.parcel(RAM, "nothing").take() is None
    assert parcel.take_all() == {1: fds[1]}
    assert parcel.take_all() == {}


def test_what_nobody_takes_is_closed_and_named(fds):
    handover = Handover({("a", 0): fds[0], ("run/x", 7): fds[1]})
    handover.parcel(RAM, "a").take()
    assert handover.settle() == [("run/x", 7)]
    assert is_open(fds[0])
    assert not is_open(fds[1])
    assert handover.settle() == []


def test_only_what_is_kept_becomes_inheritable(fds):
    handover = Handover()
    assert not handover.is_incoming
    for fd in fds:
        os.set_inheritable(fd, False)
    handover.parcel(RAM, "a").keep(fds[0])
    handover.parcel(RAM, "b").keep(fds[1])
    handover.parcel(RAM, "b").forget()
    handover.set_inheritable(True)
    assert [os.get_inheritable(fd) for fd in fds] == [True, False, False]
    handover.set_inheritable(False)
    assert not os.get_inheritable(fds[0])


def test_a_name_is_one_descriptor(fds):
    handover = Handover()
    parcel = handover.parcel(CHARDEV, "a")
    parcel.keep(fds[0])
    parcel.keep(fds[0])
    with pytest.raises(InternalError, match=r"preserved as chardev/a\[0\]"):
        parcel.keep(fds[1])
    assert handover.kept() == {("chardev/a", 0): fds[0]}
    assert handover.kept_of(CHARDEV) == {("a", 0): fds[0]}
    handover.kept().clear()
    assert parcel.kept() == fds[0]


def test_what_is_taken_is_not_preserved_by_itself(fds):
    handover = Handover({("a", 0): fds[0]})
    handover.parcel(RAM, "a").take()
    assert handover.kept() == {}


def test_what_was_inherited_stays_open_until_the_guest_runs(fds):
    handover = Handover({("a", 0): fds[0]})
    parcel = handover.parcel(RAM, "a")
    parcel.keep(parcel.take())
    parcel.close(fds[0])
    assert handover.kept() == {}
    assert is_open(fds[0])  # the image before needs it for its return
    handover.release()
    assert not is_open(fds[0])
    assert handover.settle() == []


def test_a_fresh_one_is_closed_at_once_and_so_are_all_afterwards(fds):
    handover = Handover({("a", 0): fds[0]})
    parcel = handover.parcel(RAM, "a")
    parcel.close(fds[1], 1)
    assert not is_open(fds[1])
    parcel.keep(parcel.take())
    handover.release()
    assert is_open(fds[0])
    parcel.close(fds[0])
    assert not is_open(fds[0])


def test_closing_what_is_not_kept_leaves_what_is(fds):
    handover = Handover({("a", 0): fds[0]})
    parcel = handover.parcel(RAM, "a")
    refused = parcel.take()
    parcel.keep(fds[1])
    parcel.close(refused)
    assert parcel.kept() == fds[1]


def test_what_must_have_been_handed_over(fds):
    assert Handover().parcel(RAM, "a").require("memory of a") is None
    handover = Handover({("a", 0): fds[0]})
    assert handover.parcel(RAM, "a").require("memory of a") == fds[0]
    with pytest.raises(MigrationError, match=r"^The memory of b was not handed over by the image"):
        handover.parcel(RAM, "b").require("memory of b")


class Saver(Passenger):
    def __init__(self, state):
        self.state = state

    def save_state(self):
        return self.state


def test_states_are_those_of_passengers_and_what_was_given():
    old = Handover()
    passengers = [Saver(b"one"), Saver(b""), Saver(b"gone")]
    for id, passenger in enumerate(passengers):
        old.parcel(CHARDEV, str(id)).board(passenger)
    old.parcel(CHARDEV, "2").leave()
    assert [old.parcel(CHARDEV, id).is_boarded for id in "012"] == [True, True, False]
    old.parcel(OWN, "note").give(b"slow")
    old.parcel(OWN, "note").give(b"slower")
    old.parcel(OWN, "progress").give(b"x")
    old.parcel(OWN, "progress").give(b"")
    assert old.states() == {"chardev/0": b"one", "note": b"slower"}
    passengers[0].state = b"later"
    new = Handover({}, old.states())
    assert new.inherited_states(CHARDEV) == {"0": b"later"}
    assert new.parcel(CHARDEV, "0").take_state() == b"later"
    assert new.parcel(CHARDEV, "0").take_state() == b""
    assert new.inherited_states(CHARDEV) == {}


def test_all_of_a_kind_go_on(fds):
    handover = Handover({("run/a", 0): fds[0], ("run/b", 3): fds[1], ("running", 0): fds[2]})
    handover.keep_all(RUN)
    assert handover.kept_of(RUN) == {("a", 0): fds[0], ("b", 3): fds[1]}
    assert handover.settle() == [("running", 0)]


KINDS = {
    name: kind
    for name, kind in vars(module).items()
    if name.isupper() and isinstance(kind, str) and name not in ("KVM", "TYPE_CHECKING")
}


def test_no_id_of_a_kind_meets_another():
    handover = Handover()
    assert len(KINDS) == len(set(KINDS.values())) == 15
    ids = ("kvm", "ram", "chardev", "note", "holders", "pc.bios", "vmstate")
    names = [
        handover.parcel(kind, id).name
        for kind in KINDS.values()
        if kind not in (OWN, RAM)
        for id in ids
    ]
    names += [*ids[1:], *RESERVED]  # of memory, and pyvmm's own descriptors
    assert len(names) == len(set(names))
    # Of these pyvmm's own have states, which memory has not.
    with pytest.raises(InternalError, match="no block of memory can be called kvm"):
        handover.parcel(RAM, "kvm")


@pytest.mark.parametrize(
    ("kind", "id", "name"),
    [
        (RAM, "ram0", "ram0"),
        (RAM, "pc.bios", "pc.bios"),
        (RAM, "ram/kvm", "ram/kvm"),
        (OWN, "kvm", "kvm"),
        (OWN, "progress", "progress"),
        ("block", "disk", "block/disk"),
        (CHARDEV, "serial0", "chardev/serial0"),
        (CHARDEV, "run/control/0", "chardev/run/control/0"),
        (ADDED, "x", "chardev-added/x"),
        ("netdev", "n0", "netdev/n0"),
        ("rng", "r", "rng/r"),
        ("monitor", "mon0/fds", "monitor/mon0/fds"),
        ("client-fd", "set/0", "client-fd/set/0"),
        ("huge", "ram/kvm", "huge/ram/kvm"),
        ("boot", "kernel", "boot/kernel"),
        (RUN, "lock", "run/lock"),
        ("cpr", "vmstate", "cpr/vmstate"),
        ("rollback", "error", "rollback/error"),
    ],
)
def test_names_on_the_wire_are_those_of_images_before(kind, id, name):
    assert kind in KINDS.values()
    assert Handover().parcel(kind, id).name == name
