"""Memory that comes and goes, and who is told of it."""

import pytest

from pyvmm.core.threads import spawn
from pyvmm.errors import HostError, InternalError
from pyvmm.memory.backend import RamBackend
from pyvmm.memory.config import RamConfig
from pyvmm.memory.guest import GuestMemory, GuestMemoryError, MemoryRegion

PAGE = 4096


class Observer:
    """Knows what it was told; refuses what ``refused`` names."""

    def __init__(self, memory):
        self.memory = memory
        self.regions = []
        self.refused = ""

    def map(self, region):
        # The VMM's own accesses come first, and go last.
        assert self.memory.contains(region.gpa, region.size, writable=not region.readonly)
        if region.name == self.refused:
            raise HostError("no room")
        assert region not in self.regions
        self.regions.append(region)

    def unmap(self, region):
        assert self.memory.contains(region.gpa, region.size, writable=not region.readonly)
        if region.name == self.refused:
            raise HostError("it is pinned")
        self.regions.remove(region)

    @property
    def names(self):
        return [region.name for region in self.regions]


@pytest.fixture
def backend():
    backend = RamBackend(RamConfig("memory-backend-ram", "ram0", 4 * PAGE))
    yield backend
    backend.close()


@pytest.fixture
def memory(backend):
    """Two pages with a hole between them."""
    memory = GuestMemory()
    memory.add(MemoryRegion("b", 2 * PAGE, PAGE, backend, PAGE))
    memory.add(MemoryRegion("a", 0, PAGE, backend))
    return memory


@pytest.fixture
def hole(backend):
    """What fits between them."""
    return MemoryRegion("hole", PAGE, PAGE, backend, 2 * PAGE, readonly=True)


@pytest.fixture
def two(memory):
    observers = [Observer(memory), Observer(memory)]
    for observer in observers:
        memory.observe(observer)
    return observers


def names(memory):
    return [region.name for region in memory.regions]


def test_observer_that_comes_late_is_told_of_what_is_there(memory, hole):
    observer = Observer(memory)
    memory.observe(observer)
    assert observer.names == ["a", "b"]
    memory.add(hole)
    assert observer.names == ["a", "b", "hole"]
    memory.remove(memory.regions[0])
    assert observer.names == ["b", "hole"]


def test_observer_that_was_forgotten_is_told_no_more(memory, hole, two):
    memory.forget(two[0])
    memory.forget(two[0])
    memory.add(hole)
    assert [observer.names for observer in two] == [["a", "b"], ["a", "b", "hole"]]


def test_one_that_refuses_to_map_undoes_the_others(memory, hole, two):
    before = memory.regions
    two[1].refused = "hole"
    with pytest.raises(HostError, match="no room"):
        memory.add(hole)
    assert [observer.names for observer in two] == [["a", "b"]] * 2
    assert memory.regions == before
    assert not memory.contains(PAGE, 1, writable=False)
    two[1].refused = ""
    memory.add(hole)
    assert names(memory) == ["a", "hole", "b"]


def test_one_that_refuses_to_unmap_undoes_the_others(memory, two):
    two[1].refused = "a"
    with pytest.raises(HostError, match="it is pinned"):
        memory.remove(memory.regions[0])
    assert [sorted(observer.names) for observer in two] == [["a", "b"]] * 2
    assert memory.contains(0, 1)


def test_one_that_refuses_what_is_there_is_no_observer(memory, hole):
    observer = Observer(memory)
    observer.refused = "b"
    with pytest.raises(HostError, match="no room"):
        memory.observe(observer)
    assert observer.names == []
    memory.add(hole)
    assert observer.names == []


def test_memory_that_went_is_not_there(memory, hole):
    memory.add(hole)
    memory.write(0, b"kept")
    memory.remove(hole)
    for access in (memory.read, memory.host, memory.views, memory.fill):
        with pytest.raises(GuestMemoryError):
            access(PAGE, 1)
    with pytest.raises(GuestMemoryError):
        memory.views(0, 3 * PAGE)
    assert memory.read(0, 4) == b"kept"
    with pytest.raises(InternalError, match="hole is not there"):
        memory.remove(hole)


def test_view_outlives_its_region(memory, backend):
    """And keeps the owner from unmapping it under a system call."""
    view = memory.view(0, PAGE)
    memory.remove(memory.regions[0])
    view[:2] = b"ok"
    assert backend.view[:2] == b"ok"
    with pytest.raises(InternalError):
        backend.close()
    view.release()


def test_regions_of_an_access_are_of_one_moment(memory, hole):
    """Another thread takes the middle away and gives it back: an access over all of it succeeds,
    or says that there is a hole."""
    failures, ended = [], []

    def change():
        for _ in range(2000):
            memory.add(hole)
            memory.remove(hole)
        ended.append(True)

    spawn(change, failures.append)
    seen = set()
    while not ended and not failures:
        try:
            parts = memory.views(0, 3 * PAGE, writable=False)
            assert sum(map(len, parts)) == 3 * PAGE
            assert len(memory.read(0, 3 * PAGE)) == 3 * PAGE
            seen.add("whole")
        except GuestMemoryError:
            seen.add("hole")
    assert failures == []
    assert "hole" in seen
