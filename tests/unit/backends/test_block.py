"""Image files: that what is written is read, what the host refuses, and locks and updates."""

import errno
import mmap
import os
import resource
import subprocess
import sys

import pytest
from harness import needs
from harness.loop import loop_device
from harness.process import descriptors

from pyvmm.backends import locking
from pyvmm.backends.block import BlockFile
from pyvmm.backends.block_config import BlockConfig
from pyvmm.cpr.handover import Handover
from pyvmm.errors import ConfigError, HostError, MigrationError

SIZE = 1 << 20


@pytest.fixture
def image(tmp_path):
    """Makes an image and opens it: ``image(name, **attributes of BlockConfig)``."""
    made = []

    def make(name="disk.img", *, contents=None, fds=None, **attributes):
        path = tmp_path / name
        if contents is not None or not path.exists():
            path.write_bytes(bytes(SIZE) if contents is None else contents)
        config = BlockConfig("disk", str(path))
        for key, value in attributes.items():
            setattr(config, key, value)
        store = Handover() if fds is None else fds
        file = BlockFile(config, store)
        made.append(file)
        return file

    yield make
    for file in made:
        if file._parcel.kept() is not None:
            file.close()


@pytest.fixture
def loop(tmp_path):
    """A block device of 1 MiB."""
    path = tmp_path / "loop.img"
    path.write_bytes(bytes(SIZE))
    with loop_device(path) as device:
        yield device


def pages(*sizes, fill=b""):
    """Page-aligned buffers, filled from ``fill``."""
    buffers = []
    for size in sizes:
        buffer = memoryview(mmap.mmap(-1, max(size, 1)))[:size]
        buffer[: len(fill[:size])] = fill[:size]
        fill = fill[size:]
        buffers.append(buffer)
    return buffers


@pytest.mark.parametrize("direct", [False, True])
def test_what_is_written_is_read(image, direct):
    file = image(direct=direct)
    data = os.urandom(12288)
    file.write(pages(4096, 8192, fill=data), 8192)
    into = pages(512, 11776)
    file.read(into, 8192)
    assert b"".join(into) == data
    with open(file.config.filename, "rb") as plain:
        plain.seek(8192)
        assert plain.read(12288) == data


def test_direct_io_with_memory_that_is_not_aligned(image):
    file = image(direct=True)
    data = os.urandom(3 << 10)
    source = memoryview(bytearray(b"?" + data))[1:]
    file.write([source[:700], source[700:]], 4096)
    into = memoryview(bytearray(1 + (3 << 10)))[1:]
    file.read([into[:1], into[1:]], 4096)
    assert bytes(into) == data


def test_many_buffers(image):
    file = image()
    data = os.urandom(2000 * 512 // 512 * 100)
    buffers = [memoryview(data)[at : at + 100] for at in range(0, len(data), 100)]
    file.write(buffers, 512)
    into = memoryview(bytearray(len(data)))
    file.read([into[at : at + 50] for at in range(0, len(data), 50)], 512)
    assert bytes(into) == data


def test_last_sector_beyond_the_end_of_the_file(image):
    file = image(contents=b"x" * 700)
    assert file.size == 1024
    into = memoryview(bytearray(b"?" * 1024))
    file.read([into[:512], into[512:]], 0)
    assert bytes(into) == b"x" * 700 + bytes(324)
    file.write([memoryview(b"y" * 512)], 512)
    assert os.path.getsize(file.config.filename) == 1024


def test_file_that_shrank(image):
    file = image()
    os.truncate(file.config.filename, 4096)
    with pytest.raises(OSError, match="has become shorter") as caught:
        file.read(pages(4096), 65536)
    assert caught.value.errno == errno.EIO


def test_cached_read_gives_the_data_or_says_no(image):
    file = image()
    data = os.urandom(4096)
    file.write([memoryview(data)], 4096)
    into = memoryview(bytearray(4096))
    assert file.read_cached([into], 4096)
    assert bytes(into) == data
    assert not image("other.img", direct=True).read_cached(pages(4096), 0)


def test_disk_full(image):
    file = image()
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (SIZE, old[1]))  # Python ignores SIGXFSZ
    try:
        with pytest.raises(OSError, match="too large"):
            file.write([memoryview(bytes(512))], SIZE)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)


def blocks(file):
    return os.fstat(file.fd).st_blocks


@pytest.mark.parametrize(("unmap", "freed"), [(True, True), (False, False)])
def test_discard(image, unmap, freed):
    file = image(contents=b"x" * SIZE, unmap=unmap)
    file.flush()
    before = blocks(file)
    file.discard(65536, 65536)
    assert (blocks(file) < before) == freed
    assert os.pread(file.fd, 1, 65536) == (b"\0" if freed else b"x")
    assert os.pread(file.fd, 1, 65535) + os.pread(file.fd, 1, 131072) == b"xx"
    assert os.fstat(file.fd).st_size == SIZE


@pytest.mark.parametrize("config_unmap", [False, True])
@pytest.mark.parametrize("unmap", [False, True])
@pytest.mark.parametrize("folder", ["", "/dev/shm"])  # tmpfs has no FALLOC_FL_ZERO_RANGE
def test_write_zeroes(image, tmp_path, folder, unmap, config_unmap):
    name = "z.img"
    if folder:
        name = f"{folder}/pyvmm-{tmp_path.name}.img"
    try:
        file = image(name, contents=b"x" * (3 << 20), unmap=config_unmap)
        file.flush()
        before = blocks(file)
        file.write_zeroes(512, 2 << 20, unmap=unmap)
        data = os.pread(file.fd, 3 << 20, 0)
        assert data == b"x" * 512 + bytes(2 << 20) + b"x" * ((1 << 20) - 512)
        assert (blocks(file) < before) == (unmap and config_unmap)
    finally:
        if folder:
            os.unlink(name)


def test_flush_that_failed_once_fails_for_good(image, monkeypatch):
    file = image()
    broken = [OSError(errno.EIO, "broken")]

    def fdatasync(_fd):
        if broken:
            raise broken.pop()

    monkeypatch.setattr(os, "fdatasync", fdatasync)
    for _ in range(2):  # the kernel tells of lost pages only once
        with pytest.raises(OSError, match=r"broken|Input/output"):
            file.flush()
    ignored = image("other.img", no_flush=True)
    monkeypatch.setattr(os, "fdatasync", None)
    ignored.flush()


# ---- opening --------------------------------------------------------------------------------


def test_missing_file(tmp_path):
    config = BlockConfig("disk", str(tmp_path / "none"))
    with pytest.raises(ConfigError, match=r"-blockdev disk: '.*none': No such file.*; name an"):
        BlockFile(config, Handover())


def test_fifo_and_folder(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    for name, problem in (("fifo", "neither a regular file nor"), ("", "Is a directory")):
        config = BlockConfig("disk", str(tmp_path / name))
        with pytest.raises(ConfigError, match=problem):
            BlockFile(config, Handover())


def test_driver_for_another_kind_of_file(image):
    with pytest.raises(ConfigError, match="give driver=file"):
        image(driver="host_device")


@pytest.mark.parametrize("magic", [b"QFI\xfb", b"vhdxfile", b"KDMV"])
def test_other_formats_are_found_unless_raw_is_stated(image, magic):
    contents = magic.ljust(SIZE, b"\0")
    with pytest.raises(ConfigError, match="only raw images are possible"):
        image(contents=contents, stated=False)
    file = image(contents=contents)
    # A guest may write what it likes on its disk: an update does not look.
    inherited = {(file._parcel.name, 0): os.dup(file.fd)}
    assert image(fds=Handover(inherited), stated=False).size == SIZE


def test_no_file_stays_open_after_a_refusal(image):
    before = descriptors("self")
    for attributes in ({"driver": "host_device"}, {"stated": False}):
        with pytest.raises(ConfigError):
            image(contents=b"QFI\xfb".ljust(512), **attributes)
    assert descriptors("self") == before


def test_block_device(loop):
    config = BlockConfig("disk", loop)
    config.unmap = config.direct = True
    config.driver = "host_device"
    file = BlockFile(config, Handover())
    try:
        assert file.is_device
        assert (file.size, file.alignment) == (SIZE, 512)
        data = os.urandom(SIZE)
        file.write(pages(SIZE, fill=data), 0)
        file.flush()
        file.discard(0, 65536)
        file.write_zeroes(65536, 65536, unmap=False)
        file.write_zeroes(131072, 65536, unmap=True)
        (into,) = pages(SIZE)
        file.read([into], 0)
        assert bytes(into) == bytes(3 * 65536) + data[3 * 65536 :]
    finally:
        file.close()


# ---- locks ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("first", "second", "problem"),
    [
        ({}, {}, "in use by another process; end what writes it"),
        ({}, {"read_only": True}, "in use by another process; end what writes it, or give share"),
        ({"read_only": True}, {}, "in use by another process; end what reads it, or give readonly"),
        ({"read_only": True}, {"read_only": True}, None),
        ({"share_rw": True}, {"share_rw": True}, None),
        ({"share_rw": True}, {}, "in use"),
        ({}, {"locking": "off"}, None),
    ],
)
def test_who_may_share_an_image(image, first, second, problem):
    image(**first)
    if problem is None:
        image(**second)
        return
    with pytest.raises(ConfigError, match=problem):
        image(**second)


def test_the_lock_ends_with_the_file(image):
    image().close()
    image()


def test_the_loser_leaves_no_lock(image):
    reader = image(read_only=True)
    with pytest.raises(ConfigError):
        image()
    reader.close()
    image()


OTHER = """
import fcntl, os, struct, sys
fd = os.open(sys.argv[1], os.O_RDWR)
held = []
for byte in (100, 101, 103, 200, 201, 203):
    flock = struct.pack("hhqqi4x", fcntl.F_WRLCK, 0, byte, 1, 0)
    kind = struct.unpack("hhqqi4x", fcntl.fcntl(fd, fcntl.F_OFD_GETLK, flock))[0]
    if kind != fcntl.F_UNLCK:
        held.append(byte)
print(*held)
"""


@pytest.mark.parametrize(
    ("attributes", "held"),
    [({}, "100 101 201"), ({"read_only": True}, "100 201"), ({"share_rw": True}, "100 101")],
)
def test_the_bytes_that_another_process_sees(image, attributes, held):
    file = image(**attributes)
    seen = subprocess.run(
        [sys.executable, "-c", OTHER, file.config.filename],
        capture_output=True,
        text=True,
        check=True,
    )
    assert seen.stdout.split() == held.split()


# ---- live update ----------------------------------------------------------------------------


def hand_over(file):
    """What an exec leaves: the store's descriptors, and nothing else of the old image."""
    return Handover({(file._parcel.name, 0): os.dup(file.fd)})


def test_an_update_keeps_the_file_and_its_lock(image, tmp_path):
    old = image()
    fds = hand_over(old)
    old.close()
    # Another file by that name is not the guest's disk.
    os.rename(tmp_path / "disk.img", tmp_path / "moved")
    new = image(contents=bytes(512), fds=fds)
    assert new.size == SIZE
    with pytest.raises(ConfigError, match="in use"):
        image("moved")


def test_an_update_may_change_the_cache_mode(image, tmp_path):
    needs.disk(tmp_path)
    old = image()
    new = image(fds=hand_over(old), direct=True)
    assert new.alignment >= 512
    with pytest.raises(OSError, match="Invalid"):
        os.pread(new.fd, 100, 1)
    again = image(fds=hand_over(new))
    assert os.pread(again.fd, 100, 1) == bytes(100)


def test_an_update_that_fails_leaves_the_lock(image):
    """The image before comes back, and nobody may have got in between."""
    old = image(share_rw=True)
    fds = hand_over(old)
    old.close()
    other = image(share_rw=True)
    with pytest.raises(ConfigError, match="in use"):
        image(fds=fds)
    image(share_rw=True).close()
    other.close()
    with pytest.raises(ConfigError, match="in use"):
        image()
    fds.settle()


def test_an_update_does_not_read_from_the_disk_in_the_pause(image, monkeypatch):
    """What O_DIRECT demands was found out when the guest was not there yet. Only an image that
    begins with it has to look."""
    files = [image("direct.img", direct=True), image("cached.img")]
    reads = []

    def preadv(fd, buffers, offset, flags=0):
        if not flags & os.RWF_NOWAIT:
            reads.append(fd)
        return real(fd, buffers, offset, flags)

    real = os.preadv
    monkeypatch.setattr(os, "preadv", preadv)
    for file in files:
        inherited = {(file._parcel.name, 0): os.dup(file.fd)}
        name = os.path.basename(file.config.filename)
        new = image(name, fds=Handover(inherited), direct=True)
        assert bool(reads) == (name == "cached.img")
        assert new.alignment >= 512


def test_an_update_without_the_file_opens_no_other(image):
    with pytest.raises(MigrationError, match="was not handed over"):
        image(fds=Handover({}))


def test_inherited_descriptor_of_another_kind(image):
    reader, writer = os.pipe()
    with pytest.raises(HostError, match="another access mode"):
        image(fds=Handover({("block/disk", 0): reader}))
    os.close(reader)
    os.close(writer)
    fd = os.eventfd(0)
    with pytest.raises(ConfigError, match="neither a regular file"):
        image(fds=Handover({("block/disk", 0): fd}))
    os.close(fd)


def test_locks_that_the_file_system_does_not_know(image, monkeypatch):
    def lock(*_arguments, **_named):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(locking, "lock", lock)
    image(locking="auto")
    with pytest.raises(ConfigError, match="knows no such locks; give locking=auto or off"):
        image(locking="on")
