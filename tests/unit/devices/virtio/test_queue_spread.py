"""Frames that native code puts into the chains of a receive queue, beside the same by hand."""

import pytest
from harness.virtio_ring import BUFFER, DESC, RAM, ROM, SIZE, USED, Ring
from hypothesis import given
from hypothesis import strategies as st

from pyvmm.devices.virtio.queue import DESC_F_INDIRECT, DESC_F_NEXT, DESC_F_WRITE, QueueError

HEADER = 12


@pytest.fixture
def it():
    it = Ring()
    yield it
    it.close()


def frame(size):
    return bytes(HEADER) + bytes(1 + n % 255 for n in range(size - HEADER))


def spread(it, data, mergeable=True):
    return it.queue.spread(memoryview(bytearray(data)), mergeable=mergeable)


def test_frame_lies_in_the_next_chains(it):
    for slot, length in ((2, 100), (0, 40), (1, 1000)):
        it.desc(slot, BUFFER + 0x1000 * slot, length, DESC_F_WRITE)
    it.offer(2, 0, 1)
    data = frame(200)
    assert spread(it, data) == 3
    found = b"".join(
        it.memory.read(BUFFER + 0x1000 * n, size) for n, size in ((2, 100), (0, 40), (1, 60))
    )
    assert found == data[:10] + b"\3\0" + data[12:]
    assert it.memory.read(BUFFER + 0x1000 + 60, 4) == bytes(4)
    assert it.used() == (3, 1, 60)
    assert (it.queue.last_avail_idx, it.queue.in_flight) == (3, 0)


def test_too_few_chains_are_left_where_they_are(it):
    it.desc(0, BUFFER, 100, DESC_F_WRITE)
    it.offer(0)
    assert spread(it, frame(200)) == ~1
    assert it.used()[0] == it.queue.last_avail_idx == 0
    assert not it.queue.enable_notifications(1)
    it.desc(1, BUFFER + 0x1000, 100, DESC_F_WRITE)
    it.offer(1)
    assert it.queue.enable_notifications(1)
    assert spread(it, frame(200)) == 2


def test_elements_are_there_before_the_index(it):
    """What the driver sees is the index alone, which moves once."""
    it.desc(0, BUFFER, 100, DESC_F_WRITE)
    it.desc(1, BUFFER + 0x1000, 100, DESC_F_WRITE)
    it.offer(0, 1)
    seen = []

    class Watched:
        def __setitem__(self, at, value):
            seen.append((at, value, it.memory.read_u32(USED + 4), it.memory.read_u32(USED + 16)))

    it.queue._used_ring = Watched()
    assert spread(it, frame(150)) == 2
    assert seen == [(1, 2, 0, 50)]


def test_full_ring_without_room_is_for_others_to_drop(it):
    for slot in range(SIZE):
        it.desc(slot, BUFFER + 0x1000 * slot, 20, DESC_F_WRITE)
    it.offer(*range(SIZE))
    assert spread(it, frame(20 * SIZE + 1)) == 0
    assert spread(it, frame(20 * SIZE)) == SIZE


def test_one_buffer_or_none_if_they_cannot_be_merged(it):
    it.desc(0, BUFFER, 100, DESC_F_WRITE)
    it.desc(1, BUFFER + 0x1000, 100, DESC_F_WRITE)
    it.offer(0, 1)
    assert spread(it, frame(101), mergeable=False) == 0
    assert spread(it, frame(100), mergeable=False) == 1


@pytest.mark.parametrize(
    "values",
    [
        (BUFFER, 100, 0),
        (BUFFER, 100, DESC_F_WRITE | DESC_F_NEXT, 1),
        (BUFFER, 160, DESC_F_INDIRECT),
        (BUFFER, 100, DESC_F_WRITE | 0x100),
        (BUFFER, 0, DESC_F_WRITE),
        (BUFFER, HEADER - 1, DESC_F_WRITE),
        (RAM - 10, 20, DESC_F_WRITE),
        (RAM, 20, DESC_F_WRITE),
        (ROM, 20, DESC_F_WRITE),
        ((1 << 64) - 10, 20, DESC_F_WRITE),
        (BUFFER, 0xFFFFFFFF, DESC_F_WRITE),
    ],
)
def test_anything_else_is_left_alone(it, values):
    it.desc(0, *values)
    it.offer(0)
    before = it.memory.read(0, RAM)
    assert spread(it, frame(20)) == 0
    assert it.memory.read(0, RAM) == before


def test_head_and_index_that_cannot_be_are_left_alone(it):
    it.desc(0, BUFFER, 100, DESC_F_WRITE)
    it.offer(SIZE)
    assert spread(it, frame(20)) == 0
    it.offer(*[0] * SIZE)
    assert spread(it, frame(20)) == 0
    with pytest.raises(QueueError):
        it.queue.pop()


def test_queue_that_is_not_ready_takes_nothing(it):
    it.desc(0, BUFFER, 100, DESC_F_WRITE)
    it.offer(0)
    it.queue.disable()
    assert spread(it, frame(20)) == 0


def test_index_wraps(it):
    it.idx = it.queue.last_avail_idx = it.queue.used_idx = 0xFFFF
    for slot in (0, 1):
        it.desc(slot, BUFFER + 0x1000 * slot, 50, DESC_F_WRITE)
    it.offer(0, 1)
    assert spread(it, frame(90)) == 2
    assert it.used() == (1, 1, 40)
    assert it.queue.last_avail_idx == 1


def by_hand(it, data, mergeable):
    """The same with Python's chains; None if there are too few, or one is broken."""
    chains, room = [], 0
    while room < len(data):
        if chains and not mergeable:
            return None
        try:
            chain = it.queue.pop()
        except QueueError:
            return None
        if chain is None or chain.readable:
            return None
        chains.append(chain)
        room += chain.writable_size
    at, used = 0, []
    data = data[:10] + len(chains).to_bytes(2, "little") + data[12:]
    for chain in chains:
        written = chain.write(data[at:])
        used.append((chain.head, written))
        at += written
    it.queue.push_all(used)
    return len(chains)


@given(
    st.lists(
        st.tuples(
            st.one_of(st.just(0), st.integers(-(1 << 64), 1 << 64)),
            st.one_of(st.integers(HEADER, 64), st.integers(0, 0xFFFFFFFF)),
            st.one_of(st.just(DESC_F_WRITE), st.integers(0, 0xFFFF)),
        ),
        min_size=SIZE,
        max_size=SIZE,
    ),
    st.lists(st.integers(0, SIZE), unique=True, max_size=SIZE),
    st.integers(HEADER, 300),
    st.booleans(),
)
def test_same_as_by_hand(descriptors, heads, size, mergeable):
    rings = Ring(), Ring()
    try:
        for it in rings:
            for slot, (offset, length, flags) in enumerate(descriptors):
                # Each has its place, or is anywhere beyond the rings.
                gpa = BUFFER + 0x1000 * slot + offset
                it.desc(slot, gpa if gpa > 2 * BUFFER else BUFFER + 0x1000 * slot, length, flags)
            it.offer(*heads)
        native, python = rings
        count = spread(native, frame(size), mergeable)
        done = by_hand(python, frame(size), mergeable)
        if count > 0:
            assert count == done
            assert native.memory.read(0, RAM) == python.memory.read(0, RAM)
            assert native.queue.last_avail_idx == python.queue.last_avail_idx
        else:
            # What was written is nobody's yet.
            assert native.used()[0] == native.queue.last_avail_idx == 0
        if count < 0:
            assert (done, ~count) == (None, len(heads))
    finally:
        for it in rings:
            it.close()


@given(st.binary(max_size=256), st.binary(max_size=32), st.integers(HEADER, 1 << 16))
def test_any_ring_is_survived(descriptors, available, size):
    """Buffers may lie over each other and over the rings."""
    it = Ring()
    try:
        it.memory.write(DESC, descriptors)
        it.memory.write(it.queue.avail, available)
        for mergeable in (True, False):
            assert ~SIZE <= spread(it, frame(size), mergeable) <= SIZE
        assert it.memory.read(ROM, 0x1000) == bytes(0x1000)
    finally:
        it.close()
