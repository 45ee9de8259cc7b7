"""The human monitor in line mode: on a chardev that is no terminal, or too simple a one.

A line ends with CR, LF or both; output lines end with CR LF, as QEMU's. There is no echo,
but for a person at a simple terminal, who can also rub out (DEL, BS) and start over (Ctrl-U).

While a command is under way that replies later, no input is taken: what the client sends
meanwhile stays in the kernel, and so does not get lost in a live update. A client that goes
away leaves nothing to the next one. Main loop thread only.
"""

from __future__ import annotations

from pyvmm import __version__
from pyvmm.chardev.base import CLOSED, MUX_IN, MUX_OUT, OPENED, Outbox
from pyvmm.monitor.frontend import MonitorFrontend, take_failure
from pyvmm.monitor.hmp.interpreter import Interpreter
from pyvmm.monitor.hmp.state import (
    AFTER_CR,
    GREETED,
    MAX_LINE,
    MAX_OUTPUT,
    OVERLONG,
    OWES_PROMPT,
    MonitorState,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pyvmm.chardev.base import Chardev
    from pyvmm.monitor.registry import Context

PROMPT = "(pyvmm) "
ERASE_LINE = "\r\x1b[J"
BANNER = f"pyvmm {__version__} monitor - type 'help' for more information\n"


def encode(text: str) -> bytes:
    """Return text of the monitor as bytes for the wire; file names come out as they went in."""
    text = text.replace("\n", "\r\n")
    try:
        return text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        # What another program said in JSON may contain any code point.
        return text.encode("utf-8", "backslashreplace")


class LineMonitor(MonitorFrontend):
    """A human monitor in line mode.

    :param chardev: it is attached to this front end by the caller
    :param context: whose commands it runs
    :param echo: show what is typed
    """

    def __init__(self, chardev: Chardev, context: Context, *, echo: bool = False) -> None:
        self.chardev = chardev
        self.context = context
        self._echo = echo
        self.interpreter = Interpreter(context)
        self._outbox = Outbox(chardev, MAX_OUTPUT)
        self._line = bytearray()
        self._input = bytearray()
        self._overlong = False
        self._after_cr = False
        self._busy = False
        self._running = False
        self._open = False
        self._focused = True
        self._greeted = False
        self._owes_prompt = False
        self._client = 0

    def can_receive(self) -> int:
        return 0 if self._busy else MAX_LINE - len(self._input)

    def receive(self, data: bytes) -> None:
        self._input += data
        self._process()

    def handle_event(self, event: str) -> None:
        if event == CLOSED:
            self._forget_client()
            self._open = False
        elif event == OPENED:
            self._begin()
        elif event == MUX_OUT:
            self._focused = False
            self.chardev.take_keys(False)
            if self._open:
                self._send("\n")
        elif event == MUX_IN:
            self._focused = True
            if self._open:
                self.chardev.take_keys(self._echo)
                self._show_prompt()

    def handle_writable(self) -> None:
        self._outbox.flush()

    def save_state(self) -> bytes:
        flags = (
            OWES_PROMPT * (self._busy or self._owes_prompt)
            | OVERLONG * self._overlong
            | AFTER_CR * self._after_cr
            | GREETED * self._greeted
        )
        return MonitorState(
            bytes(self._line),
            bytes(self._input),
            self._outbox.pending(),
            flags,
            self.context.cpu_index,
            len(self._line.decode("utf-8", "surrogateescape")),
        ).pack()

    def load_state(self, state: bytes) -> None:
        old = MonitorState.unpack(state)
        old.restore_context(self.context)
        self._line[:] = old.line
        self._input[:] = old.input
        self._overlong = bool(old.flags & OVERLONG)
        self._after_cr = bool(old.flags & AFTER_CR)
        self._owes_prompt = bool(old.flags & OWES_PROMPT)
        self._greeted = bool(old.flags & GREETED)
        if old.output:
            self._outbox.send(old.output)

    def _begin(self) -> None:
        self._open = True
        if self._focused:
            self.chardev.take_keys(self._echo)
        if not self.chardev.is_inherited:
            self._forget_client()
        self._outbox.flush()
        # Whoever was there before the live update was greeted and has his prompt, unless the
        # command that led here still owes it.
        if self._owes_prompt:
            self._send(take_failure(self.context.migration))
        if self._owes_prompt or not self._greeted:
            self._show_prompt()
        self._owes_prompt = False
        self._process()

    def _forget_client(self) -> None:
        self._client += 1
        self._line.clear()
        self._input.clear()
        self._outbox.clear()
        self._overlong = self._after_cr = self._owes_prompt = self._greeted = False
        self._busy = False

    def _show_prompt(self) -> None:
        # Behind a mux the console may have the screen.
        if not self._focused or self._busy:
            return
        if not self._greeted:
            self._greeted = True
            self._send(BANNER)
        self._send(PROMPT)
        self._outbox.send(bytes(self._line))

    def _process(self) -> None:
        # A command may finish at once, which leads here again: one level is enough.
        if self._running:
            return
        self._running = True
        try:
            while self._input and not self._busy:
                byte = self._input.pop(0)
                if byte in b"\r\n":
                    if byte == 0x0A and self._after_cr:
                        self._after_cr = False
                        continue
                    self._after_cr = byte == 0x0D
                    if self._echo:
                        self._send("\n")
                    self._enter()
                else:
                    self._after_cr = False
                    self._type(byte)
        finally:
            self._running = False

    def _type(self, byte: int) -> None:
        if self._echo and (byte < 0x20 or byte == 0x7F):
            self._edit(byte)
        elif len(self._line) < MAX_LINE:
            self._line.append(byte)
            if self._echo:
                self._outbox.send(bytes((byte,)))
        else:
            self._overlong = True

    def _edit(self, byte: int) -> None:
        if byte in (0x08, 0x7F) and self._line:
            # The last character: its first byte is no continuation byte of UTF-8.
            while self._line.pop() & 0xC0 == 0x80 and self._line:
                pass
            self._outbox.send(b"\b \b")
        elif byte in (0x03, 0x15):  # Ctrl-C, Ctrl-U
            self._line.clear()
            self._overlong = False
            self._send("\n")
            self._show_prompt()

    def _enter(self) -> None:
        line = self._line.decode("utf-8", "surrogateescape")
        self._line.clear()
        if self._overlong:
            self._overlong = False
            self._send(f"Error: a line has at most {MAX_LINE} bytes\n")
            self._show_prompt()
            return
        client = self._client

        def done(text: str) -> None:
            if client != self._client:
                return  # whoever asked is gone
            self._busy = False
            self._send(text)
            self._show_prompt()
            self._process()
            self.chardev.accept_input()

        self._busy = True
        self.interpreter.execute(line, done)

    def _send(self, text: str) -> None:
        self._outbox.send(encode(text))
