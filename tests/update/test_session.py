"""The session of the manual, typed at a real terminal."""

import os
import re
import shlex
import signal
import termios

import pexpect
import pytest
from harness import DEADLINE_S, process
from harness.terminal import Terminal

PROMPT = r"\(pyvmm\)\Z"


@pytest.fixture
def terminal(tmp_path):
    terminals = []

    def start(*options, **arguments):
        terminals.append(Terminal(tmp_path, *options, **arguments))
        return terminals[-1]

    yield start
    for each in terminals:
        each.close()


def ticks(path):
    return [int(tick) for tick in re.findall(r"tick (\d+)\r", path.read_bytes().decode())]


@pytest.mark.parametrize("term", ["xterm", "dumb"])
def test_the_session(terminal, tmp_path, term):
    """Line by line; the guest's ticks go to a file and are contiguous in the end."""
    ram = tmp_path / "ram0"
    options = [
        *("-monitor", "stdio"),
        *("-object", f"memory-backend-file,id=ram0,size=4G,mem-path={ram},share=on"),
        *("-m", "4G", "-machine", "anon-alloc=memfd"),
        *("-chardev", f"file,id=log,path={tmp_path}/log,append=on", "-serial", "chardev:log"),
        *("-append", "ticker period=10"),
    ]
    screen = terminal(*options, term=term, columns=1000)
    log = tmp_path / "log"
    screen.expect(PROMPT)
    screen.wait(lambda: log.exists() and ticks(log), "the guest's first tick")
    pid, inode = screen.pid, ram.stat().st_ino
    for _ in range(3):
        screen.command("info status", "VM status: running")
        screen.command("migrate_set_parameter mode cpr-exec")
        command = shlex.join([*screen.argv, "-incoming", "file:vm.state"])
        screen.command(f"migrate_set_parameter cpr-exec-command {command}")
        count = len(ticks(log))
        screen.command("migrate -d file:vm.state")
        screen.wait(lambda: process.cmdline(pid)[-1] == "file:vm.state", "the new image")
        screen.expect(PROMPT)
        screen.command("info status", "VM status: running")
        screen.expect(PROMPT)
        screen.wait(lambda: len(ticks(log)) > count + 2, "more ticks")  # noqa: B023
    assert ram.stat().st_ino == inode
    assert ticks(log) == list(range(1, len(ticks(log)) + 1))
    screen.child.send("quit\r")
    screen.child.expect(pexpect.EOF)
    screen.child.wait()
    assert (screen.child.exitstatus, screen.child.signalstatus) == (0, None)


def test_console_and_monitor_on_one_terminal(terminal):
    """No options at all: mon:stdio, Ctrl-a c, and an update between them."""
    screen = terminal("-m", "64M")
    screen.expect("guest> ?\\Z")
    screen.child.send("echo one\r")
    screen.expect("^one\nguest> ?\\Z")
    screen.child.send("\x01c")
    screen.expect(PROMPT)
    screen.command("info status", "VM status: running")
    for _ in range(2):
        screen.command("update")
        screen.command("info migrate", "Status: \\s*completed")
    screen.child.send("\x01c")
    screen.child.send("echo two\r")
    screen.expect("^two\nguest> ?\\Z")
    screen.child.send("\x01h")
    screen.expect("Ctrl-a x +quit")
    screen.child.send("\x01x")
    screen.child.expect(pexpect.EOF)
    screen.child.wait()
    assert screen.child.exitstatus == 0


@pytest.mark.parametrize("term", ["xterm", "dumb"])
@pytest.mark.parametrize("where", ["monitor", "mon:stdio", "mux"])
def test_ctrl_c_clears_the_line(terminal, where, term):
    """And ends neither the VMM nor the guest, before and after an update."""
    options = {
        "monitor": ("-monitor", "stdio", "-serial", "null"),
        "mon:stdio": (),
        "mux": ("-chardev", "stdio,id=c,mux=on", "-serial", "chardev:c", "-mon", "c"),
    }[where]
    screen = terminal("-m", "64M", *options, term=term)
    if where != "monitor":
        screen.expect("guest> ?\\Z")
        screen.child.send("\x01c")
    screen.expect(PROMPT)
    for _ in range(2):
        for key in ("\x03", "\x1c", "\x1a"):  # nor do those that make signals otherwise
            screen.child.send("qui")
            screen.expect(r"\(pyvmm\) qui\Z")
            screen.child.send(f"{key}\x03")
            screen.expect(PROMPT)
        screen.command("info status", "VM status: running")
        screen.command("update")
    if where == "mon:stdio":
        screen.child.send("\x01c\rcat\x03echo one\r")  # the guest's shell has it
        screen.expect("^one$")
    os.kill(screen.pid, signal.SIGINT)
    screen.child.expect(pexpect.EOF)
    screen.child.wait()
    assert screen.child.exitstatus == 128 + signal.SIGINT


def test_ctrl_c_before_the_monitor_of_the_new_image_is_there(terminal):
    """Whoever types while an update is under way ends nothing either."""
    screen = terminal("-m", "64M", "-monitor", "stdio", "-serial", "null")
    screen.expect(PROMPT)
    screen.child.send("update\r")
    prompts = screen.text.count("(pyvmm)")
    screen.wait(
        lambda: screen.child.send("\x03") and screen.text.count("(pyvmm)") > prompts,
        "the prompt of the new image",
    )
    screen.expect(PROMPT)
    screen.command("info migrate", r"Status: \s*completed")


def test_ctrl_c_ends_a_vm_that_has_no_monitor_there(terminal):
    screen = terminal("-m", "64M", "-serial", "stdio", "-monitor", "none")
    screen.expect("guest> ?\\Z")
    screen.child.send("\x03")
    screen.child.expect(pexpect.EOF)
    screen.child.wait()
    assert screen.child.exitstatus == 128 + signal.SIGINT


def test_update_while_the_console_has_the_terminal(terminal, tmp_path):
    screen = terminal("-m", "64M", "-chardev", "socket,id=m,path=m.sock,server=on,wait=off",
                      "-mon", "m", "-serial", "mon:stdio")  # fmt: skip
    screen.expect("guest> ?\\Z")
    screen.child.send("echo be")
    screen.expect("guest> echo be\\Z")
    import socket

    with socket.socket(socket.AF_UNIX) as monitor:
        monitor.settimeout(DEADLINE_S)
        monitor.connect(str(tmp_path / "m.sock"))
        monitor.sendall(b"update\n")
        data = b""
        while data.count(b"(pyvmm) ") < 2:
            data += monitor.recv(4096)
    assert b"Error" not in data
    screen.child.send("fore and after\r")
    screen.expect("^before and after\nguest> ?\\Z")


@pytest.mark.parametrize("end", ["quit", "SIGTERM", "poweroff"])
def test_terminal_is_as_it_was_in_the_end(terminal, end):
    screen = terminal("-m", "64M")
    before = screen.modes
    screen.expect("guest> ?\\Z")
    screen.child.send("\x01c")
    screen.expect(PROMPT)
    screen.command("update")
    assert termios.tcgetattr(screen.child.child_fd) != before
    # The other side stays open: the terminal outlives what runs on it.
    keep = os.open(os.ttyname(screen.child.child_fd), os.O_RDWR | os.O_NOCTTY)
    try:
        if end == "quit":
            screen.child.send("quit\r")
        elif end == "SIGTERM":
            os.kill(screen.pid, signal.SIGTERM)
        else:
            screen.child.send("\x01cpoweroff\r")
        screen.wait(lambda: not screen.child.isalive(), "the end")
        assert termios.tcgetattr(keep) == before
    finally:
        os.close(keep)
