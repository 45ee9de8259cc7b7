"""What is kept of the files that a guest was booted from."""

import fcntl
import os

import pytest
from harness.process import descriptors

from pyvmm.boot.config import KernelConfig
from pyvmm.boot.files import BootFiles
from pyvmm.boot.loader import load
from pyvmm.cpr.handover import Handover
from pyvmm.errors import ConfigError
from pyvmm.testing.images import boot_sector, bzimage, elf, guest_memory, pack, pvh_note

M = 1 << 20
KERNEL = elf(b"\xf4" * 100, notes=pvh_note(M))
INITRD = b"initrd" * 1000
MEMORY = guest_memory(32 * M)


@pytest.fixture
def config(tmp_path):
    """Of a kernel and an initrd in a folder."""
    (tmp_path / "kernel").write_bytes(KERNEL)
    (tmp_path / "initrd").write_bytes(INITRD)
    return KernelConfig(str(tmp_path / "kernel"), str(tmp_path / "initrd"))


@pytest.fixture
def make():
    """Makes :class:`BootFiles`, as of an image that inherited descriptors and states; closes them
    in the end, and none is left."""
    before = descriptors("self")
    made = []

    def start(inherited=None, states=None):
        store = Handover(inherited, states)
        made.append((BootFiles(store), store))
        return made[-1]

    yield start
    for files, store in made:
        files.close()
        store.settle()
        assert store.kept() == {}
    assert descriptors("self") == before


def boot(files, config):
    """Load a guest."""
    try:
        load(MEMORY, config, 0, files.open)
    except ConfigError:
        files.forget_unkept()
        raise


def loaded():
    """Where kernels lie."""
    return MEMORY.read(0x7C00, 0x2000), MEMORY.read(M, 31 * M)


def next_image(store):
    """What the next image inherits."""
    return {key: os.dup(fd) for key, fd in store.kept().items()}, store.states()


def contents(files, option):
    with files.open("/nowhere", option) as blob:
        return blob.read(0, blob.size)


def test_copies_are_sealed_and_whole(make, config):
    files, store = make()
    boot(files, config)
    assert store.kept() == {}
    assert files.keep(config) == []
    assert sorted(name for name, _ in store.kept()) == ["boot/initrd", "boot/kernel"]
    for fd in store.kept().values():
        assert fcntl.fcntl(fd, fcntl.F_GET_SEALS) == 15
        assert not os.get_inheritable(fd)
    assert contents(files, "-kernel") == KERNEL
    assert contents(files, "-initrd") == INITRD
    before = store.kept()
    assert files.keep(config) == []
    assert store.kept() == before


def test_next_image_goes_on_with_them(make, config):
    files, store = make()
    boot(files, config)
    files.keep(config)
    os.unlink(config.kernel)
    os.unlink(config.initrd)
    for _ in range(2):
        assert store.states() == {
            "boot/kernel": config.kernel.encode(),
            "boot/initrd": config.initrd.encode(),
        }
        files, store = make(*next_image(store))
        assert files.take_over(config) == []
        boot(files, config)
        assert files.keep(config) == []
        assert contents(files, "-initrd") == INITRD
        assert store.settle() == []


def test_image_before_that_kept_none(make, config):
    files, store = make({})
    assert files.take_over(config) == []
    os.unlink(config.kernel)
    assert contents(files, "-kernel") == KERNEL
    assert len(store.kept()) == 2


def test_image_before_that_kept_none_and_no_file_is_there(make, config):
    os.rename(config.kernel, config.kernel + "-")
    files, store = make({})
    (problem,) = files.take_over(config)
    assert problem.startswith(f"-kernel {config.kernel}: No such file or directory")
    assert "(a reset loads what is there by then)" in problem
    with pytest.raises(ConfigError, match="No such file"):
        boot(files, config)
    os.rename(config.kernel + "-", config.kernel)
    boot(files, config)
    assert files.keep(config) == []
    assert len(store.kept()) == 2


def test_load_that_fails_is_no_reason_to_keep_the_file(make, config, tmp_path):
    files, store = make()
    (tmp_path / "kernel").write_bytes(b"bad")
    with pytest.raises(ConfigError):
        boot(files, config)
    assert files.keep(config) == []
    assert store.kept() == {}
    (tmp_path / "kernel").write_bytes(KERNEL)
    boot(files, config)


@pytest.mark.parametrize(
    ("change", "then"),
    [
        (lambda path: os.truncate(path, 10), INITRD[:10]),
        (lambda path: os.truncate(path, 10000), INITRD + bytes(4000)),
        (lambda path: os.utime(path, ns=(0, 0)), INITRD),
        (lambda path: os.unlink(path), None),
        (lambda path: os.chmod(path, 0), None),
    ],
)
def test_file_that_changes_before_it_is_kept(make, config, change, then):
    """To be removed, renamed or made unreadable is no change of what it has."""
    files, store = make()
    boot(files, config)
    change(config.initrd)
    problems = files.keep(config)
    if then is None:
        assert problems == []
        assert contents(files, "-initrd") == INITRD
        return
    (problem,) = problems
    assert problem.startswith(f"-initrd {config.initrd}: it changed as soon as")
    assert contents(files, "-initrd") == then
    assert len(store.kept()) == 2
    # It goes on to the next image as it is.
    os.unlink(config.initrd)
    after, _ = make(*next_image(store))
    assert after.take_over(config) == []
    assert contents(after, "-initrd") == then


def test_no_memory_for_a_copy(make, config, monkeypatch):
    def fail(*_):
        raise OSError(28, "No space left on device")

    files, store = make()
    boot(files, config)
    monkeypatch.setattr(os, "pwrite", fail)
    assert len(files.keep(config)) == 2
    os.unlink(config.kernel)
    assert contents(files, "-kernel") == KERNEL
    assert len(store.kept()) == 2


@pytest.mark.parametrize(
    ("blob", "type", "size"),
    [
        (KERNEL, "auto", len(KERNEL)),
        (KERNEL, "flat", len(KERNEL) + 5000),
        (boot_sector(b"\xf4"), "auto", 512 + 5000),
        (bzimage(b"\x89LZO\0" * 20), "auto", len(bzimage(b"\x89LZO\0" * 20))),
        (bzimage(pack(elf(load_at=16 * M), "zstd")), "auto", None),
    ],
)
def test_what_is_needed_of_a_kernel(make, tmp_path, monkeypatch, blob, type, size):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (tmp_path / "kernel").write_bytes(blob + bytes(5000))
    config = KernelConfig(str(tmp_path / "kernel"), type=type)
    files, _ = make()
    boot(files, config)
    before = loaded()
    assert files.keep(config) == []
    assert len(contents(files, "-kernel")) == (size or len(blob))
    os.unlink(config.kernel)
    boot(files, config)
    assert loaded() == before


def test_other_paths_of_the_new_command(make, config, tmp_path):
    files, store = make()
    boot(files, config)
    files.keep(config)
    (tmp_path / "second").write_bytes(b"second")
    new = KernelConfig(config.kernel, str(tmp_path / "second"))
    files, store = make(*next_image(store))
    assert files.take_over(new) == []
    assert contents(files, "-initrd") == b"second"
    assert store.states()["boot/initrd"] == new.initrd.encode()
    # What is not there leaves what there is; what is not asked for goes.
    files, store = make(*next_image(store))
    (problem,) = files.take_over(KernelConfig(str(tmp_path / "no"), ""))
    assert problem.endswith(f"(a reset loads what {config.kernel} had)")
    assert contents(files, "-kernel") == KERNEL
    assert [name for name, _ in store.kept()] == ["boot/kernel"]


@pytest.mark.parametrize("data", [b"\x1f\x8b" + bytes(600), KERNEL[:200], b"text"])
def test_new_path_of_no_kernel_leaves_what_is_kept(make, config, tmp_path, data):
    files, store = make()
    boot(files, config)
    files.keep(config)
    (tmp_path / "second").write_bytes(data)
    files, store = make(*next_image(store))
    (problem,) = files.take_over(KernelConfig(str(tmp_path / "second"), config.initrd))
    assert problem.startswith(f"-kernel {tmp_path}/second: ")
    assert problem.endswith(f"(a reset loads what {config.kernel} had)")
    assert contents(files, "-kernel") == KERNEL
    assert len(store.kept()) == 2


def test_path_of_any_bytes(make, tmp_path):
    path = os.fsdecode(bytes(tmp_path) + b"/\xff k\xc3\xa4")
    with open(path, "wb") as file:
        file.write(KERNEL)
    config = KernelConfig(path)
    files, store = make()
    boot(files, config)
    files.keep(config)
    os.unlink(path)
    files, _ = make(*next_image(store))
    assert files.take_over(config) == []


def test_libraries_of_a_packed_kernel_are_imported_before_they_are_needed(
    make, tmp_path, monkeypatch
):
    """The environment that the package is in may be gone when the guest resets."""
    from pyvmm.boot import unpack

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    prepared = []
    monkeypatch.setattr(unpack, "prepare", prepared.append)
    (tmp_path / "kernel").write_bytes(bzimage(pack(elf(load_at=16 * M), "zstd")))
    config = KernelConfig(str(tmp_path / "kernel"))
    files, store = make()
    boot(files, config)
    files.keep(config)
    files, _ = make(*next_image(store))
    files.take_over(config)
    assert len(prepared) == 2
    assert all(unpack.is_known(head) for head in prepared)


@pytest.mark.parametrize("method", ["gzip", "bzip2", "lzma", "xz", "lz4", "zstd"])
def test_each_format_has_its_library(method):
    from pyvmm.boot import unpack

    unpack.prepare(pack(KERNEL, method))
