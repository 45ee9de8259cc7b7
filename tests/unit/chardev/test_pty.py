"""Pseudo terminals: who opens and closes them, and their names over an exec."""

import os
import socket
import termios

import pytest

from pyvmm.chardev import pty
from pyvmm.chardev.base import CLOSED, OPENED
from pyvmm.chardev.pty import PtyChardev
from pyvmm.errors import ConfigError, VmStateError


@pytest.fixture(autouse=True)
def _impatient(monkeypatch):
    monkeypatch.setattr(pty, "_LOOK_S", 0.01)


@pytest.fixture
def people():
    """A maker of people who open a terminal."""
    made = []

    def open_terminal(chardev):
        fd = os.open(chardev.filename.removeprefix("pty:"), os.O_RDWR | os.O_NOCTTY)
        made.append(fd)
        return fd

    yield open_terminal
    for fd in made:
        try:
            os.close(fd)
        except OSError:
            pass


def opened(image, people, recorder, room=None):
    chardev = image.make(PtyChardev)
    frontend = recorder(room)
    chardev.attach(frontend)
    person = people(chardev)
    image.until(lambda: frontend.events == [OPENED])
    return chardev, frontend, person


def test_there_and_back(image, people, recorder, capfd):
    chardev, frontend, person = opened(image, people, recorder)
    name = chardev.filename.removeprefix("pty:")
    assert capfd.readouterr().out == f"char device redirected to {name} (label c0)\n"
    assert os.ttyname(person) == name
    os.write(person, b"in\r\x03")
    image.until(lambda: frontend.data == b"in\r\x03")
    chardev.write(b"out\n")
    assert os.read(person, 10) == b"out\n"


def test_raw_for_whoever_opens_it(image, people, recorder):
    _chardev, _frontend, person = opened(image, people, recorder)
    _iflag, oflag, _cflag, lflag, *_ = termios.tcgetattr(person)
    assert not oflag & termios.OPOST
    assert not lflag & (termios.ECHO | termios.ICANON | termios.ISIG)


def test_nobody_there(image, recorder):
    chardev = image.make(PtyChardev)
    frontend = recorder()
    chardev.attach(frontend)
    assert chardev.write(b"x" * 100000) == 100000
    image.settle()
    assert not chardev.connected
    assert frontend.events == []


def test_goes_and_comes_again(image, people, recorder):
    chardev, frontend, person = opened(image, people, recorder)
    os.write(person, b"bye")
    os.close(person)
    image.until(lambda: frontend.events == [OPENED, CLOSED])
    assert frontend.data == b"bye"
    person = people(chardev)
    image.until(lambda: frontend.events == [OPENED, CLOSED, OPENED])
    os.write(person, b"again")
    image.until(lambda: frontend.data == b"byeagain")


def test_who_only_listens_is_noticed_at_the_first_output(image, people, recorder, monkeypatch):
    monkeypatch.setattr(pty, "_LOOK_S", 1000)
    chardev = image.make(PtyChardev)
    frontend = recorder()
    chardev.attach(frontend)
    people(chardev)
    chardev.write(b"lost")
    image.until(lambda: frontend.events == [OPENED])


def test_goes_with_input_unread_and_output_full(image, people, recorder):
    chardev, frontend, person = opened(image, people, recorder, room=0)
    os.write(person, b"unread")
    while chardev.write(b"x" * 4096) == 4096:
        pass
    os.close(person)
    image.until(lambda: frontend.writable == 1)
    assert chardev.write(b"x") == 1
    frontend.room = 100
    chardev.accept_input()
    image.until(lambda: frontend.events == [OPENED, CLOSED])
    assert frontend.data == b"unread"


def test_comes_again_before_all_was_read(image, people, recorder):
    chardev, frontend, person = opened(image, people, recorder, room=1)
    os.write(person, b"abc")
    image.until(lambda: frontend.data == b"a")
    os.close(person)
    image.settle()
    person = people(chardev)
    frontend.room = 100
    chardev.accept_input()
    image.until(lambda: frontend.data == b"abc")
    os.write(person, b"def")
    image.until(lambda: frontend.data == b"abcdef")
    chardev.write(b"hello")
    assert os.read(person, 10) == b"hello"


def test_link(image, tmp_path):
    link = tmp_path / "link"
    chardev = image.make(PtyChardev, path=str(link))
    assert f"pty:{os.readlink(link)}" == chardev.filename
    chardev.close()
    assert not link.is_symlink()
    chardev.close()


def test_link_of_a_process_that_died_is_replaced(image, tmp_path):
    link = tmp_path / "link"
    link.symlink_to("/dev/pts/999999")
    chardev = image.make(PtyChardev, path=str(link))
    assert f"pty:{os.readlink(link)}" == chardev.filename


@pytest.mark.parametrize("target", [None, "/dev/null", "/nonexistent", "/dev/pts/ptmx"])
def test_link_in_the_way(image, tmp_path, target):
    link = tmp_path / "link"
    if target is None:
        link.write_text("mine")
    else:
        link.symlink_to(target)
    with pytest.raises(ConfigError, match=r"^-serial: cannot make the link path=.*File exists"):
        image.make(PtyChardev, path=str(link), option="-serial")
    assert link.is_symlink() or link.read_text() == "mine"


def test_link_that_somebody_changed_is_not_removed(image, tmp_path):
    link = tmp_path / "link"
    chardev = image.make(PtyChardev, path=str(link))
    link.unlink()
    link.symlink_to("/dev/null")
    chardev.close()
    assert os.readlink(link) == "/dev/null"


def test_lives_through_an_exec(images, people, recorder, tmp_path, capfd):
    link = tmp_path / "link"
    image = images()
    chardev = image.make(PtyChardev, path=str(link))
    frontend = recorder(room=4)
    chardev.attach(frontend)
    person = people(chardev)
    os.write(person, b"half a line")
    image.until(lambda: frontend.data == b"half")
    capfd.readouterr()
    name = chardev.filename
    for _ in range(2):
        image = images(image.exec())
        chardev = image.make(PtyChardev, path=str(link))
        assert chardev.filename == name
        assert chardev.is_inherited
    assert capfd.readouterr() == ("", "")
    frontend = recorder()
    chardev.attach(frontend)
    assert frontend.events == [OPENED]
    os.write(person, b" more")
    image.until(lambda: frontend.data == b" a line more")
    os.close(person)
    image.until(lambda: CLOSED in frontend.events)
    assert not chardev.is_inherited
    chardev.close()
    assert not link.is_symlink()


def test_link_that_cannot_be_made_again_costs_no_update(images, tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    image = images()
    chardev = image.make(PtyChardev, path=str(folder / "link"))
    name = chardev.filename
    (folder / "link").unlink()
    folder.rmdir()
    image = images(image.exec())
    chardev = image.make(PtyChardev, path=str(folder / "link"))
    assert chardev.filename == name
    chardev.close()


def test_nobody_there_at_an_exec(images, people, recorder):
    old = images()
    old.make(PtyChardev)
    new = images(old.exec())
    chardev = new.make(PtyChardev)
    frontend = recorder()
    chardev.attach(frontend)
    assert not chardev.is_inherited
    people(chardev)
    new.until(lambda: frontend.events == [OPENED])


def test_inherited_descriptor_of_the_wrong_kind(images):
    image = images({("chardev/c0", 0): socket.socket().detach()})
    with pytest.raises(VmStateError, match="is no pseudo terminal"):
        image.make(PtyChardev)
