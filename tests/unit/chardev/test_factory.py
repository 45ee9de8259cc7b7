"""All chardevs of a machine: made, shared, saved and closed together."""

import os
import pty
import socket
import threading

import pytest

from pyvmm.chardev.base import OPENED
from pyvmm.chardev.config import parse_chardev, parse_chardev_short
from pyvmm.chardev.stdio import StdioChardev
from pyvmm.errors import ConfigError, VmStateError


@pytest.fixture(autouse=True)
def _in_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def on_a_terminal(monkeypatch):
    """Take a pseudo terminal for standard input and output; its master."""
    master, slave = pty.openpty()
    # Not descriptors 0 and 1 themselves: pytest exchanges those before the test begins.
    for name in ("stdin", "stdout"):
        monkeypatch.setitem(StdioChardev.__init__.__kwdefaults__, name, slave)
    yield master
    os.close(slave)
    os.close(master)


def short(text, id="serial0"):
    return parse_chardev_short(text, f"-{id.rstrip('0')}", id)


def names(image):
    return {id: chardev.filename for id, chardev in image.chardevs.items()}


@pytest.mark.parametrize(
    ("text", "filename"),
    [
        ("null,id=c", "null"),
        ("ringbuf,id=c", "ringbuf"),
        ("file,id=c,path=out", "file"),
        ("socket,id=c,path=s,server=on,wait=off", "disconnected:unix:s,server=on"),
        ("socket,id=c,path=s,reconnect=60", "disconnected:unix:s"),
    ],
)
def test_every_kind(image, text, filename):
    image.chardevs.create(parse_chardev(text))
    assert names(image) == {"c": filename}
    assert image.chardevs.get("c").filename == filename
    assert image.chardevs.get("d") is None


def test_pty(image):
    chardev = image.chardevs.create(parse_chardev("pty,id=c,path=link"))
    assert chardev.filename == f"pty:{os.readlink('link')}"


def test_tcp(image):
    chardev = image.chardevs.claim(short("tcp:127.0.0.1:0,server,nowait"))
    assert chardev.filename.startswith("disconnected:tcp:127.0.0.1:")


def test_ringbuf(image):
    chardev = image.chardevs.create(parse_chardev("ringbuf,id=c,size=4"))
    assert chardev.write(b"abcdef") == 6
    assert chardev.read(2) == b"cd"
    chardev.write(b"g")
    assert chardev.read(100) == b"efg"
    assert chardev.read(100) == b""


def test_mux_is_two(image, on_a_terminal):
    serial = image.chardevs.claim(short("mon:stdio"))
    monitor = image.chardevs.claim(short("chardev:serial0", "monitor0"))
    assert names(image) == {"serial0-base": "stdio", "serial0": "mux"}
    assert serial.focused
    assert not monitor.focused
    assert serial.is_terminal
    assert image.chardevs.stdio.id == "serial0-base"


def test_quit_key(image, on_a_terminal, recorder):
    image.chardevs.claim(short("mon:stdio")).attach(recorder())
    os.write(on_a_terminal, b"\x01x")
    image.until(lambda: image.quits == 1)


@pytest.mark.parametrize(
    ("first", "second", "said"),
    [
        ("null,id=a", "null,id=a", "the name a is in use"),
        ("null,id=a-base", "null,id=a,mux=on", "the name a-base is in use"),
        ("stdio,id=a", "stdio,id=b", "stdio is in use by a; share it with mux=on"),
    ],
)
def test_refused(image, on_a_terminal, first, second, said):
    image.chardevs.create(parse_chardev(first))
    with pytest.raises(ConfigError, match=f"^-chardev: {said}"):
        image.chardevs.create(parse_chardev(second))


def test_claims(image):
    image.chardevs.create(parse_chardev("null,id=a"))
    image.chardevs.claim(short("chardev:a"))
    with pytest.raises(ConfigError, match="chardev a is in use; give the chardev mux=on"):
        image.chardevs.claim(short("chardev:a", "monitor0"))
    with pytest.raises(ConfigError, match="there is no chardev b; add -chardev KIND,id=b"):
        image.chardevs.claim(short("chardev:b"))


def test_a_failure_leaves_the_others_to_be_closed(image):
    image.chardevs.create(parse_chardev("socket,id=a,path=s,server=on"))
    with pytest.raises(ConfigError):
        image.chardevs.create(parse_chardev("file,id=b,path=no/such"))
    image.chardevs.close()
    assert not os.path.exists("s")


def test_wait(image):
    image.chardevs.create(parse_chardev("socket,id=a,path=s,server=on"))
    image.chardevs.create(parse_chardev("null,id=b"))
    image.chardevs.create(parse_chardev("socket,id=c,path=t,server=on,mux=on"))
    clients = [socket.socket(socket.AF_UNIX) for _ in range(2)]

    def connect():
        clients[0].connect("s")
        clients[1].connect("t")

    thread = threading.Thread(target=connect)
    thread.start()
    image.chardevs.wait_connected()
    thread.join()
    assert names(image)["a"] == "unix:s,server=on"
    assert names(image)["c-base"] == "unix:t,server=on"
    for client in clients:
        client.close()


def test_live_update_of_all(images, on_a_terminal, recorder):
    def make(image):
        for text in (
            "ringbuf,id=ring",
            "file,id=log,path=log",
            "pty,id=pty,path=link",
            "socket,id=sock,path=s,server=on,wait=off",
        ):
            image.chardevs.create(parse_chardev(text))
        return image.chardevs.claim(short("mon:stdio"))

    old = images()
    serial = make(old)
    serial.attach(recorder())
    old.chardevs.get("ring").write(b"remembered")
    old.chardevs.get("log").write(b"one, ")
    client = socket.socket(socket.AF_UNIX)
    client.connect("s")
    old.until(lambda: old.chardevs.get("sock").connected)
    os.write(on_a_terminal, b"\x01")
    old.until(lambda: serial.mux._escaped)
    before = names(old)
    states = old.handover.states()
    new = images(old.exec(), {**states, "chardev/gone": b"dropped"})
    serial = make(new)
    new.chardevs.load_state()
    assert new.handover.settle() == []
    assert names(new) == before
    frontend = recorder()
    serial.attach(frontend)
    assert serial.is_inherited
    assert OPENED in frontend.events
    os.write(on_a_terminal, b"x")
    new.until(lambda: new.quits == 1)
    assert new.chardevs.get("ring").read(100) == b"remembered"
    new.chardevs.get("log").write(b"two")
    with open("log") as log:
        assert log.read() == "one, two"
    client.close()
    new.chardevs.close()
    assert not os.path.lexists("s")
    assert not os.path.lexists("link")


def test_state_of_a_ringbuf_that_is_smaller_now(images):
    image = images({}, {"chardev/c": b"12345"})
    image.chardevs.create(parse_chardev("ringbuf,id=c,size=4"))
    with pytest.raises(VmStateError, match="5 bytes do not fit a ringbuf of 4"):
        image.chardevs.load_state()
