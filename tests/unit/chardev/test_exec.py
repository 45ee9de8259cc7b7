"""A real process on a real terminal that becomes another image while people type."""

import os
import select
import socket
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest

PROGRAM = Path(__file__).with_name("echo_machine.py")
DEADLINE_S = 30


class Terminal:
    """The program under test, seen by who sits before it."""

    def __init__(self, folder):
        self.master, self.slave = os.openpty()
        self.modes = termios.tcgetattr(self.slave)
        self.process = subprocess.Popen(
            [sys.executable, PROGRAM],
            cwd=folder,
            stdin=self.slave,
            stdout=self.slave,
            env={**os.environ, "PYTHONPATH": str(PROGRAM.parents[3])},
        )

    def type(self, keys):
        """Press keys."""
        os.write(self.master, keys)

    def expect(self, text):
        """Read until all of ``text`` is there, and nothing else."""
        seen = b""
        end = time.monotonic() + DEADLINE_S
        while len(seen) < len(text):
            ready, _, _ = select.select([self.master], [], [], max(end - time.monotonic(), 0))
            assert ready, f"only {seen} came"
            seen += os.read(self.master, 1000)
        assert seen == text

    def close(self):
        """End the program if the test did not."""
        self.process.kill()
        self.process.wait()
        os.close(self.master)
        os.close(self.slave)


@pytest.fixture
def terminal(tmp_path):
    terminal = Terminal(tmp_path)
    yield terminal
    terminal.close()


def echo(keys):
    return b"".join(b"<%c>" % key for key in keys)


def test_nothing_is_lost_repeated_or_reordered(terminal, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    terminal.expect(b"hello ")
    pid = terminal.process.pid
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(DEADLINE_S)
        client.connect("s")
        with client.makefile("rb") as answers:
            assert answers.read(6) == b"hello "
            for _ in range(3):
                client.sendall(b"some")
                terminal.type(b"abcEdefghi")  # the tail is typed ahead, over the exec
                client.sendall(b"thing")
                terminal.expect(echo(b"abcdefghi"))
                assert answers.read(27) == echo(b"something")
    descriptors = os.listdir(f"/proc/{pid}/fd")
    # 0, 1, 2; loop, listener, terminal in and out
    assert len(descriptors) in (7, 8), descriptors  # and the client until it is seen gone
    terminal.type(b"Ez\x01")  # a key half typed goes over, too
    terminal.expect(b"<z>")
    terminal.type(b"x")
    terminal.expect(b"\r\r\npyvmm: terminated\r\r\n")
    assert terminal.process.wait(DEADLINE_S) == 0
    assert termios.tcgetattr(terminal.slave) == terminal.modes
    assert not os.path.exists("s")


def test_terminal_after_an_image_that_failed_early(terminal):
    terminal.expect(b"hello ")
    assert termios.tcgetattr(terminal.slave) != terminal.modes
    terminal.type(b"F")
    assert terminal.process.wait(DEADLINE_S) == 3
    assert termios.tcgetattr(terminal.slave) == terminal.modes
