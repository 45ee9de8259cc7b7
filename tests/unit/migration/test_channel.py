"""The state of an update between the images: what is loaded is what was saved."""

import os

import pytest

from pyvmm.core.threads import Event
from pyvmm.cpr.handover import Handover
from pyvmm.errors import HostError, MigrationError
from pyvmm.migration import file_channel, open_channel, uri
from pyvmm.migration.channel import MemoryChannel, memory

STATE = bytes(range(256)) * 3


@pytest.fixture
def saved(tmp_path):
    """A state in a file and, as an update leaves it, in memory; what the next image inherits."""
    path = tmp_path / "vm.state"
    path.write_bytes(STATE)
    old = Handover()
    MemoryChannel().write(STATE, old)
    yield path, Handover(old.kept())
    MemoryChannel().discard(old)


def test_untouched_file_is_read(saved):
    path, handover = saved
    assert open_channel(f"file:{path}").read(handover) == STATE


def test_bit_flipped_at_any_byte_is_refused(saved):
    path, handover = saved
    for at in range(len(STATE)):
        path.write_bytes(STATE[:at] + bytes([STATE[at] ^ 1 << at % 8]) + STATE[at + 1 :])
        with pytest.raises(MigrationError, match="is not the state that was saved"):
            open_channel(f"file:{path}").read(handover)


def test_truncation_at_any_byte_is_refused(saved):
    path, handover = saved
    for size in reversed(range(len(STATE))):
        os.truncate(path, size)
        with pytest.raises(MigrationError, match="is not the state that was saved"):
            open_channel(f"file:{path}").read(handover)


def test_copy_outlives_a_refusal(saved):
    """The image before needs it, and so does a second try of migrate_incoming."""
    path, handover = saved
    path.write_bytes(b"")
    with pytest.raises(MigrationError):
        open_channel(f"file:{path}").read(handover)
    assert os.pread(memory(handover).peek(), 4096, 0) == STATE


def test_state_without_a_copy_is_read(tmp_path):
    """A process that was started afresh has nothing to compare with."""
    path = tmp_path / "vm.state"
    path.write_bytes(STATE)
    assert open_channel(f"file:{path}").read(Handover()) == STATE


def test_disk_that_hangs_is_not_waited_for(tmp_path, monkeypatch):
    """The guest stands. What comes of it later is no state under that name."""
    path = tmp_path / "vm.state"
    path.write_bytes(b"the last one")
    real, entered, go, unlinked = uri._pwrite, Event(), Event(), Event()

    def hang(fd, data, at):
        entered.set()
        assert go.wait(20)
        real(fd, data, at)

    def unlink(*arguments, **named):
        os_unlink(*arguments, **named)
        unlinked.set()

    os_unlink = os.unlink
    monkeypatch.setattr(uri, "_pwrite", hang)
    monkeypatch.setattr(file_channel, "PATIENCE_S", 0.01)
    channel = open_channel(f"file:{path}")
    channel.prepare()
    monkeypatch.setattr(os, "unlink", unlink)
    with pytest.raises(MigrationError, match=r"vm.state': its disk did not take the state within"):
        channel.write(STATE, Handover())
    channel.discard(Handover())
    assert entered.wait(20)
    go.set()
    assert unlinked.wait(20)
    assert os.listdir(tmp_path) == ["vm.state"]
    assert path.read_bytes() == b"the last one"


def test_state_is_written_without_threads_to_be_had(tmp_path, monkeypatch):
    def none(*_arguments):
        raise HostError("no thread")

    monkeypatch.setattr(file_channel, "spawn", none)
    channel = open_channel(f"file:{tmp_path / 'vm.state'}")
    channel.prepare()
    channel.write(STATE, Handover())
    assert (tmp_path / "vm.state").read_bytes() == STATE
