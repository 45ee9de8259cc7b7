"""The device side of a split virtqueue against rings written by hand."""

import pytest
from harness.virtio_ring import AVAIL, DESC, RAM, ROM, SIZE, USED, Ring
from hypothesis import given
from hypothesis import strategies as st

from pyvmm.devices.virtio.queue import (
    DESC_F_INDIRECT,
    DESC_F_NEXT,
    DESC_F_WRITE,
    MAX_INDIRECT,
    QueueError,
)
from pyvmm.memory.backend import RamBackend
from pyvmm.memory.config import RamConfig
from pyvmm.memory.guest import MemoryRegion


@pytest.fixture
def ring():
    made = []

    def make(**options):
        made.append(Ring(**options))
        return made[-1]

    yield make
    for ring in made:
        ring.close()


def test_nothing_is_there_at_first(ring):
    assert ring().queue.pop() is None


def test_chain_has_its_buffers_in_order(ring):
    it = ring()
    it.desc(3, 0x5000, 10, DESC_F_NEXT, 1)
    it.desc(1, 0x6000, 20, DESC_F_NEXT | DESC_F_WRITE, 7)
    it.desc(7, 0x7000, 30, DESC_F_WRITE)
    it.offer(3)
    chain = it.queue.pop()
    assert (chain.head, chain.readable) == (3, [(0x5000, 10)])
    assert chain.writable == [(0x6000, 20), (0x7000, 30)]
    assert (chain.readable_size, chain.writable_size) == (10, 50)
    assert it.queue.pop() is None
    assert it.queue.in_flight == 1
    it.queue.push(3, 21)
    assert it.used() == (1, 3, 21)
    assert it.queue.in_flight == 0


def test_chain_reads_and_writes_over_its_buffers(ring):
    it = ring()
    it.memory.write(0x5000, b"abc")
    it.memory.write(0x6000, b"defgh")
    it.desc(0, 0x5000, 3, DESC_F_NEXT, 1)
    it.desc(1, 0x6000, 5, DESC_F_NEXT, 2)
    it.desc(2, 0x7000, 2, DESC_F_NEXT | DESC_F_WRITE, 3)
    it.desc(3, 0x8000, 4, DESC_F_WRITE)
    it.offer(0)
    chain = it.queue.pop()
    assert chain.read(100) == b"abcdefgh"
    assert chain.read(4) == b"abcd"
    assert chain.read(3, 1) == b"bcd"
    assert chain.read(9, 4) == b"efgh"
    assert chain.write(b"123") == 3
    assert it.memory.read(0x7000, 3) == b"12\0"
    assert it.memory.read(0x8000, 2) == b"3\0"
    assert chain.write(b"xyz", 3) == 3
    assert it.memory.read(0x8000, 5) == b"3xyz\0"
    assert chain.write(b"0123456789") == 6
    assert it.memory.read(0x8000, 5) == b"2345\0"
    assert b"".join(chain.readable_views()) == b"abcdefgh"
    parts = chain.writable_views()
    parts[1][:] = b"WXYZ"
    assert it.memory.read(0x8000, 5) == b"WXYZ\0"
    del parts, chain


def test_indirect_table_behind_direct_descriptors(ring):
    it = ring()
    it.desc(0, 0x5000, 1, DESC_F_NEXT, 1)
    it.desc(1, 0x9000, 32, DESC_F_INDIRECT | DESC_F_WRITE)  # WRITE means nothing there
    it.desc(0, 0x6000, 2, DESC_F_NEXT, 1, table=0x9000)
    it.desc(1, 0x7000, 4, DESC_F_WRITE, table=0x9000)
    it.offer(0)
    chain = it.queue.pop()
    assert chain.readable == [(0x5000, 1), (0x6000, 2)]
    assert chain.writable == [(0x7000, 4)]


def test_indirect_chain_may_be_longer_than_the_queue(ring):
    it = ring()
    for slot in range(40):
        it.desc(slot, 0x5000 + slot, 1, DESC_F_NEXT if slot < 39 else 0, slot + 1, table=0x9000)
    it.desc(0, 0x9000, 16 * 40, DESC_F_INDIRECT)
    it.offer(0)
    assert len(it.queue.pop().readable) == 40


def test_empty_buffers_are_passed_over_wherever_they_are(ring):
    it = ring()
    it.desc(0, 0xFFFF_FFFF_FFFF_FFFF, 0, DESC_F_NEXT, 1)
    it.desc(1, 0x5000, 1, 0)
    it.offer(0)
    assert it.queue.pop().readable == [(0x5000, 1)]


BROKEN = {
    "next outside the table": (lambda it: it.desc(0, flags=DESC_F_NEXT, next=8), "descriptor 8"),
    "loop of one": (lambda it: it.desc(0, flags=DESC_F_NEXT, next=0), "loop"),
    "loop of two": (
        lambda it: (
            it.desc(0, flags=DESC_F_NEXT, next=1),
            it.desc(1, flags=DESC_F_NEXT, next=0),
        ),
        "loop",
    ),
    "readable behind writable": (
        lambda it: (it.desc(0, flags=DESC_F_NEXT | DESC_F_WRITE, next=1), it.desc(1)),
        "behind",
    ),
    "no memory": (lambda it: it.desc(0, 0xFEB00000, 16), "no memory"),
    "over the end of RAM": (lambda it: it.desc(0, RAM - 8, 16), "no memory"),
    "over the end of addresses": (lambda it: it.desc(0, (1 << 64) - 8, 16), "no memory"),
    "ROM to write to": (lambda it: it.desc(0, ROM, 16, DESC_F_WRITE), "no memory"),
    "length beyond RAM": (lambda it: it.desc(0, 0, 0xFFFFFFFF), "no memory"),
    "nested table": (
        lambda it: (
            it.desc(0, 0x9000, 16, DESC_F_INDIRECT),
            it.desc(0, 0xA000, 16, DESC_F_INDIRECT, table=0x9000),
        ),
        "indirect",
    ),
    "indirect with next": (
        lambda it: it.desc(0, 0x9000, 16, DESC_F_INDIRECT | DESC_F_NEXT, 1),
        "next",
    ),
    "empty table": (lambda it: it.desc(0, 0x9000, 0, DESC_F_INDIRECT), "table of 0"),
    "crooked table": (lambda it: it.desc(0, 0x9000, 24, DESC_F_INDIRECT), "table of 24"),
    "huge table": (
        lambda it: it.desc(0, 0, 16 * (MAX_INDIRECT + 1), DESC_F_INDIRECT),
        f"table of {16 * (MAX_INDIRECT + 1)}",
    ),
    "table outside RAM": (lambda it: it.desc(0, RAM, 16, DESC_F_INDIRECT), "no memory"),
    "loop in a table": (
        lambda it: (
            it.desc(0, 0x9000, 32, DESC_F_INDIRECT),
            it.desc(0, flags=DESC_F_NEXT, next=1, table=0x9000),
            it.desc(1, flags=DESC_F_NEXT, next=0, table=0x9000),
        ),
        "loop",
    ),
    "next outside an indirect table": (
        lambda it: (
            it.desc(0, 0x9000, 32, DESC_F_INDIRECT),
            it.desc(0, flags=DESC_F_NEXT, next=2, table=0x9000),
        ),
        "descriptor 2 in a table of 2",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_malformed_chain_is_an_error(ring, name):
    write, words = BROKEN[name]
    it = ring()
    write(it)
    it.offer(0)
    with pytest.raises(QueueError, match=words):
        it.queue.pop()


def test_ring_of_the_rings_themselves_is_just_memory(ring):
    it = ring()
    it.desc(0, USED, 64, DESC_F_WRITE)
    it.offer(0)
    assert it.queue.pop().write(bytes(64)) == 64


def test_chain_of_more_than_4_gib_is_an_error(ring):
    # Each of its buffers is memory: the same one, again and again.
    it = ring()
    count = MAX_INDIRECT
    for slot in range(count):
        flags = DESC_F_NEXT if slot < count - 1 else 0
        it.desc(slot, 0, RAM, flags, slot + 1, table=0x40000)
    it.desc(0, 0x40000, 16 * count, DESC_F_INDIRECT)
    it.offer(0)
    assert it.queue.pop().readable_size == 1 << 30
    big = RamBackend(RamConfig("memory-backend-memfd", "big", 1 << 33))
    try:
        it.memory.add(MemoryRegion("big", 1 << 33, 1 << 33, big))
        it.desc(1, 1 << 33, 0xFFFFFFFF, DESC_F_NEXT, 2)
        it.desc(2, 1 << 33, 2, 0)
        it.offer(1)
        with pytest.raises(QueueError, match="chain of 4294967297 bytes"):
            it.queue.pop()
    finally:
        big.close()


def test_indirect_descriptor_needs_negotiation(ring):
    it = ring(indirect=False)
    it.desc(0, 0x9000, 16, DESC_F_INDIRECT)
    it.offer(0)
    with pytest.raises(QueueError, match="not negotiated"):
        it.queue.pop()


def test_head_outside_the_queue_is_an_error(ring):
    it = ring()
    it.offer(8)
    with pytest.raises(QueueError, match="descriptor 8"):
        it.queue.pop()


def test_available_index_that_jumps_is_an_error(ring):
    it = ring()
    it.memory.write_u16(AVAIL + 2, SIZE + 1)
    with pytest.raises(QueueError, match="available index"):
        it.queue.pop()
    it.memory.write_u16(AVAIL + 2, 0xFFFF)
    with pytest.raises(QueueError, match="available index"):
        it.queue.pop()


def test_no_more_chains_are_under_way_than_the_queue_has_entries(ring):
    it = ring()
    it.desc(0)
    for _ in range(SIZE):
        it.offer(0)
        it.queue.pop()
    it.offer(0)
    with pytest.raises(QueueError, match="more than 8"):
        it.queue.pop()
    it.queue.push(0, 0)
    assert it.queue.pop().head == 0


def test_indices_wrap(ring):
    it = ring()
    it.desc(0)
    for turn in range(70000):
        it.offer(0)
        it.queue.push(it.queue.pop().head, 0)
        assert it.used()[0] == turn + 1 & 0xFFFF
    assert it.queue.pop() is None


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"size": 0}, "queue of 0"),
        ({"size": 3}, "queue of 3"),
        ({"size": 16}, "queue of 16"),
        ({"size": 65535}, "queue of 65535"),
        ({"desc": DESC + 8}, "descriptor area"),
        ({"avail": AVAIL + 1}, "driver area"),
        ({"used": USED + 2}, "device area"),
        ({"desc": RAM - 16}, "no memory"),
        ({"avail": RAM}, "no memory"),
        ({"used": (1 << 64) - 4}, "no memory"),
        ({"used": ROM}, "ROM"),
    ],
)
def test_impossible_setup_is_an_error(ring, values, words):
    it = ring()
    it.queue.disable()
    for name, value in values.items():
        setattr(it.queue, name, value)
    with pytest.raises(QueueError, match=words):
        it.queue.enable()
    assert not it.queue.ready
    assert it.queue.pop() is None


def test_queue_that_is_not_ready_loses_what_is_pushed(ring):
    it = ring()
    it.desc(0)
    it.offer(0)
    chain = it.queue.pop()
    it.queue.disable()
    it.queue.push(chain.head, 1)
    it.queue.disable_notifications()
    assert not it.queue.enable_notifications()
    assert not it.queue.needs_interrupt()
    assert it.memory.read(USED, 70) == bytes(70)


def test_interrupts_without_event_idx(ring):
    it = ring()
    assert not it.queue.needs_interrupt()
    it.queue.push(0, 0)
    assert it.queue.needs_interrupt()
    assert not it.queue.needs_interrupt()
    it.memory.write_u16(AVAIL, 1)
    it.queue.push(0, 0)
    assert not it.queue.needs_interrupt()


def test_notifications_without_event_idx(ring):
    it = ring()
    it.queue.disable_notifications()
    assert it.memory.read_u16(USED) == 1
    assert not it.queue.enable_notifications()
    assert it.memory.read_u16(USED) == 0
    it.desc(0)
    it.offer(0)
    assert it.queue.enable_notifications()


def test_interrupts_with_event_idx(ring):
    it = ring(event_idx=True)
    used_event = AVAIL + 4 + 2 * SIZE
    assert not it.queue.needs_interrupt()
    for pushed, event, wanted in [
        (1, 0, True),  # the first
        (1, 1, True),  # exactly that one
        (1, 5, False),  # a later one
        (3, 4, True),  # passed meanwhile
        (1, 4, False),  # passed long ago
    ]:
        it.memory.write_u16(used_event, event)
        for _ in range(pushed):
            it.queue.push(0, 0)
        assert it.queue.needs_interrupt() == wanted, (pushed, event)


def test_notifications_with_event_idx(ring):
    it = ring(event_idx=True)
    it.desc(0)
    it.offer(0, 0)
    it.queue.pop()
    assert it.queue.enable_notifications()
    assert it.memory.read_u16(USED + 4 + 8 * SIZE) == 1
    it.queue.pop()
    it.queue.disable_notifications()
    assert it.memory.read_u16(USED) == 0
    assert not it.queue.enable_notifications()
    assert it.memory.read_u16(USED + 4 + 8 * SIZE) == 2


ADDRESS = st.one_of(
    st.integers(0, RAM + 64),
    st.integers(0, (1 << 64) - 1),
    st.sampled_from([DESC, AVAIL, USED, 0x9000, RAM - 8, ROM, ROM + 0xFF8]),
)
DESCRIPTOR = st.tuples(
    ADDRESS,
    st.one_of(st.integers(0, 64), st.integers(0, 0xFFFFFFFF)),
    st.one_of(st.integers(0, 7), st.integers(0, 0xFFFF)),
    st.one_of(st.integers(0, SIZE), st.integers(0, 0xFFFF)),
)


@given(
    st.lists(DESCRIPTOR, max_size=SIZE),
    st.lists(DESCRIPTOR, max_size=SIZE),
    st.lists(st.one_of(st.integers(0, SIZE), st.integers(0, 0xFFFF)), max_size=SIZE),
    st.one_of(st.integers(0, SIZE), st.integers(0, 0xFFFF)),
    st.booleans(),
)
def test_any_ring_gives_valid_chains_or_an_error(direct, indirect, heads, idx, event_idx):
    it = Ring(event_idx=event_idx)
    try:
        for table, descriptors in ((DESC, direct), (0x9000, indirect)):
            for slot, descriptor in enumerate(descriptors):
                it.desc(slot, *descriptor, table=table)
        it.offer(*heads)
        it.memory.write_u16(AVAIL + 2, idx)
        for _ in range(2 * SIZE):
            chain = it.queue.pop()
            if chain is None:
                break
            assert chain.head < SIZE
            assert chain.readable_size + chain.writable_size <= 1 << 32
            for gpa, length in chain.readable:
                assert it.memory.contains(gpa, length, writable=False)
            for gpa, length in chain.writable:
                assert it.memory.contains(gpa, length)
            assert len(chain.read(1 << 16)) == min(chain.readable_size, 1 << 16)
            it.queue.push(chain.head, chain.write(b"x" * 100))
            it.queue.needs_interrupt()
        it.queue.enable_notifications()
    except QueueError:
        pass
    finally:
        it.close()
