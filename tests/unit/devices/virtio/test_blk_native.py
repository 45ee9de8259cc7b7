"""Disk requests that native code serves, beside the same by Python alone."""

import errno
import os
import resource
import struct

import pytest
from harness.virtio_disk import SECTORS, SIZE, Disk, pattern
from harness.virtio_ring import BUFFER, RAM, ROM, Ring
from hypothesis import given
from hypothesis import strategies as st

from pyvmm.devices.virtio import blk, fastpath, mmio
from pyvmm.devices.virtio.blk import VirtioBlk
from pyvmm.devices.virtio.device import F_INDIRECT_DESC
from pyvmm.devices.virtio.queue import DESC_F_INDIRECT, DESC_F_NEXT, DESC_F_WRITE
from pyvmm.memory.backend import RamBackend
from pyvmm.memory.config import RamConfig
from pyvmm.memory.guest import MemoryRegion
from pyvmm.testing.virtio_driver import RAM_SIZE

TABLE = 0x8000  # an indirect one
CONTENTS = pattern(SIZE)


def header(kind, sector=0):
    return struct.pack("<IIQ", kind, 0, sector)


@pytest.fixture
def served(monkeypatch):
    """How many requests each native call has done, but for those without."""
    counts = []
    real = fastpath.serve

    def serve(*arguments, **options):
        count = real(*arguments, **options)
        counts.extend([count] if count else [])
        return count

    monkeypatch.setattr(fastpath, "serve", serve)
    return counts


# ---- which requests ------------------------------------------------------------------------


@pytest.mark.parametrize("indirect", [False, True])
def test_reads_and_writes_in_any_framing(disk, kind, served, indirect):
    one = disk()
    data = pattern(1024)
    out, into = header(blk.T_OUT, 5), header(blk.T_IN, 5)
    for readable in ([out, data], [out + data], [out + data[:7], data[7:1000], data[1000:]]):
        assert one.raw(readable, [1], indirect) == (0, b"")
        assert one.contents() == bytes(2560) + data + bytes(SIZE - 3584)
        assert one.raw([header(blk.T_OUT, 5), bytes(1024)], [5], indirect) == (0, bytes(4))
    one.raw([out, data], [1], indirect)
    for writable in ([1024, 1], [1025], [1, 1000, 24]):
        assert one.raw([into], writable, indirect) == (0, data)
    # What a request does not need: the reserved word, buffers beyond those for its data.
    assert one.raw([into[:4] + b"\xff" * 4 + into[8:], b"more"], [1025], indirect) == (0, data)
    assert served == ([] if kind == "direct" else [1] * 11)


@pytest.mark.parametrize("write", [False, True])
def test_many_at_once_without_python(disk, served, monkeypatch, write):
    one = disk(CONTENTS)
    monkeypatch.setattr(VirtioBlk, "handle_chain", None)
    queue = one.driver.queues[0]
    for sector in range(0, 160, 8):
        if write:
            queue.add([header(blk.T_OUT, sector), pattern(4096, sector)], [1], indirect=True)
        else:
            queue.add([header(blk.T_IN, sector)], [4096, 1], indirect=True)
    queue.kick()
    done = one.wait(20)
    assert served == [20]
    assert one.driver.interrupts() == 1
    for at, (request, written) in enumerate(done):
        assert request.data()[-1] == blk.S_OK
        assert written == (1 if write else 4097)
        own = slice(4096 * at, 4096 * (at + 1))
        found, want = request.data()[:-1], CONTENTS[own]
        if write:
            found, want = one.contents()[own], pattern(4096, 8 * at)
        assert found == want


@pytest.mark.parametrize(
    ("readable", "writable", "status"),
    [
        ([header(blk.T_FLUSH)], [1], blk.S_OK),
        ([header(blk.T_GET_ID)], [20, 1], blk.S_OK),
        ([header(2)], [512, 1], blk.S_UNSUPP),
        ([header(blk.T_IN, SECTORS)], [512, 1], blk.S_IOERR),
        ([header(blk.T_IN, SECTORS - 1)], [1024, 1], blk.S_IOERR),
        ([header(blk.T_IN, 1 << 55)], [512, 1], blk.S_IOERR),
        ([header(blk.T_IN, (1 << 64) - 1)], [512, 1], blk.S_IOERR),
        ([header(blk.T_OUT, SECTORS), bytes(512)], [1], blk.S_IOERR),
        ([header(blk.T_IN)], [511, 1], blk.S_IOERR),
        ([header(blk.T_OUT), bytes(513)], [1], blk.S_IOERR),
        ([header(blk.T_IN)], [blk.INLINE_MAX, 512, 1], blk.S_OK),
        ([header(blk.T_OUT), bytes(blk.INLINE_MAX + 512)], [1], blk.S_OK),
        ([header(blk.T_OUT)[:15], header(blk.T_OUT)[15:] + bytes(512)], [1], blk.S_OK),
        ([header(blk.T_IN)], [32] * 64 + [1], blk.S_OK),  # too many buffers
    ],
)
def test_others_are_for_python(disk, served, readable, writable, status):
    one = disk()
    assert one.raw(readable, writable)[0] == status
    assert served == []


@pytest.mark.parametrize("sector", [0, SECTORS - 8])
def test_up_to_the_border(disk, served, sector):
    one = disk()
    assert one.ask(blk.T_OUT, sector, pattern(4096))[0] == blk.S_OK
    assert one.ask(blk.T_IN, sector, room=4096) == (0, pattern(4096))
    assert one.ask(blk.T_IN, SECTORS - 1, room=512)[0] == blk.S_OK
    assert one.ask(blk.T_OUT, 0, bytes(blk.INLINE_MAX))[0] == blk.S_OK
    assert served == [1] * 4


def test_whole_blocks(disk, served):
    one = disk(logical_block_size="4096")
    assert one.ask(blk.T_IN, 8, room=4096)[0] == blk.S_OK
    assert served == [1]
    assert one.ask(blk.T_IN, 9, room=4096)[0] == blk.S_IOERR
    assert one.ask(blk.T_IN, 8, room=512)[0] == blk.S_IOERR
    assert served == [1]


@pytest.mark.parametrize(
    ("image", "without", "status"),
    [
        ({"read_only": True}, 0, blk.S_IOERR),
        ({"writeback": False}, 0, blk.S_OK),
        ({}, blk.F_FLUSH, blk.S_OK),
    ],
)
def test_writes_that_are_for_python(disk, served, image, without, status):
    one = disk(image=image)
    one.driver.start(one.driver.offered() & ~without)
    assert one.ask(blk.T_OUT, 0, bytes(512))[0] == status
    assert served == []
    assert one.ask(blk.T_IN, 0, room=512)[0] == blk.S_OK
    assert served == [1]


def test_write_through_once_the_driver_asks_for_it(disk, served):
    one = disk()
    for writeback, expected in ((0, []), (1, [1])):
        one.driver.write(mmio.CONFIG + 32, writeback, 1)
        assert one.ask(blk.T_OUT, 0, bytes(512))[0] == blk.S_OK
        assert served == expected


# ---- how they are returned -----------------------------------------------------------------


def test_one_for_python_keeps_its_place(disk, served):
    one = disk(serial="abc")
    queue = one.driver.queues[0]
    kinds = (blk.T_IN, blk.T_IN, blk.T_GET_ID, blk.T_IN, 99, blk.T_IN)
    given = [queue.add([header(kind)], [512, 1]) for kind in kinds]
    queue.kick()
    assert [request for request, _ in one.wait(6)] == given
    assert served == [2, 1, 1]
    assert one.driver.interrupts() == 1


def test_others_have_their_turn(disk, served):
    one = disk()
    queue = one.driver.queues[0]
    for _ in range(2 * blk.BATCH + 10):
        queue.add([header(blk.T_IN)], [512, 1], indirect=True)
    queue.kick()
    for batch in (blk.BATCH, blk.BATCH, 10):
        one.loop.run_once(0)
        assert len(queue.reap()) == batch
        assert one.driver.interrupts() == 1
    assert served == [blk.BATCH, blk.BATCH, 10]


def test_interrupt_as_asked_for(disk, served):
    one = disk()
    queue = one.driver.queues[0]
    queue.ask_interrupt(after=2)
    for expected in (0, 0, 1, 0):
        queue.add([header(blk.T_IN)], [512, 1])
        queue.kick()
        one.driver.run()
        assert one.driver.interrupts() == expected
    assert served == [1] * 4


def test_requests_with_workers_do_not_count_twice(disk, served, monkeypatch):
    """Native code serves on while others are under way, but no more than fit in the used ring."""
    one = disk()
    one.driver.start(size=4)
    queue, theirs = one.driver.queues[0], one.driver.device.queues[0]
    monkeypatch.setattr(one.driver.device, "_flush", lambda _chain: None)
    request = queue.add([header(blk.T_FLUSH)], [1], indirect=True)
    queue.kick()
    one.driver.run()
    assert theirs.in_flight == 1
    assert one.ask(blk.T_IN, room=512) == (0, bytes(512))
    assert (theirs.in_flight, served) == (1, [1])
    theirs.push(request.head, 1)
    assert one.wait(1) == [(request, 1)]


# ---- what the host cannot do ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("mode", "asked", "operation"),
    [
        (os.O_WRONLY, {"kind": blk.T_IN, "room": 512}, "read"),
        (os.O_RDONLY, {"kind": blk.T_OUT, "data": bytes(512)}, "write"),
    ],
)
def test_error_is_told_by_python(disk, served, mode, asked, operation):
    one = disk()
    other = os.open(one.config.filename, mode)
    os.dup2(other, one.file.fd)
    os.close(other)
    assert one.ask(**asked)[0] == blk.S_IOERR
    assert one.errors == [(operation, errno.EBADF, "report")]
    assert served == []


def test_image_that_became_shorter(disk, kind, served):
    one = disk()
    os.truncate(one.config.filename, 6144)
    assert one.ask(blk.T_IN, 0, room=4096) == (blk.S_OK, bytes(4096))
    assert served == ([] if kind == "direct" else [1])
    assert one.ask(blk.T_IN, 8, room=4096)[0] == blk.S_IOERR
    assert len(served) < 2


def test_write_that_is_cut_short(disk, served):
    one = disk()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (6144, limits[1]))
    try:
        assert one.ask(blk.T_OUT, 8, b"x" * 4096)[0] == blk.S_IOERR
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert one.errors == [("write", errno.EFBIG, "report")]
    assert served == []


def test_last_sector_that_the_image_has_in_part(disk, served):
    one = disk(pattern(SIZE - 100))
    assert one.ask(blk.T_IN, SECTORS - 1, room=512) == (0, pattern(SIZE - 100)[-412:] + bytes(100))
    assert served == []


# ---- hostile rings -------------------------------------------------------------------------


@pytest.fixture
def it():
    it = Ring()
    it.memory.write(BUFFER, header(blk.T_IN))
    yield it
    it.close()


@pytest.fixture
def image():
    fd = os.memfd_create("image")
    os.write(fd, b"d" * 4096)
    yield fd
    os.close(fd)


def serve(it, fd, most=8, read_flags=0):
    return fastpath.serve(
        it.queue, fd, read_flags, writable=True, block=512, longest=4096, capacity=4096, most=most
    )


def offer(it, data=BUFFER + 0x1000, status=BUFFER + 0x2000, start=BUFFER):
    it.desc(0, start, 16, DESC_F_NEXT, 1)
    it.desc(1, data, 512, DESC_F_NEXT | DESC_F_WRITE, 2)
    it.desc(2, status, 1, DESC_F_WRITE)
    it.offer(0)


def test_ring_by_hand(it, image):
    offer(it)
    offer(it)
    assert serve(it, image, most=1) == 1
    assert it.used() == (1, 0, 513)
    assert serve(it, image) == 1
    assert it.memory.read(BUFFER + 0x1000, 513) == b"d" * 512 + b"\0"
    assert (it.queue.last_avail_idx, it.queue.in_flight) == (2, 0)


@pytest.mark.parametrize("flags", [-1, 1 << 30])
def test_reads_with_the_flags_that_are_given(it, image, flags):
    """Those that the kernel does not know show that it sees them."""
    offer(it)
    assert serve(it, image, read_flags=flags) == 0
    assert serve(it, image) == 1


def test_nothing_is_written_without_a_status(it, image):
    it.memory.write(BUFFER, header(blk.T_OUT) + bytes(512))
    it.desc(0, BUFFER, 528)
    it.offer(0)
    assert serve(it, image) == 0
    assert os.pread(image, 4096, 0) == b"d" * 4096


def test_readable_buffer_behind_one_to_be_written(it, image):
    offer(it)
    it.desc(1, BUFFER + 0x1000, 513, DESC_F_NEXT | DESC_F_WRITE, 2)
    it.desc(2, BUFFER + 0x2000, 513)
    before = it.memory.read(0, RAM)
    assert serve(it, image) == 0
    assert it.memory.read(0, RAM) == before


@pytest.mark.parametrize("where", [ROM, RAM, RAM - 8, (1 << 64) - 8])
@pytest.mark.parametrize("part", ["data", "start"])
def test_where_there_is_no_ram(it, image, part, where):
    offer(it, **{part: where})
    before = it.memory.read(0, RAM)
    assert serve(it, image) == 0
    assert it.memory.read(ROM, 0x1000) == bytes(0x1000)
    assert it.memory.read(0, RAM) == before


@pytest.mark.parametrize("where", [ROM, RAM])
def test_status_where_there_is_no_ram(it, image, where):
    offer(it, status=where)
    assert serve(it, image) == 0
    assert it.memory.read(ROM, 0x1000) == bytes(0x1000)


@pytest.mark.parametrize(
    ("slot", "values"),
    [
        (0, (BUFFER, 16, DESC_F_NEXT, 8)),
        (0, (BUFFER, 16, DESC_F_NEXT, 0)),  # a loop
        (0, (BUFFER, 16)),
        (0, (BUFFER, 15, DESC_F_NEXT, 1)),
        (0, (BUFFER, 0, DESC_F_NEXT, 1)),
        (0, (BUFFER, 512, DESC_F_NEXT | DESC_F_WRITE, 1)),  # no header
        (0, (BUFFER, 16, DESC_F_NEXT | 8, 1)),
        (1, (BUFFER, 0xFFFFFFFF, DESC_F_NEXT | DESC_F_WRITE, 2)),
        (2, (BUFFER, 1, 0)),  # a readable one behind one to be written
        (2, (BUFFER, 1, DESC_F_NEXT | DESC_F_WRITE, 1)),
        (0, (TABLE, 0, DESC_F_INDIRECT)),
        (0, (TABLE, 47, DESC_F_INDIRECT)),
        (0, (TABLE, 48, DESC_F_INDIRECT | DESC_F_NEXT, 1)),
        (0, (TABLE, 48, DESC_F_INDIRECT | DESC_F_WRITE)),
        (0, (TABLE, 32, DESC_F_INDIRECT)),
        (0, (ROM, 48, DESC_F_INDIRECT)),
        (0, (TABLE + 48, 16, DESC_F_INDIRECT)),  # a table in a table
    ],
)
def test_chains_that_are_left(it, image, slot, values):
    offer(it)
    for at, length, flags in ((0, 16, 1), (1, 512, 3), (2, 1, 2)):
        it.desc(at, BUFFER + 0x1000 * at, length, flags, at + 1, table=TABLE)
    it.desc(3, TABLE, 48, DESC_F_INDIRECT, table=TABLE)
    it.desc(slot, *values)
    before = it.memory.read(0, RAM)
    assert serve(it, image) == 0
    assert it.memory.read(0, RAM) == before
    assert it.queue.last_avail_idx == 0
    # What is beside it would do.
    offer(it)
    it.desc(0, TABLE, 48, DESC_F_INDIRECT)
    assert serve(it, image) == 2


def test_indirect_table_needs_negotiation(image):
    it = Ring(indirect=False)
    try:
        for at, length, flags in ((0, 16, 1), (1, 512, 3), (2, 1, 2)):
            it.desc(at, BUFFER + 0x1000 * at, length, flags, at + 1, table=TABLE)
        it.desc(0, TABLE, 48, DESC_F_INDIRECT)
        it.offer(0)
        assert serve(it, image) == 0
    finally:
        it.close()


def test_no_more_under_way_than_fit(it, image):
    for _ in range(it.size):
        offer(it)
        assert it.queue.pop() is not None
    offer(it)
    assert serve(it, image) == 0
    it.queue.push(0, 0)
    assert serve(it, image) == 1
    assert it.used()[0] == 2


def test_index_too_far_and_index_that_wraps(it, image):
    it.idx = it.queue.last_avail_idx = it.queue.used_idx = 0xFFFF
    offer(it)
    offer(it)
    assert serve(it, image) == 2
    assert (it.used()[0], it.queue.last_avail_idx) == (1, 1)
    it.offer(*[0] * (it.size + 1))
    assert serve(it, image) == 0
    it.queue.disable()
    assert serve(it, image) == 0


# ---- the same as by Python -----------------------------------------------------------------

cuts = st.lists(st.integers(0, 1100), max_size=3)
sectors = st.one_of(
    *[st.integers(0, 4)] * 4,
    st.integers(SECTORS - 4, SECTORS + 2),
    st.integers(0, (1 << 64) - 1),
)
requests = st.tuples(
    st.sampled_from([blk.T_IN] * 4 + [blk.T_OUT] * 4 + [blk.T_FLUSH, blk.T_GET_ID, 99]),
    sectors,
    st.sampled_from([512] * 4 + [1024, 2048, 4096, 0, 511, 513]),
    cuts,
    cuts,
    st.booleans(),
)
lengths = st.integers(0, 1100) | st.integers(0, 0xFFFFFFFF)
places = st.sampled_from([ROM, ROM + 0xE00, RAM_SIZE, RAM_SIZE - 600]) | st.integers(
    0, (1 << 64) - 1
)
# (near) gpa, length, flags and next of a descriptor, or None: it stays as it is
changes = st.tuples(
    st.integers(0, 15),
    st.none() | places | st.integers(0x1000, 0x3000),
    st.none() | lengths,
    st.none() | st.sampled_from([*range(8)]) | st.integers(0, 0xFFFF),
    st.none() | st.integers(0, 8),
)


class Run:
    """A disk, requests to it with some descriptors changed, and what becomes of them."""

    def __init__(self, name, features):
        self.path = f"/dev/shm/pyvmm-{os.getpid()}-{name}.img"
        with open(self.path, "wb") as file:
            file.write(CONTENTS)
        # What workers do they would do at any time.
        self.disk = Disk(self.path, **{"discard": "off", "write-zeroes": "off"})
        self.rom = RamBackend(RamConfig("memory-backend-memfd", "rom0", 0x1000))
        driver, device = self.disk.driver, self.disk.driver.device
        driver.memory.add(MemoryRegion("rom", ROM, 0x1000, self.rom, readonly=True))
        driver.start(driver.offered() & features, size=16)
        device._submit = self.submit
        self.device = device
        self.driver = driver

    def submit(self, call, kind, chain):
        try:
            call()
        except OSError as error:
            return self.device._fail(kind, error, chain)
        return blk.S_OK

    def add(self, kind, sector, size, readable_cuts, writable_cuts, indirect):
        queue = self.driver.queues[0]
        out = header(kind, sector) + (pattern(size, sector) if kind == blk.T_OUT else b"")
        readable = list(parts(out, [16, *readable_cuts]))
        writable = [len(part) for part in parts(bytes(size + 1), writable_cuts)]
        writable = [1] if kind == blk.T_OUT else writable
        if len(queue.free) >= len(readable) + len(writable):
            queue.add(readable, writable, indirect=indirect and self.driver.indirect)

    def change(self, slot, gpa, length, flags, following):
        at = self.driver.queues[0].desc + 16 * slot
        values = struct.unpack("<QIHH", self.driver.memory.read(at, 16))
        new = (gpa, length, flags, following)
        values = [old if other is None else other for old, other in zip(values, new, strict=True)]
        self.driver.memory.write(at, struct.pack("<QIHH", *values))

    def outcome(self):
        self.driver.queues[0].kick()
        self.driver.run()
        queue = self.device.queues[0]
        return (
            self.driver.status,
            self.driver.transport.error,
            self.disk.errors,
            (queue.last_avail_idx, queue.used_idx),
            self.driver.interrupts(),
            self.disk.contents(),
            self.rom.view[:],
            self.driver.memory.read(0, RAM_SIZE),
        )

    def close(self):
        self.disk.close()
        self.rom.close()
        os.unlink(self.path)


def parts(data, sizes):
    for size in sizes:
        if size and len(data) > size:
            yield data[:size]
            data = data[size:]
    yield data


@given(st.lists(requests, min_size=1, max_size=5), st.lists(changes, max_size=2), st.booleans())
def test_same_as_by_python(asked, changed, indirect):
    features = ~0 if indirect else ~F_INDIRECT_DESC
    native, python = Run("native", features), Run("python", features)
    python.device.serve_natively = lambda _queue, _most: 0
    try:
        for run in (native, python):
            for one in asked:
                run.add(*one)
            for one in changed:
                run.change(*one)
        for found, want in zip(native.outcome(), python.outcome(), strict=True):
            assert found == want
    finally:
        native.close()
        python.close()


@given(st.binary(max_size=256), st.binary(max_size=32))
def test_any_ring_is_survived(descriptors, available):
    """Buffers may lie over each other and over the rings."""
    it, fd = Ring(), os.memfd_create("image")
    os.truncate(fd, 4096)
    try:
        it.memory.write(it.queue.desc, descriptors)
        it.memory.write(it.queue.avail, available)
        assert 0 <= serve(it, fd, 20) <= 20
        assert it.memory.read(ROM, 0x1000) == bytes(0x1000)
        assert os.fstat(fd).st_size == 4096
    finally:
        os.close(fd)
        it.close()
