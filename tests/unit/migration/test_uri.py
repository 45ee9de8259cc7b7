import errno
import os
import resource
import shutil
import stat
import tempfile
from pathlib import Path

import pytest
from harness import needs
from harness.process import descriptors

from pyvmm.errors import MigrationError
from pyvmm.migration.uri import FileUri

DATA = bytes(range(256)) * 20


@pytest.fixture
def as_root():
    needs.root("only root changes owners")


@pytest.fixture(autouse=True)
def nothing_stays_open():
    before = descriptors("self")
    yield
    assert descriptors("self") == before


def write(uri, data=DATA):
    fd = uri.open_write()
    try:
        uri.write(fd, data)
    finally:
        os.close(fd)


def uri(path, options=""):
    return FileUri(f"file:{path}{options}")


def test_file_is_written_aside_and_readable_by_its_owner_only(tmp_path):
    target = tmp_path / "vm.state"
    old = os.umask(0)
    try:
        write(uri(target))
    finally:
        os.umask(old)
    assert target.read_bytes() == DATA == uri(target).read()
    assert stat.S_IMODE(target.stat().st_mode) == 0o600
    assert os.listdir(tmp_path) == ["vm.state"]


def test_old_state_is_there_until_the_new_one_is_whole(tmp_path):
    target = tmp_path / "vm.state"
    target.write_bytes(b"old")
    with target.open("rb") as reader:
        fd = uri(target).open_write()
        os.close(fd)
        assert target.read_bytes() == b"old"
        write(uri(target))
        assert reader.read() == b"old"  # another file by now
    assert target.read_bytes() == DATA


def test_opening_leaves_nothing_behind(tmp_path):
    os.close(uri(tmp_path / "vm.state").open_write())
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("old", [b"", b"x" * 100_000])
def test_offset_is_written_in_place_and_ends_the_file(tmp_path, old):
    target = tmp_path / "vm.state"
    target.write_bytes(old)
    inode = target.stat().st_ino
    write(uri(target, ",offset=1000"))
    assert target.read_bytes() == old[:1000].ljust(1000, b"\0") + DATA
    assert target.stat().st_ino == inode
    assert uri(target, ",offset=1000").read() == DATA


def test_offset_in_a_new_file(tmp_path):
    target = tmp_path / "vm.state"
    write(uri(target, ",offset=1k"))
    assert target.read_bytes() == bytes(1024) + DATA


@pytest.mark.parametrize("exists", [True, False])
def test_symbolic_link_stays(tmp_path, exists):
    target, link = tmp_path / "vm.state", tmp_path / "link"
    if exists:
        target.touch()
    link.symlink_to(target)
    write(uri(link))
    assert link.is_symlink()
    assert target.read_bytes() == DATA


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o664, 0o400])
@pytest.mark.parametrize("linked", [False, True])
def test_file_keeps_its_mode(tmp_path, mode, linked):
    if mode == 0o400 and os.geteuid():
        needs.root("only root writes to it")
    target, link = tmp_path / "vm.state", tmp_path / "link"
    target.touch()
    target.chmod(mode)
    link.symlink_to("vm.state")
    write(uri(link if linked else target))
    assert link.is_symlink()
    assert stat.S_IMODE(target.stat().st_mode) == mode
    assert target.read_bytes() == DATA


@pytest.mark.usefixtures("as_root")
def test_file_keeps_its_owner(tmp_path):
    target = tmp_path / "vm.state"
    target.write_bytes(b"old")
    target.chmod(0o640)
    os.chown(target, 12345, 54321)
    with target.open("rb") as reader:
        write(uri(target))
        assert reader.read() == b"old"  # written aside all the same
    status = target.stat()
    assert (status.st_uid, status.st_gid, status.st_mode & 0o777) == (12345, 54321, 0o640)
    assert os.listdir(tmp_path) == ["vm.state"]


def test_all_names_of_a_file_stay_one(tmp_path):
    target, other = tmp_path / "vm.state", tmp_path / "other"
    target.write_bytes(b"old" * 10_000)
    other.hardlink_to(target)
    write(uri(target))
    assert other.read_bytes() == DATA == target.read_bytes()
    assert target.samefile(other)


def test_file_that_is_a_mount_is_written_in_place(tmp_path, monkeypatch):
    target = tmp_path / "vm.state"
    target.write_bytes(b"old" * 10_000)

    def rename(*_, **__):
        raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))

    monkeypatch.setattr(os, "rename", rename)
    write(uri(target))
    assert target.read_bytes() == DATA
    assert os.listdir(tmp_path) == ["vm.state"]


@pytest.fixture
def nobody():
    """A folder of root's that anybody may look into, and we are nobody."""
    folder = Path(tempfile.mkdtemp(prefix="pyvmm-test-"))
    folder.chmod(0o755)
    (folder / "vm.state").write_bytes(b"old" * 10_000)
    groups = os.getgroups()
    yield folder
    os.seteuid(0)
    os.setegid(0)
    os.setgroups(groups)
    shutil.rmtree(folder)


def become_nobody():
    os.setgroups([])
    os.setegid(65534)
    os.seteuid(65534)


@pytest.mark.usefixtures("as_root")
def test_file_that_is_not_ours_to_write(nobody):
    nobody.chmod(0o777)
    become_nobody()
    # Replacing it would be allowed to us.
    with pytest.raises(MigrationError, match=r"Could not create .*: Permission denied"):
        uri(nobody / "vm.state").open_write()


@pytest.mark.usefixtures("as_root")
@pytest.mark.parametrize("mode", [0o755, 0o777, 0o1777])
def test_file_of_another_that_we_may_write(nobody, mode):
    target = nobody / "vm.state"
    target.chmod(0o666)
    nobody.chmod(mode)
    become_nobody()
    write(uri(target))
    status = target.stat()
    assert (status.st_uid, status.st_gid, status.st_mode & 0o777) == (0, 0, 0o666)
    assert target.read_bytes() == DATA
    assert os.listdir(nobody) == ["vm.state"]


@pytest.mark.usefixtures("as_root")
def test_folder_in_which_we_may_only_write_the_file(nobody):
    target = nobody / "vm.state"
    os.chown(target, 65534, 65534)
    become_nobody()
    write(uri(target))
    assert target.read_bytes() == DATA
    with pytest.raises(MigrationError, match=r"Could not create .*: Permission denied"):
        uri(nobody / "another").open_write()


def test_file_without_a_name_is_written_in_place():
    fd = os.memfd_create("state")
    try:
        os.write(fd, b"x" * 2 * len(DATA))
        write(uri(f"/proc/self/fd/{fd}"))
        assert os.pread(fd, 1 << 20, 0) == DATA
    finally:
        os.close(fd)


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("nowhere/vm.state", "No such file or directory"),
        ("file/vm.state", "Not a directory"),
        ("folder", "Is a directory"),
        ("fifo", "No such device or address"),
    ],
)
def test_impossible_target_is_refused_before_anything_is_written(tmp_path, path, reason):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(MigrationError) as error:
        uri(tmp_path / path).open_write()
    assert str(error.value) == f"Could not create '{tmp_path / path}': {reason}"


def test_fifo_with_a_reader_is_refused_too(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    reader = os.open(tmp_path / "fifo", os.O_RDONLY | os.O_NONBLOCK)
    try:
        with pytest.raises(MigrationError, match="Illegal seek"):
            uri(tmp_path / "fifo").open_write()
    finally:
        os.close(reader)


def test_file_that_nobody_writes_to():
    with pytest.raises(MigrationError, match="Could not create '/proc/self/status': "):
        uri("/proc/self/status").open_write()


def test_folder_that_cannot_be_written_to():
    # Nobody can create files in /proc, root included.
    with pytest.raises(MigrationError, match=r"^Could not (create|write) '/proc/vm.state': "):
        write(uri("/proc/vm.state"))


def test_full_device():
    with pytest.raises(MigrationError) as error:
        write(uri("/dev/full"))
    assert str(error.value) == "Could not write '/dev/full': No space left on device"


def test_input_output_error():
    # Nothing is mapped at the first page.
    with pytest.raises(MigrationError, match="'/proc/self/mem': Input/output error"):
        write(uri("/proc/self/mem", ",offset=1"))


@pytest.mark.parametrize("limit", [0, 100])
def test_file_size_limit_leaves_the_old_state_and_no_other_file(tmp_path, limit):
    target = tmp_path / "vm.state"
    target.write_bytes(b"old")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        with pytest.raises(MigrationError) as error:
            write(uri(target))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert str(error.value) == f"Could not write '{target}': {os.strerror(errno.EFBIG)}"
    assert os.listdir(tmp_path) == ["vm.state"]
    assert target.read_bytes() == b"old"


def test_half_a_state_in_place_is_cut_off(tmp_path):
    target = tmp_path / "vm.state"
    target.write_bytes(b"x" * 5000)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))
    try:
        with pytest.raises(MigrationError, match="File too large"):
            write(uri(target, ",offset=100"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert target.read_bytes() == b"x" * 100


def test_what_is_not_a_file_is_not_read(tmp_path):
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(MigrationError, match="Could not open"):
            uri(path).read()
    assert uri("/dev/null").read() == b""
    with pytest.raises(MigrationError, match="too large for a state"):
        uri("/dev/zero").read()


def test_append_goes_behind_what_was_read(tmp_path):
    target = tmp_path / "vm.state"
    place = uri(target, ",offset=10")
    write(place)
    again = uri(target, ",offset=10")
    assert again.read() == DATA
    assert again.append(b"more")
    assert target.read_bytes() == bytes(10) + DATA + b"more"


def test_append_never_creates_or_touches_another_file(tmp_path):
    target = tmp_path / "vm.state"
    write(uri(target))
    gone, grown, replaced, unread = (uri(target) for _ in range(4))
    for place in (gone, grown, replaced):
        place.read()
    assert not unread.append(b"more")
    with target.open("ab") as file:
        file.write(b"!")
    assert not grown.append(b"more")
    write(uri(target))
    assert not replaced.append(b"more")
    assert target.read_bytes() == DATA
    target.unlink()
    assert not gone.append(b"more")
    assert not target.exists()


def test_append_that_fails_half_way_is_undone(tmp_path):
    target = tmp_path / "vm.state"
    write(uri(target))
    place = uri(target)
    place.read()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(DATA) + 2, hard))
    try:
        assert not place.append(b"more")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert target.read_bytes() == DATA


@pytest.mark.parametrize(
    "text",
    ["", "file:", "file", "exec:cat", "tcp:localhost:4444", "file:/x,offset=", "file:/x,offset=-1",
     "file:/x,offset=99999999E", "file:/x\0y"],
)  # fmt: skip
def test_other_uris_are_refused(text):
    with pytest.raises(MigrationError):
        FileUri(text)


def test_equal_places(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert uri("vm.state") == uri(tmp_path / "vm.state") == uri("./x/../vm.state,offset=0")
    assert uri("vm.state") != uri("vm.state", ",offset=1")
    assert len({uri("vm.state"), uri(tmp_path / "vm.state")}) == 1
