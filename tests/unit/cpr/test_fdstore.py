import os

import pytest

from pyvmm.cpr.fdstore import FdStore
from pyvmm.errors import InternalError


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
    store = FdStore({("a", n): fd for n, fd in enumerate(fds)})
    assert store.is_incoming
    assert not any(os.get_inheritable(fd) for fd in fds)


def test_taken_once(fds):
    store = FdStore({("a", 0): fds[0], ("a", 1): fds[1], ("b", 0): fds[2]})
    assert store.take("a") == fds[0]
    assert store.take("a") is None
    assert store.take("nothing") is None
    assert store.take_all("a") == {1: fds[1]}
    assert store.take_all("a") == {}


def test_what_nobody_takes_is_closed_and_named(fds):
    store = FdStore({("a", 0): fds[0], ("b", 7): fds[1]})
    store.take("a")
    assert store.close_unclaimed() == [("b", 7)]
    assert is_open(fds[0])
    assert not is_open(fds[1])
    assert store.close_unclaimed() == []


def test_only_what_is_kept_becomes_inheritable(fds):
    store = FdStore()
    assert not store.is_incoming
    for fd in fds:
        os.set_inheritable(fd, False)
    store.keep("a", fds[0])
    store.keep("b", fds[1])
    store.forget("b")
    store.set_inheritable(True)
    assert [os.get_inheritable(fd) for fd in fds] == [True, False, False]
    store.set_inheritable(False)
    assert not os.get_inheritable(fds[0])


def test_a_name_is_one_descriptor(fds):
    store = FdStore()
    store.keep("a", fds[0])
    store.keep("a", fds[0])
    with pytest.raises(InternalError, match=r"preserved as a\[0\]"):
        store.keep("a", fds[1])
    assert store.kept() == {("a", 0): fds[0]}
    store.kept().clear()
    assert store.kept()


def test_what_is_taken_is_not_preserved_by_itself(fds):
    store = FdStore({("a", 0): fds[0]})
    store.take("a")
    assert store.kept() == {}


def test_what_is_dropped_stays_open_for_a_way_back(fds):
    store = FdStore({("a", 0): fds[0]})
    store.drop(store.take("a"))
    assert is_open(fds[0])
    assert store.close_unclaimed() == []
    assert not is_open(fds[0])
