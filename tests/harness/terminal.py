"""A machine with its monitor, or its console, on a terminal, as a person uses it."""

import re
import termios

import pexpect
import pyte

from harness import process
from harness.process import DEADLINE_S, wait_until


class Terminal:
    """``pyvmm run`` on a pseudo terminal, and what a person would see there.

    :param folder: working directory of the process
    :param options: of ``pyvmm run``
    :param program: what to start instead of ``pyvmm run``
    """

    def __init__(self, folder, *options, term="xterm", columns=100, lines=40, program=None):
        self.argv = [*(program or (process.pyvmm(), "run")), *options]
        self.screen = pyte.HistoryScreen(columns, lines, history=2000)
        self._stream = pyte.ByteStream(self.screen)
        self.raw = b""
        self.child = pexpect.spawn(
            self.argv[0],
            self.argv[1:],
            cwd=str(folder),
            env=process.environment(TERM=term),
            dimensions=(lines, columns),
            timeout=DEADLINE_S,
            echo=True,
        )
        self.child.delaybeforesend = None
        self.pid = self.child.pid
        self.modes = termios.tcgetattr(self.child.child_fd)

    def take(self):
        """Show what has arrived; answer what the program asks the terminal."""
        try:
            data = self.child.read_nonblocking(65536, timeout=0.02)
        except (pexpect.TIMEOUT, pexpect.EOF):
            return False
        self.raw += data
        self._stream.feed(data)
        for _ in range(data.count(b"\x1b[6n")):
            line, column = self.screen.cursor.y + 1, self.screen.cursor.x + 1
            self.child.send(f"\x1b[{line};{column}R")
        return True

    @property
    def text(self):
        """All lines, those scrolled out at the top first."""
        above = [
            "".join(line[column].data for column in range(self.screen.columns)).rstrip()
            for line in self.screen.history.top
        ]
        return "\n".join([*above, *(line.rstrip() for line in self.screen.display)]).rstrip()

    def wait(self, condition, what):
        """Wait until ``condition()``, showing what arrives meanwhile; its value."""

        def check():
            self.take()
            return condition()

        try:
            return wait_until(check, what)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.text}") from None

    def expect(self, pattern):
        """Wait until what is to be seen matches."""
        self.wait(lambda: re.search(pattern, self.text, re.M), repr(pattern))

    def command(self, line, output=""):
        """Type a command at the prompt; wait for its output and the next prompt."""
        before = self.text.count("(pyvmm)")
        self.child.send(line + "\r")
        self.wait(lambda: self.text.count("(pyvmm)") > before, f"a prompt after {line}")
        shown = self.text.split("(pyvmm)")[before]
        assert re.fullmatch(rf" {re.escape(line)}\n{output}(?s:.*)", shown), self.text

    def close(self):
        """End the process."""
        process.end_session(self.child)
