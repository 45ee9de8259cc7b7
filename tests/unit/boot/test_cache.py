import os
from pathlib import Path

import pytest
from harness.process import descriptors

from pyvmm.boot import cache, linux
from pyvmm.boot.config import KernelConfig
from pyvmm.boot.loader import load
from pyvmm.testing.images import bzimage, elf, guest_memory, pack

M = 1 << 20
DATA = b"unpacked" * 1000


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Where the cache is; not made yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "pyvmm"


def kept(name):
    """What the cache has as *name*."""
    blob = cache.get(name)
    if blob is None:
        return None
    with blob:
        return blob.read(0, blob.size)


def test_what_is_put_is_got():
    name = cache.key(b"packed")
    assert kept(name) is None
    cache.put(name, DATA)
    cache.put(name, DATA)
    assert kept(name) == DATA
    assert kept(cache.key(b"other")) is None


def test_files_are_the_users_own_and_nothing_is_left_aside(folder):
    cache.put("name", DATA)
    assert [path.name for path in folder.iterdir()] == ["name"]
    assert (folder.stat().st_mode & 0o777, (folder / "name").stat().st_mode & 0o777) == (
        0o700,
        0o600,
    )


def test_kernel_is_unpacked_once(tmp_path, monkeypatch, folder):
    first, second = (elf(bytes([n]) * 100, load_at=16 * M) for n in (1, 2))
    path = tmp_path / "kernel"
    memory = guest_memory(32 * M)
    unpacked = []
    unpack = linux.unpack.unpack
    monkeypatch.setattr(linux.unpack, "unpack", lambda *args: unpacked.append(1) or unpack(*args))
    for blob, count in ((first, 1), (first, 1), (second, 2), (first, 2), (second, 2)):
        path.write_bytes(bzimage(pack(blob, "xz")))
        load(memory, KernelConfig(str(path)))
        assert memory.read(16 * M, 100) == (b"\1" if blob is first else b"\2") * 100
        assert len(unpacked) == count
    assert len(list(folder.iterdir())) == 2


def shorten(path):
    """As if the end had not reached the disk."""
    os.truncate(path, path.stat().st_size - 1)


@pytest.mark.parametrize(
    "damage",
    [
        shorten,
        lambda path: os.truncate(path, 1000),
        lambda path: os.truncate(path, 8),
        lambda path: path.write_bytes(path.read_bytes() + b"x"),
        lambda path: os.truncate(path, 0),
        lambda path: path.write_bytes(bytes(9000)),
        lambda path: os.truncate(path, cache.CACHE_MAX + 1),
        lambda path: (path.unlink(), path.mkdir()),
        lambda path: (path.unlink(), os.mkfifo(path)),
        lambda path: path.parent.chmod(0o777),
    ],
)
def test_what_is_damaged_or_not_to_be_trusted_is_absent(folder, damage):
    cache.put("name", DATA)
    before = descriptors("self")
    damage(folder / "name")
    assert kept("name") is None
    assert descriptors("self") == before


def test_what_is_damaged_is_put_anew(folder):
    cache.put("name", DATA)
    shorten(folder / "name")
    cache.put("name", DATA)
    assert kept("name") == DATA


@pytest.mark.parametrize("case", ["file in the way", "no such device", "full", "too large"])
def test_cache_that_cannot_be_written(folder, monkeypatch, case):

    def fail(*_):
        raise OSError(28, "No space left on device")

    if case == "file in the way":
        folder.write_bytes(b"")
    elif case == "no such device":
        monkeypatch.setenv("XDG_CACHE_HOME", "/proc/none")
    elif case == "full":
        folder.mkdir(0o700)
        monkeypatch.setattr(os, "rename", fail)
    else:
        monkeypatch.setattr(cache, "CACHE_MAX", len(DATA))
    cache.put("name", DATA)
    assert kept("name") is None
    if folder.is_dir():
        assert not list(folder.iterdir())


def test_cache_of_another_user(folder, monkeypatch):
    cache.put("name", DATA)
    monkeypatch.setattr(os, "geteuid", lambda: folder.stat().st_uid + 1)
    assert kept("name") is None


def test_cache_that_can_only_be_read(monkeypatch):
    def fail(*_):
        raise OSError(30, "Read-only file system")

    cache.put("name", DATA)
    monkeypatch.setattr(os, "utime", fail)
    assert kept("name") == DATA


def test_oldest_go_first_and_use_makes_young(folder, monkeypatch):
    monkeypatch.setattr(cache, "CACHE_MAX", 3 * (len(DATA) + 8))
    folder.mkdir(0o700)
    (folder / ".left.aside").write_bytes(b"x")
    os.utime(folder / ".left.aside", (1, 1))
    for number, name in enumerate("abc"):
        cache.put(name, DATA)
        os.utime(folder / name, (10 + number, 10 + number))
    assert not (folder / ".left.aside").exists()
    assert kept("a") == DATA
    cache.put("d", DATA)
    assert sorted(path.name for path in folder.iterdir()) == ["a", "c", "d"]


def test_default_folder_is_below_the_home_directory(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for value in ("", "relative"):
        monkeypatch.setenv("XDG_CACHE_HOME", value)
        cache.put("name", DATA)
        assert kept("name") == DATA
    assert (Path(tmp_path) / "home" / ".cache" / "pyvmm" / "name").exists()
    assert not Path("relative").exists()


def test_no_home_directory_means_no_cache(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "relative")
    cache.put("name", DATA)
    assert kept("name") is None
    assert not list(tmp_path.iterdir())
