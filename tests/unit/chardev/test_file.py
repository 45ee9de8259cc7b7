"""Files: what is kept, what is dropped, and that an exec loses and repeats nothing."""

import os
import socket

import pytest

from pyvmm.chardev.file import FileChardev
from pyvmm.errors import ConfigError, VmStateError


def test_truncates(image, tmp_path):
    path = tmp_path / "out"
    path.write_bytes(b"old contents")
    chardev = image.make(FileChardev, path=str(path))
    assert chardev.write(b"new") == 3
    assert path.read_bytes() == b"new"
    assert chardev.filename == "file"


def test_appends(image, tmp_path):
    path = tmp_path / "out"
    path.write_bytes(b"old, ")
    image.make(FileChardev, path=str(path), append=True).write(b"new")
    assert path.read_bytes() == b"old, new"


def test_lives_through_an_exec(images, tmp_path):
    path = tmp_path / "out"
    old = images()
    old.make(FileChardev, path=str(path)).write(b"before, ")
    new = images(old.exec())
    chardev = new.make(FileChardev, path=str(path))
    assert chardev.is_inherited
    chardev.write(b"after")
    assert path.read_bytes() == b"before, after"


def test_full_disk_does_not_stop_the_guest(image):
    chardev = image.make(FileChardev, path="/dev/full")
    assert chardev.write(b"x" * 100) == 100
    assert chardev.dropped == 100
    assert chardev.connected


def test_fifo_without_a_reader(image, tmp_path):
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(ConfigError, match="start what reads the FIFO first"):
        image.make(FileChardev, path=str(tmp_path / "fifo"))


def test_fifo_whose_reader_stalls_goes_and_comes_again(image, tmp_path, recorder):
    path = str(tmp_path / "fifo")
    os.mkfifo(path)
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    chardev = image.make(FileChardev, path=path)
    frontend = recorder()
    chardev.attach(frontend)
    image.settle()
    while chardev.write(b"x" * 4096) == 4096:
        pass
    image.settle()
    assert frontend.writable == 0
    os.close(reader)
    image.until(lambda: frontend.writable == 1)
    assert chardev.write(b"dropped") == 7
    # Nor does the hang-up wake the loop again and again.
    wakes = []
    image.loop.call_later(0.02, lambda: wakes.append("timer"))
    image.loop.run_once(5)
    assert wakes == ["timer"]
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    assert set(os.read(reader, 1 << 20)) == set(b"x")
    assert chardev.write(b"read") == 4
    assert os.read(reader, 100) == b"read"
    os.close(reader)


@pytest.mark.parametrize(
    ("name", "said"),
    [("", "Is a directory"), ("no/file", "No such file"), ("x" * 300, "File name too long")],
)
def test_cannot_be_opened(image, tmp_path, name, said):
    with pytest.raises(ConfigError, match=rf"^-serial: cannot open path=.*{said}.*; give a file"):
        image.make(FileChardev, path=f"{tmp_path}/{name}", option="-serial")


def test_inherited_descriptor_of_the_wrong_kind(images, tmp_path):
    image = images({("chardev/c0", 0): socket.socket().detach()})
    with pytest.raises(VmStateError, match="is no file"):
        image.make(FileChardev, path=str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()
