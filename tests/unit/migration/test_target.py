"""The state of an update between the images: what is loaded is what was saved."""

import os

import pytest

from pyvmm.cpr.fdstore import FdStore
from pyvmm.errors import MigrationError
from pyvmm.migration.target import STATE_FD, MemoryTarget, parse

STATE = bytes(range(256)) * 3


@pytest.fixture
def saved(tmp_path):
    """A state in a file and, as an update leaves it, in memory; what the next image inherits."""
    path = tmp_path / "vm.state"
    path.write_bytes(STATE)
    fds = FdStore()
    MemoryTarget().write(STATE, fds)
    yield path, FdStore({(STATE_FD, 0): fds.kept()[(STATE_FD, 0)]})
    os.close(fds.kept()[(STATE_FD, 0)])


def test_untouched_file_is_read(saved):
    path, fds = saved
    assert parse(f"file:{path}").read(fds) == STATE


def test_bit_flipped_at_any_byte_is_refused(saved):
    path, fds = saved
    for at in range(len(STATE)):
        path.write_bytes(STATE[:at] + bytes([STATE[at] ^ 1 << at % 8]) + STATE[at + 1 :])
        with pytest.raises(MigrationError, match="is not the state that was saved"):
            parse(f"file:{path}").read(fds)


def test_truncation_at_any_byte_is_refused(saved):
    path, fds = saved
    for size in reversed(range(len(STATE))):
        os.truncate(path, size)
        with pytest.raises(MigrationError, match="is not the state that was saved"):
            parse(f"file:{path}").read(fds)


def test_copy_outlives_a_refusal(saved):
    """The image before needs it, and so does a second try of migrate_incoming."""
    path, fds = saved
    path.write_bytes(b"")
    with pytest.raises(MigrationError):
        parse(f"file:{path}").read(fds)
    assert os.pread(fds.peek(STATE_FD), 4096, 0) == STATE


def test_state_without_a_copy_is_read(tmp_path):
    """A process that was started afresh has nothing to compare with."""
    path = tmp_path / "vm.state"
    path.write_bytes(STATE)
    assert parse(f"file:{path}").read(FdStore()) == STATE
