"""The human monitor on a terminal, with line editing: what the main loop sees of it.

The editing itself (:mod:`pyvmm.monitor.hmp.console_prompt`) runs on a thread of its own, which
starts when the console first has the input: importing prompt_toolkit takes 0.2 s and some
megabytes, which a guest's console alone need not pay for. Until it is ready the prompt stands
there already and keys are kept.

Everything here runs on the main loop thread, but for the methods that say otherwise. The
terminal's modes are the chardev's affair.
"""

from __future__ import annotations

# Imported here although nothing uses it by name: the thread that imports it first is what it
# takes for the main thread, and asyncio treats that one differently.
import threading  # noqa: F401

from pyvmm._util import log
from pyvmm.chardev.base import CLOSED, MUX_IN, MUX_OUT, OPENED, RESIZED, Outbox
from pyvmm.core.threads import Lock, report_crash, spawn
from pyvmm.monitor.frontend import MonitorFrontend, take_failure
from pyvmm.monitor.hmp.interpreter import Interpreter
from pyvmm.monitor.hmp.lines import BANNER, ERASE_LINE, PROMPT, LineMonitor, encode
from pyvmm.monitor.hmp.state import GREETED, MAX_LINE, OWES_PROMPT, MonitorState

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from pyvmm.chardev.base import Chardev
    from pyvmm.monitor.hmp.console_prompt import Prompt
    from pyvmm.monitor.registry import Context

# How long the editor may take to wipe its prompt off the screen, before an execve (where the
# guest may stand still) and before the console gets the screen back.
_QUIESCE_S = 0.002
_SWITCH_S = 0.1


class Console(MonitorFrontend):
    """A human monitor on a terminal.

    :param chardev: attached to this front end by the caller
    :param context: whose commands it runs
    """

    def __init__(self, chardev: Chardev, context: Context) -> None:
        self.chardev = chardev
        self.context = context
        self.interpreter = Interpreter(context)
        self.outbox = Outbox(chardev)
        #: What stands behind the prompt, as the editor last said.
        self.text = ""
        #: Where the cursor stands in it.
        self.cursor = 0
        #: The line was entered, but the main loop does not run it yet.
        self.entered = False
        # The main loop runs the line, and its command has not finished.
        self._waiting = False
        self._owes_reply = False
        self._typed = bytearray()
        self._lock = Lock()
        self._prompt: Prompt | None = None
        self._fallback: LineMonitor | None = None
        self._started = False
        self._open = False
        self._focused = True
        self._quiet = False
        self._shown = False
        self._greeted = False

    # ---- front end ------------------------------------------------------------------------

    def can_receive(self) -> int:
        with self._lock:
            return MAX_LINE - len(self._typed)

    def receive(self, data: bytes) -> None:
        with self._lock:
            self._typed += data
        if self._prompt is not None:
            self._prompt.wake()

    def handle_event(self, event: str) -> None:
        if event == OPENED:
            if not self.chardev.is_inherited:
                self._forget_user()
            self._open = True
            if self._focused:
                self.chardev.take_keys(True)
            self.outbox.flush()
            if self._owes_reply:
                self._owes_reply = False
                self.outbox.send(encode(take_failure(self.context.migration)))
        elif event == CLOSED:
            self._forget_user()
            self._open = False
        elif event in (MUX_IN, MUX_OUT):
            self._focused = event == MUX_IN
            self.chardev.take_keys(self._focused)
            if self._focused and self._open:
                # The guest may have left the cursor anywhere on its line.
                self.outbox.send(b"\r\n")
        elif event == RESIZED and self._prompt is not None:
            self._prompt.resize()
        self._refresh(_SWITCH_S)

    def handle_writable(self) -> None:
        self.outbox.flush()

    # ---- live update ----------------------------------------------------------------------

    def quiesce(self) -> None:
        self._quiet = True
        self._refresh(_QUIESCE_S)

    def restart(self) -> None:
        self._quiet = False
        self._refresh(_SWITCH_S)

    def close(self) -> None:
        self._open = False
        self._refresh(_SWITCH_S)
        if self._prompt is not None:
            self._prompt.end()

    def save_state(self) -> bytes:
        if self._fallback is not None:
            return self._fallback.save_state()
        text = self.text.encode("utf-8", "surrogateescape")[:MAX_LINE]
        with self._lock:
            typed = bytes(self._typed)
        if self.entered:
            text, typed = b"", text + b"\r" + typed
        return MonitorState(
            text,
            typed[:MAX_LINE],
            self.outbox.pending(),
            GREETED * self._greeted | OWES_PROMPT * self._waiting,
            self.context.cpu_index,
            min(self.cursor, len(self.text)),
        ).pack()

    def load_state(self, state: bytes) -> None:
        old = MonitorState.unpack(state)
        old.restore_context(self.context)
        self.text = old.line.decode("utf-8", "replace")
        self.cursor = min(old.cursor, len(self.text))
        self._owes_reply = bool(old.flags & OWES_PROMPT)
        self._typed[:] = old.input
        self._greeted = bool(old.flags & GREETED)
        if old.output:
            self.outbox.send(old.output)

    # ---- for the editor's thread ----------------------------------------------------------

    def take_typed(self) -> bytes:
        """Return the keys up to the end of a line: what is behind it belongs to the next prompt."""
        with self._lock:
            ends = [at + 1 for at in (self._typed.find(b"\r"), self._typed.find(b"\n")) if at >= 0]
            count = min(ends, default=len(self._typed))
            data = bytes(self._typed[:count])
            del self._typed[:count]
        self.chardev.accept_input()
        return data

    def has_typed(self) -> bool:
        """Return whether keys wait."""
        with self._lock:
            return bool(self._typed)

    def run(self, line: str, done: Callable[[str], None]) -> None:
        """Have the main loop run a line; ``done`` is called there."""
        self.text = line
        self.entered = True

        def start() -> None:
            self.text = ""
            self.entered = False
            self._waiting = True
            self.interpreter.execute(line, finish)

        def finish(output: str) -> None:
            self._waiting = False
            done(output)

        self.context.machine.loop.call_soon(start)

    # ---- inside ---------------------------------------------------------------------------

    def _forget_user(self) -> None:
        with self._lock:
            self._typed.clear()
        self.outbox.clear()
        self.text = ""
        self.entered = self._waiting = self._owes_reply = False
        self._greeted = False

    def _refresh(self, timeout_s: float) -> None:
        """Show the prompt or wipe it away, as things stand."""
        wanted = self._open and self._focused and not self._quiet
        if wanted == self._shown:
            return
        self._shown = wanted
        if not wanted:
            if self._prompt is not None:
                self._prompt.hide(timeout_s)
            elif self._started:
                self.outbox.send(ERASE_LINE.encode())
            return
        if not self._greeted:
            self._greeted = True
            self.outbox.send(encode(BANNER))
        if self._prompt is not None:
            self._prompt.show()
            return
        self.outbox.send(encode(ERASE_LINE + PROMPT + self._text_that_fits()))
        if not self._started:
            self._started = True
            spawn(self._run_prompt, self._handle_crash)

    def _text_that_fits(self) -> str:
        # The editor wipes one line when it takes over.
        _rows, columns = self.chardev.window_size()
        fits = self.text.isascii() and len(PROMPT) + len(self.text) < columns
        return self.text if fits else ""

    def _run_prompt(self) -> None:
        from pyvmm.monitor.hmp.console_prompt import Prompt

        prompt = Prompt(self)
        prompt.run(lambda: self.context.machine.loop.call_soon(lambda: self._handle_ready(prompt)))

    def _handle_ready(self, prompt: Prompt) -> None:
        self._prompt = prompt
        if self._shown:
            prompt.show()

    def _handle_crash(self, error: BaseException) -> None:
        if isinstance(error, ImportError):
            log.say(f"no line editing: {error}")
        else:
            report_crash(error)
        self.context.machine.loop.call_soon(self._fall_back)

    def _fall_back(self) -> None:
        """Without an editor the monitor still is one."""
        self._prompt = None
        self._fallback = LineMonitor(self.chardev, self.context, echo=True)
        self.chardev.attach(self._fallback)
