"""Frames that native code moves between queues and the host, beside the same by hand."""

import os
import socket

import pytest
from harness.virtio_ring import BUFFER, DESC, RAM, ROM, SIZE, USED, Ring
from hypothesis import given
from hypothesis import strategies as st

from pyvmm.devices.virtio import fastpath
from pyvmm.devices.virtio.queue import DESC_F_INDIRECT, DESC_F_NEXT, DESC_F_WRITE, QueueError
from pyvmm.memory.backend import RamBackend
from pyvmm.memory.config import RamConfig
from pyvmm.memory.guest import MemoryRegion

HEADER = 12
TABLE = 0x8000  # an indirect one


@pytest.fixture
def it():
    it = Ring()
    yield it
    it.close()


@pytest.fixture
def packets():
    """A descriptor that keeps writes apart, and its other end."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.setblocking(False)
    theirs.setblocking(False)
    with ours, theirs:
        yield ours, theirs


def frame(size):
    return bytes(HEADER) + bytes(1 + n % 255 for n in range(size - HEADER))


def spread(it, data, mergeable=True):
    return fastpath.spread(it.queue, memoryview(bytearray(data)), mergeable=mergeable)


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


def test_memory_that_comes_and_goes_under_an_enabled_queue(it):
    more = RamBackend(RamConfig("memory-backend-memfd", "more", 0x1000))
    region = MemoryRegion("more", ROM * 2, 0x1000, more)
    for slot in range(3):
        it.desc(slot, BUFFER if slot == 0 else region.gpa, 100, DESC_F_WRITE)
    it.offer(0, 1, 2)
    data = frame(50)
    assert spread(it, data) == 1
    it.memory.add(region)
    assert spread(it, data) == 1
    assert it.memory.read(region.gpa, 10) == data[:10]
    more.write(0, bytes(100))
    it.memory.remove(region)
    assert spread(it, data) == 0  # for pop, which says why
    with pytest.raises(QueueError, match="no memory"):
        it.queue.pop()
    assert bytes(more.view[:100]) == bytes(100)
    more.close()


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


def test_elements_are_there_before_the_index(it, monkeypatch):
    """What the driver sees is the index alone, which moves once."""
    it.desc(0, BUFFER, 100, DESC_F_WRITE)
    it.desc(1, BUFFER + 0x1000, 100, DESC_F_WRITE)
    it.offer(0, 1)
    seen = []

    def store(address, size, value):
        at = address - it.memory.host(USED, 1)
        elements = it.memory.read_u32(USED + 4), it.memory.read_u32(USED + 16)
        seen.append((at, size, value, *elements))

    monkeypatch.setattr("pyvmm.devices.virtio.queue.store", store)
    assert spread(it, frame(150)) == 2
    assert seen == [(2, 2, 2, 0, 50)]


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


# As a driver writes them, most of the time.
WRITABLE = st.one_of(
    *[st.tuples(st.just(0), st.integers(HEADER, 64), st.just(DESC_F_WRITE))] * 8,
    st.tuples(st.integers(-(1 << 64), 1 << 64), st.integers(0, 0xFFFFFFFF), st.integers(0, 0xFFFF)),
)


@given(
    st.lists(WRITABLE, min_size=SIZE, max_size=SIZE),
    st.permutations(range(SIZE + 1)),
    st.integers(0, SIZE),
    st.integers(HEADER, 200),
    st.booleans(),
)
def test_same_as_by_hand(descriptors, order, count, size, mergeable):
    heads = order[:count]
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
    null = os.open(os.devnull, os.O_WRONLY)
    try:
        it.memory.write(DESC, descriptors)
        it.memory.write(it.queue.avail, available)
        for mergeable in (True, False):
            assert ~SIZE <= spread(it, frame(size), mergeable) <= SIZE
        assert 0 <= fastpath.send(it.queue, null, 1, 1 << 31, 2 * SIZE) <= 2 * SIZE
        assert it.memory.read(ROM, 0x1000) == bytes(0x1000)
    finally:
        os.close(null)
        it.close()


def receive(it, fd, budget=1 << 20, plain=False):
    buffer = memoryview(bytearray(4096))
    how = {"mergeable": True, "plain": plain, "budget": budget, "least": 100}
    spent, held = fastpath.receive(it.queue, fd.fileno(), buffer, 20, **how)
    return spent, bytes(buffer[:held])


def test_frames_are_read_into_chains(it, packets):
    ours, theirs = packets
    for slot in range(SIZE):
        it.desc(slot, BUFFER + 0x1000 * slot, 100, DESC_F_WRITE)
    it.offer(*range(SIZE))
    for size in (50, 19, 250, 20):  # one of them is too short
        theirs.send(frame(size))
    assert receive(it, ours) == (100 + 100 + 250 + 100, b"")
    assert it.used() == (5, 4, 20)
    assert (it.queue.last_avail_idx, it.queue.in_flight) == (5, 0)
    assert it.memory.read(BUFFER, 50) == frame(50)[:10] + b"\1\0" + frame(50)[12:]
    assert it.memory.read(BUFFER + 0x1000, 12) == bytes(10) + b"\3\0"
    assert receive(it, ours) == (0, b"")


@pytest.mark.parametrize("flags", [DESC_F_WRITE, 0])
def test_frame_that_cannot_be_spread_is_kept(it, packets, flags):
    """There is no room for it, or the next chain is broken."""
    ours, theirs = packets
    it.desc(0, BUFFER, 100, DESC_F_WRITE)
    it.desc(1, BUFFER + 0x1000, 100, flags)
    it.offer(0, 1)
    for size in (60, 150, 70):
        theirs.send(frame(size))
    assert receive(it, ours) == (100, frame(150))
    assert it.used() == (1, 0, 60)
    assert it.queue.waiting == 1


@pytest.mark.parametrize("header", [b"\1\0", b"\2\0", b"\0\1", b"\0\x80", b"\1\4"])
def test_frame_that_is_not_plain_is_kept_if_it_matters(it, packets, header):
    ours, theirs = packets
    odd = header + frame(60)[2:]
    for slot in range(SIZE):
        it.desc(slot, BUFFER + 0x1000 * slot, 100, DESC_F_WRITE)
    it.offer(*range(SIZE))
    for _ in range(2):
        theirs.send(frame(50))
        theirs.send(odd)
    assert receive(it, ours, plain=True) == (100, odd)
    assert it.used() == (1, 0, 50)
    assert receive(it, ours, plain=False) == (200, b"")
    assert it.memory.read(BUFFER + 0x2000, 60) == header + odd[2:10] + b"\1\0" + odd[12:]


def test_budget_ends_it(it, packets):
    ours, theirs = packets
    for slot in range(SIZE):
        it.desc(slot, BUFFER + 0x1000 * slot, 500, DESC_F_WRITE)
    it.offer(*range(SIZE))
    for _ in range(5):
        theirs.send(frame(300))
    assert receive(it, ours, budget=601) == (900, b"")
    assert it.used()[0] == 3
    for _ in range(3):
        theirs.send(frame(50))
    assert receive(it, ours, budget=1) == (300, b"")
    assert receive(it, ours, budget=301) == (300 + 100, b"")


def test_closed_descriptor_ends_it(it):
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours:
        theirs.close()
        assert receive(it, ours, budget=1000) == (1000, b"")  # an end of file is an empty frame


# ---- to the host ---------------------------------------------------------------------------


def arrived(theirs):
    found = []
    try:
        while True:
            found.append(theirs.recv(1 << 17))
    except BlockingIOError:
        return found


def test_chains_are_written_in_one_call_each(it, packets):
    ours, theirs = packets
    it.memory.write(BUFFER, bytes(range(256)))
    it.desc(4, BUFFER, 10, DESC_F_NEXT, 6)
    it.desc(6, BUFFER + 20, 30, DESC_F_NEXT, 5)
    it.desc(5, BUFFER + 100, 1)
    it.desc(0, BUFFER + 50, 40)
    it.desc(1, TABLE, 32, DESC_F_INDIRECT)
    it.desc(0, BUFFER + 1, 20, DESC_F_NEXT, 1, table=TABLE)
    it.desc(1, BUFFER + 7, 5, table=TABLE)
    it.offer(4, 0, 1)
    assert fastpath.send(it.queue, ours.fileno(), 12, 1000, 10) == 3
    data = bytes(range(256))
    assert arrived(theirs) == [
        data[:10] + data[20:50] + data[100:101],
        data[50:90],
        data[1:21] + data[7:12],
    ]
    assert it.used() == (3, 1, 0)
    assert [it.memory.read_u32(USED + 4 + 8 * n) for n in range(3)] == [4, 0, 1]
    assert (it.queue.last_avail_idx, it.queue.in_flight) == (3, 0)


def test_no_more_than_that_at_once(it, packets):
    ours, theirs = packets
    it.desc(0, BUFFER, 20)
    it.offer(*[0] * 5)
    assert fastpath.send(it.queue, ours.fileno(), 12, 1000, 3) == 3
    assert len(arrived(theirs)) == 3
    assert it.queue.waiting == 2


def test_what_is_not_taken_yet_stays(it, packets):
    ours, theirs = packets
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4608)
    it.desc(0, BUFFER, 1000)
    it.offer(*[0] * SIZE)
    sent = fastpath.send(it.queue, ours.fileno(), 12, 1000, SIZE)
    assert 0 < sent < SIZE
    assert it.used()[0] == it.queue.last_avail_idx == sent
    assert len(arrived(theirs)) == sent
    assert fastpath.send(it.queue, ours.fileno(), 12, 1000, SIZE) > 0


def test_what_is_refused_is_dropped(it):
    it.desc(0, BUFFER, 100)
    it.offer(0, 0)
    assert fastpath.send(it.queue, -1, 12, 1000, 10) == 2
    assert it.used()[0] == 2


@pytest.mark.parametrize("length", [11, 101])
def test_frames_of_other_lengths_are_left(it, packets, length):
    it.desc(0, BUFFER, 50)
    it.desc(1, BUFFER, length)
    it.offer(0, 1, 0)
    assert fastpath.send(it.queue, packets[0].fileno(), 12, 100, 10) == 1
    assert len(arrived(packets[1])) == 1


@pytest.mark.parametrize(
    "values",
    [
        (BUFFER, 100, DESC_F_WRITE),
        (BUFFER, 100, 8),
        (BUFFER, 0),
        (RAM - 10, 20),
        (ROM, 20),
        ((1 << 64) - 10, 20),
        (BUFFER, 20, DESC_F_NEXT, SIZE),
        (BUFFER, 20, DESC_F_NEXT, 0),
        (TABLE, 32, DESC_F_INDIRECT | DESC_F_NEXT),
        (TABLE, 0, DESC_F_INDIRECT),
        (TABLE, 31, DESC_F_INDIRECT),
        (TABLE + 32, 16, DESC_F_INDIRECT),
        (RAM - 16, 32, DESC_F_INDIRECT),
        (ROM, 16, DESC_F_INDIRECT),
    ],
)
def test_chains_of_other_kinds_are_left(it, packets, values):
    it.desc(0, *values)
    it.desc(1, BUFFER, 20)
    it.desc(0, BUFFER, 20, table=TABLE)
    it.desc(2, TABLE, 16, DESC_F_INDIRECT, table=TABLE)
    it.offer(1, 0)
    assert fastpath.send(it.queue, packets[0].fileno(), 12, 1000, 10) == 1
    assert len(arrived(packets[1])) == 1


def test_frame_with_a_buffer_to_be_written_is_left(it, packets):
    it.desc(0, BUFFER, 20, DESC_F_NEXT, 1)
    it.desc(1, BUFFER + 0x1000, 20, DESC_F_WRITE)
    it.offer(0)
    assert fastpath.send(it.queue, packets[0].fileno(), 12, 1000, 10) == 0
    assert arrived(packets[1]) == []


def test_indirect_table_needs_negotiation(packets):
    it = Ring(indirect=False)
    try:
        it.desc(0, TABLE, 16, DESC_F_INDIRECT)
        it.desc(0, BUFFER, 20, table=TABLE)
        it.offer(0)
        assert fastpath.send(it.queue, packets[0].fileno(), 12, 1000, 10) == 0
    finally:
        it.close()


READABLE = st.one_of(
    *[st.tuples(st.integers(0, 0x1000), st.integers(HEADER, 64), st.sampled_from([0, 0, 1]))] * 8,
    st.tuples(st.integers(-(1 << 64), 1 << 64), st.integers(0, 0xFFFFFFFF), st.integers(0, 0xFFFF)),
).flatmap(lambda values: st.tuples(*map(st.just, values), st.integers(0, SIZE)))


@given(
    st.lists(
        st.one_of(READABLE, READABLE, st.sampled_from([16, 32, 64, 0x90, 31])),
        min_size=SIZE,
        max_size=SIZE,
    ),
    st.lists(READABLE, min_size=SIZE, max_size=SIZE),
    st.lists(st.integers(0, SIZE), max_size=SIZE),
)
def test_same_frames_as_by_hand(direct, indirect, heads):
    it = Ring()
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        it.memory.write(BUFFER, bytes(n * 37 % 251 for n in range(0x2000)))
        for table, descriptors in ((DESC, direct), (TABLE, indirect)):
            for slot, one in enumerate(descriptors):
                values = (TABLE, one, DESC_F_INDIRECT) if isinstance(one, int) else one
                if not isinstance(one, int):
                    gpa = BUFFER + one[0]
                    values = (gpa if gpa > BUFFER else BUFFER, *one[1:])
                it.desc(slot, *values, table=table)
        it.offer(*heads)
        theirs.setblocking(False)
        count = fastpath.send(it.queue, ours.fileno(), 12, 1000, 2 * SIZE)
        found = arrived(theirs)
        assert len(found) == count == it.used()[0]
        it.queue.last_avail_idx = it.queue.used_idx = 0
        for data in found:
            chain = it.queue.pop()
            assert not chain.writable
            assert chain.read(1 << 20) == data
            it.queue.push(chain.head, 0)
        if count == len(heads):
            return
        # It stopped with a reason, and not at a chain as drivers make them.
        try:
            chain = it.queue.pop()
        except QueueError:
            return
        usual = all(gpa + length <= RAM for gpa, length in chain.readable) and not chain.writable
        has_empty = any(not one[1] for one in (*direct, *indirect) if not isinstance(one, int))
        odd = any(one[2] & ~7 for one in (*direct, *indirect) if not isinstance(one, int))
        assert not usual or has_empty or odd or not 12 <= chain.readable_size <= 1000
    finally:
        ours.close()
        theirs.close()
        it.close()
