"""The kernel's file belongs to the start and to resets; an update has no use for it."""

import pytest
from harness import guests


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """Unpacked kernels stay in the test's folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def test_update_without_the_kernel_and_a_reset_with_it(vm, tmp_path):
    image = guests.bzimage(tmp_path, "zstd")
    machine = vm("-kernel", image)
    guests.expect_verdict(machine, "ELF")
    data = image.read_bytes()
    image.unlink()
    machine.update()
    assert machine.status == "running"
    assert "No such file" in machine.hmp("system_reset")
    assert machine.status.startswith("paused")
    image.write_bytes(data)
    machine.hmp("system_reset")
    machine.hmp("cont")
    guests.expect_verdict(machine, "ELF")
