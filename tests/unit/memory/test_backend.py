import errno
import fcntl
import mmap
import os
import resource
import socket

import pytest
from harness.process import descriptors

from pyvmm.errors import ConfigError, HostError, InternalError
from pyvmm.memory.backend import RamBackend
from pyvmm.memory.config import KINDS, RamConfig

MEMFD, FILE, RAM = KINDS
SIZE = 2 << 20
SEALS = fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL


def open_fds():
    return descriptors("self")


@pytest.fixture(autouse=True)
def _no_fd_left():
    before = open_fds()
    yield
    assert open_fds() == before


def mapping_of(backend):
    """Fields of /proc/self/smaps for the mapping of ``backend``."""
    marker = os.urandom(16)
    backend.view[:16] = marker
    found = None
    with open("/proc/self/smaps") as smaps, open("/proc/self/mem", "rb", 0) as memory:
        for line in smaps:
            head = line.split()
            if "-" in head[0] and not head[0].endswith(":"):
                start, end = (int(part, 16) for part in head[0].split("-"))
                found = None
                if end - start >= backend.size and "w" in head[1]:
                    memory.seek(start)
                    if memory.read(16) == marker:
                        found = {"perms": head[1], "path": " ".join(head[5:])}
            elif found is not None:
                found[head[0].rstrip(":")] = head[1:]
                if head[0] == "VmFlags:":
                    return found
    raise AssertionError("mapping not found")


def test_memfd_is_sealed_named_and_not_inherited():
    backend = RamBackend(RamConfig(MEMFD, "ram0", SIZE))
    assert os.readlink(f"/proc/self/fd/{backend.fd}") == "/memfd:ram0 (deleted)"
    assert fcntl.fcntl(backend.fd, fcntl.F_GET_SEALS) == SEALS
    assert not os.get_inheritable(backend.fd)
    for size in (0, SIZE - 4096, SIZE + 4096):
        with pytest.raises(PermissionError):
            os.ftruncate(backend.fd, size)
    assert backend.is_shared
    mapping = mapping_of(backend)
    assert mapping["perms"] == "rw-s"
    assert {"dc", "hg"} <= set(mapping["VmFlags"])  # not copied on fork, huge pages advised
    assert os.pread(backend.fd, 16, 0) == backend.view[:16]
    backend.close()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("share", [True, False])
def test_huge_pages_find_it_aligned(kind, share):
    """Wherever the kernel has room: of three blocks of odd sizes each."""
    backends = [
        RamBackend(RamConfig(kind, "r", size, share=share, mem_path="/dev/shm"))
        for size in (SIZE, SIZE + 4096, 3 * SIZE - 4096)
    ]
    for backend in backends:
        assert backend.address % SIZE == 0
        backend.view[backend.size - 1] = 1
    for backend in backends:
        backend.close()


def test_a_mapping_has_no_descriptor_of_its_own():
    before = open_fds()
    backend = RamBackend(RamConfig(MEMFD, "ram0", SIZE))
    assert set(open_fds()) - set(before) == {backend.fd}
    backend.close()


def test_private_anonymous_memory_has_no_descriptor():
    backend = RamBackend(RamConfig(RAM, "ram0", SIZE))
    assert backend.fd is None
    assert not backend.is_shared
    assert mapping_of(backend)["perms"] == "rw-p"
    backend.close()


def test_shared_anonymous_memory_is_a_memfd():
    backend = RamBackend(RamConfig(RAM, "ram0", SIZE, share=True))
    assert backend.is_shared
    assert fcntl.fcntl(backend.fd, fcntl.F_GET_SEALS) == SEALS
    backend.close()


def test_private_memfd_is_not_shared():
    backend = RamBackend(RamConfig(MEMFD, "ram0", SIZE, share=False, seal=False))
    backend.view[0] = 1
    assert os.pread(backend.fd, 1, 0) == b"\0"
    assert not backend.is_shared
    assert fcntl.fcntl(backend.fd, fcntl.F_GET_SEALS) == fcntl.F_SEAL_SEAL
    backend.close()


def test_dump_and_merge_reach_the_kernel():
    backend = RamBackend(RamConfig(RAM, "r", SIZE, dump=False, merge=False))
    flags = set(mapping_of(backend)["VmFlags"])
    assert "dd" in flags
    assert "mg" not in flags
    backend.close()


@pytest.mark.parametrize("kind", [MEMFD, RAM, FILE])
@pytest.mark.parametrize("share", [True, False])
def test_prealloc_populates(kind, share, tmp_path):
    config = RamConfig(kind, "r", SIZE, share=share, prealloc=True, mem_path=str(tmp_path / "f"))
    backend = RamBackend(config)
    assert mapping_of(backend)["Rss"] == [str(SIZE // 1024), "kB"]
    backend.close()


def test_file_is_created_with_the_size_and_kept(tmp_path):
    path = tmp_path / "ram"
    backend = RamBackend(RamConfig(FILE, "ram0", SIZE, mem_path=str(path), share=True))
    backend.view[4096:4099] = b"abc"
    assert path.stat().st_size == SIZE
    assert path.stat().st_mode & 0o777 == 0o600
    backend.close()
    assert path.read_bytes()[4096:4099] == b"abc"


@pytest.mark.parametrize("present", [0, SIZE, SIZE + 4096])
def test_existing_file_empty_or_large_enough(tmp_path, present):
    path = tmp_path / "ram"
    path.write_bytes(b"x" * present)
    backend = RamBackend(RamConfig(FILE, "ram0", SIZE, mem_path=str(path), share=True))
    assert path.stat().st_size == max(present, SIZE)
    assert backend.view[:1] == (b"x" if present else b"\0")
    assert len(backend.view) == SIZE
    backend.close()


def test_smaller_file_is_refused_and_untouched(tmp_path):
    path = tmp_path / "precious"
    path.write_bytes(b"x" * 4096)
    with pytest.raises(ConfigError, match="precious' has 4K, less than size=2M; give its size"):
        RamBackend(RamConfig(FILE, "ram0", SIZE, mem_path=str(path)))
    assert path.read_bytes() == b"x" * 4096


def test_file_in_a_directory_has_no_name():
    backend = RamBackend(RamConfig(FILE, "ram0", SIZE, mem_path="/dev/shm", share=True))
    status = os.fstat(backend.fd)
    assert (status.st_nlink, status.st_size) == (0, SIZE)
    backend.close()


def test_private_file_keeps_the_file_as_it_is(tmp_path):
    path = tmp_path / "ram"
    path.write_bytes(b"x" * SIZE)
    backend = RamBackend(RamConfig(FILE, "ram0", SIZE, mem_path=str(path)))
    backend.view[0] = 0
    assert path.read_bytes()[:1] == b"x"
    assert not backend.is_shared
    backend.close()


def test_what_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "loop").symlink_to("loop")
    for path, message in (
        (tmp_path / "fifo", "neither a regular file nor a directory"),
        ("/dev/null", "neither a regular file nor a directory"),
        (tmp_path / "no" / "ram", "No such file or directory; name another mem-path"),
        (tmp_path / "loop", "symbolic links"),
        ("/proc", "; name another mem-path"),
    ):
        with pytest.raises(ConfigError, match=message) as caught:
            RamBackend(RamConfig(FILE, "ram0", SIZE, mem_path=str(path)))
        assert str(caught.value).startswith("-object memory-backend-file,id=ram0")
        assert "\n" not in str(caught.value)


def test_created_file_is_removed_if_it_cannot_be_used(tmp_path):
    path = tmp_path / "ram"
    old = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (8 << 30, old[1]))
    try:
        with pytest.raises(HostError, match="not that much memory; give a smaller size"):
            RamBackend(RamConfig(FILE, "r", 64 << 30, mem_path=str(path), share=True))
        with pytest.raises(HostError, match="id=r,size=64G"):
            RamBackend(RamConfig(MEMFD, "r", 64 << 30))
        with pytest.raises(HostError):
            RamBackend(RamConfig(RAM, "r", 64 << 30))
    finally:
        resource.setrlimit(resource.RLIMIT_AS, old)
    assert not path.exists()


def test_no_descriptors_left():
    old = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = max(map(int, open_fds())) + 1
    holes = [os.open("/dev/null", os.O_RDONLY) for _ in range(used - len(open_fds()) + 1)]
    top = max(map(int, open_fds()))
    resource.setrlimit(resource.RLIMIT_NOFILE, (top, old[1]))
    try:
        with pytest.raises(HostError, match="Too many open files"):
            RamBackend(RamConfig(MEMFD, "r", SIZE))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, old)
        for fd in holes:
            os.close(fd)


def test_full_file_system_at_prealloc_is_an_error_not_a_signal():
    # More than the whole file system: the kernel refuses that before it takes a page.
    shm = os.statvfs("/dev/shm")
    size = (shm.f_blocks * shm.f_frsize + (64 << 20)) & -4096
    with pytest.raises(ConfigError, match="No space left on device; free space there"):
        RamBackend(RamConfig(FILE, "r", size, mem_path="/dev/shm", share=True, prealloc=True))


def huge_pages():
    with open("/proc/sys/vm/nr_hugepages") as pages:
        return int(pages.read())


def test_huge_pages_missing_or_used():
    config = RamConfig(MEMFD, "ram0", SIZE, hugetlb=True, hugetlbsize=SIZE)
    if huge_pages():
        backend = RamBackend(config)
        assert mapping_of(backend)["MMUPageSize"] == ["2048", "kB"]
        backend.close()
        return
    with pytest.raises(ConfigError, match=r"reserve huge pages.* or give hugetlb=off"):
        RamBackend(config)


def test_adopted_memory_is_the_same_pages():
    first = RamBackend(RamConfig(MEMFD, "ram0", SIZE))
    first.view[123] = 45
    inherited = os.dup(first.fd)
    first.close()
    second = RamBackend(RamConfig(MEMFD, "ram0", SIZE, prealloc=True), inherited)
    assert second.fd == inherited
    assert second.view[123] == 45
    assert second.is_shared
    assert {"dc", "hg"} <= set(mapping_of(second)["VmFlags"])
    second.close()


def memfd(size, seals=SEALS, flags=os.MFD_ALLOW_SEALING | os.MFD_CLOEXEC):
    fd = os.memfd_create("x", flags)
    os.ftruncate(fd, size)
    if seals:
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
    return fd


def read_only():
    fd = memfd(SIZE)
    try:
        return os.open(f"/proc/self/fd/{fd}", os.O_RDONLY)
    finally:
        os.close(fd)


def socket_fd():
    one, other = socket.socketpair()
    other.close()
    return one.detach()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: memfd(SIZE - 4096), "has 2044K where size=2M; give the size that the guest"),
        (lambda: memfd(SIZE + 4096), "has 2052K where size=2M"),
        (lambda: memfd(SIZE, 0), "is not sealed against resizing"),
        (lambda: memfd(SIZE, fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL), "is not sealed"),
        (lambda: memfd(SIZE, SEALS | fcntl.F_SEAL_WRITE), "Operation not permitted"),
        (read_only, "is not a writable memory file"),
        (socket_fd, "is not a writable memory file"),
        (lambda: os.open("/dev/null", os.O_RDWR), "is not a writable memory file"),
        (lambda: os.open("/", os.O_RDONLY), "is not a writable memory file"),
    ],
)
def test_descriptors_that_are_not_this_ram(make, message):
    fd = make()
    try:
        with pytest.raises(HostError, match=message) as caught:
            RamBackend(RamConfig(MEMFD, "ram0", SIZE), fd)
        assert "\n" not in str(caught.value)
        os.fstat(fd)  # still open: it may be anything
    finally:
        os.close(fd)


@pytest.mark.parametrize("fd", [-1, 9999, 1 << 31, 1 << 80])
def test_descriptor_numbers_that_are_not_open(fd):
    with pytest.raises(HostError, match=rf"inherited memory ram0 \(descriptor {fd}\) is not open"):
        RamBackend(RamConfig(MEMFD, "ram0", SIZE), fd)


def test_adopted_file_may_be_larger_and_is_not_resized(tmp_path):
    path = tmp_path / "ram"
    path.write_bytes(b"x" * (SIZE + 4096))
    config = RamConfig(FILE, "ram0", SIZE, mem_path="/nonexistent/ram", share=True)
    backend = RamBackend(config, os.open(path, os.O_RDWR))
    assert backend.view[:2] == b"xx"
    assert path.stat().st_size == SIZE + 4096
    backend.close()


def test_close_while_in_use_is_a_bug():
    backend = RamBackend(RamConfig(RAM, "ram0", SIZE))
    view = memoryview(backend.view)
    with pytest.raises(InternalError):
        backend.close()
    view.release()
    backend.close()


def test_kernel_without_populate_or_huge_pages(monkeypatch):
    class Old(mmap.mmap):
        """A mapping on a kernel that knows fork advice only."""

        def madvise(self, advice, *rest):
            if advice != mmap.MADV_DONTFORK:
                raise OSError(errno.EINVAL, "old")
            super().madvise(advice, *rest)

    monkeypatch.setattr(mmap, "mmap", Old)
    backend = RamBackend(RamConfig(RAM, "ram0", SIZE, prealloc=True))
    assert mapping_of(backend)["Rss"] == [str(SIZE // 1024), "kB"]
    backend.close()
