import os

import pytest

from pyvmm.boot import builtin, rom
from pyvmm.errors import ConfigError
from pyvmm.memory.backend import RamBackend
from pyvmm.memory.config import RamConfig
from pyvmm.memory.guest import GuestMemoryError
from pyvmm.testing.images import guest_memory

K = 1024


@pytest.mark.parametrize(
    ("size", "mirror"), [(4 * K, 4 * K), (64 * K, 64 * K), (128 * K, 128 * K), (256 * K, 128 * K)]
)
def test_rom_is_seen_twice(tmp_path, size, mirror):
    blob = os.urandom(size)
    (tmp_path / "bios").write_bytes(blob)
    data = rom.read(str(tmp_path / "bios"))
    backend = RamBackend(RamConfig("memory-backend-memfd", "bios", len(data)))
    backend.view[:] = data
    memory = guest_memory()
    rom.add(memory, backend, memory.regions[0].backend)
    assert memory.read((4 << 30) - size, size) == blob
    assert memory.read((1 << 20) - mirror, mirror) == blob[-mirror:]
    assert memory.read(0xFFFFFFF0, 16) == memory.read(0xFFFF0, 16) == blob[-16:]
    option_roms = (1 << 20) - mirror - 0xC0000
    assert memory.read(0xC0000, option_roms) == bytes(option_roms)
    for gpa in (0xC0000, 0xFFFF0, 0xFFFFFFF0):
        with pytest.raises(GuestMemoryError, match="only ROM"):
            memory.write(gpa, b"x")
    with pytest.raises(GuestMemoryError):
        memory.read(0xC0000 - 1, 1)


@pytest.mark.parametrize(
    ("size", "message"),
    [
        (0, "empty"),
        (1, "1 bytes are not a multiple of 4K; pad the image"),
        (4097, "not a multiple of 4K"),
        (260 * K, "larger than 256K"),
    ],
)
def test_sizes_that_are_refused(tmp_path, size, message):
    (tmp_path / "bios").write_bytes(bytes(size))
    with pytest.raises(ConfigError, match=rf"^-bios .*{message}"):
        rom.read(str(tmp_path / "bios"))


def test_built_in_images_are_found_installed_or_built(tmp_path, monkeypatch):
    package = tmp_path / "pyvmm"
    monkeypatch.setattr(builtin, "_PACKAGE", str(package))
    with pytest.raises(ConfigError, match=r"guest\.elf has not been built; run: make guests firm"):
        builtin.path(builtin.GUEST)
    built = tmp_path / "guests" / "build"
    built.mkdir(parents=True)
    (built / "guest.elf").touch()
    assert builtin.path(builtin.GUEST) == str(built / "guest.elf")
    (tmp_path / "firmware" / "build").mkdir(parents=True)
    (tmp_path / "firmware" / "build" / "bios.bin").touch()
    assert builtin.path(builtin.ROM) == str(tmp_path / "firmware" / "build" / "bios.bin")
    (package / "data").mkdir(parents=True)
    (package / "data" / "guest.elf").touch()
    assert builtin.path(builtin.GUEST) == str(package / "data" / "guest.elf")
