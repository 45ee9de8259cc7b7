"""Bytes that native code moves from queues to streams, beside the same by Python alone."""

import os
import socket

import pytest
from harness.virtio_ring import BUFFER, DESC, RAM, ROM, SIZE, USED, Ring
from harness.virtio_stream import Stream, arrived
from hypothesis import given
from hypothesis import strategies as st

from pyvmm.core.eventloop import EventLoop
from pyvmm.devices.virtio import fastpath, mmio, transport
from pyvmm.devices.virtio.console import Port, VirtioConsole
from pyvmm.devices.virtio.queue import DESC_F_INDIRECT, DESC_F_NEXT, DESC_F_WRITE
from pyvmm.testing.virtio_driver import VirtioDriver

TABLE = 0x8000  # an indirect one
CONTENTS = bytes(n * 37 % 251 for n in range(0x8000))
OK = transport.S_ACKNOWLEDGE | transport.S_DRIVER | transport.S_DRIVER_OK | transport.S_FEATURES_OK
OUT = 1


@pytest.fixture
def it():
    it = Ring()
    it.memory.write(BUFFER, CONTENTS)
    yield it
    it.close()


@pytest.fixture
def stream():
    """A descriptor that takes bytes, and its other end."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.setblocking(False)
        theirs.setblocking(False)
        yield ours, theirs


def pour(it, fd, sent=0, budget=1 << 20, least=1):
    return fastpath.pour(it.queue, fd.fileno(), sent, budget=budget, least=least)


def test_chains_of_any_framing_are_one_stream(it, stream):
    it.desc(4, BUFFER, 10, DESC_F_NEXT, 6)
    it.desc(6, BUFFER + 20, 30, DESC_F_NEXT, 5)
    it.desc(5, BUFFER + 100, 1)
    it.desc(0, BUFFER + 50, 40)
    it.desc(1, TABLE, 32, DESC_F_INDIRECT)
    it.desc(0, BUFFER + 1, 20, DESC_F_NEXT, 1, table=TABLE)
    it.desc(1, BUFFER + 7, 5, table=TABLE)
    it.offer(4, 0, 1)
    assert pour(it, stream[0]) == (41 + 40 + 25, 0, False)
    parts = ((0, 10), (20, 50), (100, 101), (50, 90), (1, 21), (7, 12))
    assert arrived(stream[1]) == b"".join(CONTENTS[start:end] for start, end in parts)
    assert [it.memory.read_u32(USED + 4 + 8 * n) for n in range(3)] == [4, 0, 1]
    assert it.used() == (3, 1, 0)
    assert (it.queue.last_avail_idx, it.queue.in_flight) == (3, 0)


def test_index_wraps(it, stream):
    it.idx = it.queue.last_avail_idx = it.queue.used_idx = 0xFFFF
    it.desc(0, BUFFER, 50)
    it.offer(0, 0)
    assert pour(it, stream[0]) == (100, 0, False)
    assert it.used() == (1, 0, 0)
    assert it.queue.last_avail_idx == 1


def test_what_was_sent_is_not_sent_again(it, stream):
    it.desc(0, BUFFER, 10, DESC_F_NEXT, 1)
    it.desc(1, BUFFER + 0x100, 10)
    it.offer(0, 0)
    assert pour(it, stream[0], sent=13) == (27, 0, False)
    assert arrived(stream[1]) == CONTENTS[0x103:0x10A] + CONTENTS[:10] + CONTENTS[0x100:0x10A]


@pytest.mark.parametrize("sent", [20, 21, 1 << 40])
def test_chain_that_became_shorter_is_left(it, stream, sent):
    it.desc(0, BUFFER, 20)
    it.offer(0)
    assert pour(it, stream[0], sent=sent) == (0, sent, False)
    assert it.queue.waiting == 1


def test_what_is_not_taken_waits(it, stream):
    """Wherever a write ends, the next goes on there."""
    ours, theirs = stream
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4608)
    for slot in range(SIZE):
        it.desc(slot, BUFFER + 0x10 * slot, 0x7001)
    it.offer(*range(SIZE))
    found, sent, rounds = b"", 0, 0
    while it.queue.waiting:
        rounds += 1
        before = it.queue.last_avail_idx
        _, sent, is_full = pour(it, ours, sent)
        assert is_full or not it.queue.waiting
        assert it.used()[0] == it.queue.last_avail_idx == it.queue.used_idx
        assert sent < 0x7001
        data = arrived(theirs)
        assert data or before != it.queue.last_avail_idx
        found += data
    assert rounds > 2
    assert sent == 0
    assert found == b"".join(CONTENTS[0x10 * n : 0x10 * n + 0x7001] for n in range(SIZE))


def test_budget_ends_it(it, stream):
    it.desc(0, BUFFER, 100)
    it.offer(*[0] * SIZE)
    # One call takes all that is there: the budget is looked at before each.
    assert pour(it, stream[0], budget=1, least=500) == (SIZE * 500, 0, False)
    assert pour(it, stream[0], budget=1) == (0, 0, False)
    for slot in range(4):
        it.desc(slot, 0x20000, 0x9000)
    it.offer(*range(4))
    assert pour(it, stream[0], budget=1) == (0x10000, 0x7000, False)
    assert it.used()[0] == SIZE + 1


@pytest.mark.parametrize("make", [lambda: os.open(os.devnull, os.O_RDONLY), lambda: None])
def test_error_is_left_to_others(it, make):
    fd = make()
    it.desc(0, BUFFER, 100)
    it.offer(0)
    number = -1 if fd is None else fd
    assert fastpath.pour(it.queue, number, 3, budget=1, least=1) == (0, 3, False)
    assert (it.used()[0], it.queue.waiting) == (0, 1)
    if fd is not None:
        os.close(fd)


@pytest.mark.parametrize(
    "values",
    [
        (BUFFER, 100, DESC_F_WRITE),
        (BUFFER, 100, 8),
        (BUFFER, 0),
        (RAM - 10, 20),
        (ROM, 20),
        ((1 << 64) - 10, 20),
        (BUFFER, 0xFFFFFFFF),
        (BUFFER, 20, DESC_F_NEXT, SIZE),
        (BUFFER, 20, DESC_F_NEXT, 0),
        (BUFFER, 20, DESC_F_NEXT, 3),
        (TABLE, 32, DESC_F_INDIRECT | DESC_F_NEXT),
        (TABLE, 0, DESC_F_INDIRECT),
        (TABLE, 31, DESC_F_INDIRECT),
        (TABLE + 32, 16, DESC_F_INDIRECT),
        (RAM - 16, 32, DESC_F_INDIRECT),
        (ROM, 16, DESC_F_INDIRECT),
    ],
)
def test_chains_of_other_kinds_are_left(it, stream, values):
    it.desc(0, *values)
    it.desc(1, BUFFER, 20)
    it.desc(3, BUFFER, 20, DESC_F_WRITE)
    it.desc(0, BUFFER, 20, table=TABLE)
    it.desc(2, TABLE, 16, DESC_F_INDIRECT, table=TABLE)
    it.offer(1, 0, 1)
    assert pour(it, stream[0]) == (20, 0, False)
    assert arrived(stream[1]) == CONTENTS[:20]
    assert it.used() == (1, 1, 0)
    assert it.queue.waiting == 2


def test_head_and_index_that_cannot_be_are_left(it, stream):
    it.desc(0, BUFFER, 100)
    it.offer(SIZE)
    assert pour(it, stream[0]) == (0, 0, False)
    it.offer(*[0] * SIZE)
    assert pour(it, stream[0]) == (0, 0, False)
    assert arrived(stream[1]) == b""


def test_queue_that_is_not_ready_or_has_chains_under_way_is_left(it, stream):
    it.desc(0, BUFFER, 100)
    it.offer(0, 0)
    assert it.queue.pop() is not None
    assert pour(it, stream[0]) == (0, 0, False)
    it.queue.disable()
    assert pour(it, stream[0]) == (0, 0, False)
    assert arrived(stream[1]) == b""


@given(st.binary(max_size=256), st.binary(max_size=32), st.integers(0, 1 << 64))
def test_any_ring_is_survived(descriptors, available, sent):
    """Buffers may lie over each other and over the rings."""
    it = Ring()
    null = os.open(os.devnull, os.O_WRONLY)
    try:
        it.memory.write(DESC, descriptors)
        it.memory.write(it.queue.avail, available)
        sent = min(sent, (1 << 64) - 1)
        _, left, is_full = fastpath.pour(it.queue, null, sent, budget=1 << 20, least=1)
        assert (left in (0, sent), is_full) == (True, False)
        assert it.queue.used_idx == it.queue.last_avail_idx <= SIZE
        assert it.memory.read(ROM, 0x1000) == bytes(0x1000)
    finally:
        os.close(null)
        it.close()


# ---- behind a console ----------------------------------------------------------------------


class Console:
    """A console on a stream, natively or not, and its driver."""

    def __init__(self, loop):
        self.loop = loop
        self.chardev = Stream(loop)
        self.driver = VirtioDriver(self.device())
        self.driver.start()
        self.queue = self.driver.queues[OUT]

    def device(self):
        return VirtioConsole(self.loop, [Port(0, self.chardev, is_console=True)])

    def run(self):
        """Serve until nothing more arrives; return what has."""
        found = b""
        while True:
            self.driver.run()
            self.loop.run_once(0)
            data = arrived(self.chardev.peer)
            if not data:
                return found
            found += data

    def close(self):
        self.driver.close()
        self.chardev.close()


@pytest.fixture
def console(loop):
    it = Console(loop)
    yield it
    it.close()


@pytest.fixture
def poured(monkeypatch):
    """What each native call gave."""
    results = []
    real = fastpath.pour

    def pour(*arguments, **options):
        results.append(real(*arguments, **options))
        return results[-1]

    monkeypatch.setattr(fastpath, "pour", pour)
    return results


def test_console_goes_on_when_its_stream_takes_more(console, poured):
    parts = [bytes([n]) * 3000 for n in range(40)]
    requests = [console.queue.add([part]) for part in parts]
    console.queue.kick()
    assert console.run() == b"".join(parts)
    assert console.queue.reap() == [(request, 0) for request in requests]
    assert any(is_full for _, _, is_full in poured)


def test_nothing_is_lost_or_sent_twice_by_an_update(console, poured):
    parts = [bytes([n]) * 3000 for n in range(40)]
    for part in parts:
        console.queue.add([part])
    console.queue.kick()
    console.driver.run()
    assert console.driver.device.ports[0].sent
    found = arrived(console.chardev.peer)
    console.driver.update(console.device())
    assert found + console.run() == b"".join(parts)
    assert len(console.queue.reap()) == 40


def test_reset_forgets_what_was_sent(console):
    for _ in range(10):
        console.queue.add([b"a" * 3000])
    console.queue.kick()
    console.driver.run()
    assert console.driver.device.ports[0].sent
    console.driver.write(mmio.STATUS, 0)
    console.driver.start()
    assert set(console.run()) <= {ord("a")}
    console.driver.queues[OUT].add([b"new"])
    console.driver.queues[OUT].kick()
    assert console.run() == b"new"


@pytest.mark.parametrize("native", [True, False])
def test_output_in_front_of_a_broken_chain_comes_first(console, native):
    if not native:
        console.chardev._can_pour = lambda: False
    console.queue.add([b"one "])
    console.queue.add([b"two"])
    console.queue.add([(1 << 40, 16)])
    console.queue.kick()
    assert console.run() == b"one two"
    assert len(console.queue.reap()) == 2
    assert console.driver.status == OK | transport.S_NEEDS_RESET
    assert "no memory there" in console.driver.transport.error


def test_output_behind_a_peer_that_went_is_dropped(console):
    for _ in range(10):
        console.queue.add([b"a" * 3000])
    console.queue.kick()
    console.driver.run()
    console.chardev.peer.close()
    for _ in range(3):
        console.driver.run()
        console.loop.run_once(0)
    assert len(console.queue.reap()) == 10
    assert console.driver.status == OK


CHAIN = st.lists(
    st.one_of(
        *[st.tuples(st.integers(0, 0x3000), st.integers(1, 0x1800))] * 6,
        st.tuples(st.integers(0, 0x3000), st.just(0)),
        st.tuples(st.integers(0, 1 << 64), st.integers(0, 0xFFFFFFFF)),
    ),
    min_size=1,
    max_size=4,
)


@given(st.lists(st.tuples(CHAIN, st.booleans(), st.booleans()), max_size=12))
def test_same_as_by_python(chains):
    """Any chains give the same bytes, used elements and verdict on both ways."""
    results = []
    for native in (True, False):
        loop = EventLoop()
        it = Console(loop)
        if not native:
            it.chardev._can_pour = lambda: False
        try:
            base = it.driver.allocate(len(CONTENTS))
            it.driver.memory.write(base, CONTENTS)
            requests = []
            for buffers, indirect, writable in chains:
                readable = [((base + gpa) % (1 << 64), size) for gpa, size in buffers]
                requests.append(it.queue.add(readable, [8] if writable else [], indirect=indirect))
            it.queue.kick()
            found = it.run()
            used = [(requests.index(request), size) for request, size in it.queue.reap()]
            results.append((found, used, it.driver.status, it.driver.transport.error))
        finally:
            it.close()
            loop.close()
    assert results[0] == results[1]
