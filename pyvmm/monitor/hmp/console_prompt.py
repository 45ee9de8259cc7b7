"""The line editor of the human monitor: prompt_toolkit on a thread of its own.

Imported on that thread only, since the import takes 0.2 s. The methods that the main loop
calls are named in the class; everything else runs on the editor's thread. Commands are run by
the main loop, the editor waits for their output and prints it between two prompts.
"""

from __future__ import annotations

import asyncio
import codecs
import os
from contextlib import contextmanager
from pathlib import Path

from prompt_toolkit import PromptSession
from prompt_toolkit.application import create_app_session
from prompt_toolkit.buffer import Buffer
from prompt_toolkit.completion import CompleteEvent, Completer, Completion
from prompt_toolkit.data_structures import Size
from prompt_toolkit.document import Document
from prompt_toolkit.filters import is_searching
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.input.base import Input
from prompt_toolkit.input.vt100_parser import Vt100Parser
from prompt_toolkit.key_binding import KeyBindings, KeyPress, KeyPressEvent
from prompt_toolkit.output import ColorDepth
from prompt_toolkit.output.vt100 import Vt100_Output
from prompt_toolkit.shortcuts import CompleteStyle
from prompt_toolkit.styles import Style

from pyvmm.core.threads import Event, report_crash
from pyvmm.monitor.hmp.completion import complete
from pyvmm.monitor.hmp.lines import ERASE_LINE, PROMPT, encode
from pyvmm.monitor.hmp.state import MAX_LINE

TYPE_CHECKING = False
if TYPE_CHECKING:
    import io
    from collections.abc import Callable, Iterable, Iterator
    from contextlib import AbstractContextManager
    from typing import Protocol

    from pyvmm.chardev.base import Chardev, Outbox
    from pyvmm.monitor.registry import Context

    class Terminal(Protocol):
        """What the editor needs of the console that it is of; any thread."""

        context: Context
        chardev: Chardev
        outbox: Outbox
        text: str
        cursor: int

        def has_typed(self) -> bool:
            """Return whether there are keys to take."""

        def take_typed(self) -> bytes:
            """Return the keys that were typed."""

        def run(self, line: str, done: Callable[[str], None]) -> None:
            """Have the main loop run a line."""


_HINT = "Type quit to end pyvmm; the guest ends with it.\n"
_TOO_LONG = f"Error: a line has at most {MAX_LINE} bytes\n"
# Of a colour, so that the blank at its end is sent as one, which scripts wait for; a plain one
# would become a movement of the cursor.
_STYLE = Style.from_dict({"prompt": "ansigreen"})
_HIDDEN = object()
_RED, _PLAIN = "\x1b[31m", "\x1b[0m"


class Prompt:
    """The editor of one console. The main loop calls wake, show, hide, resize and end."""

    def __init__(self, console: Terminal) -> None:
        self._console = console
        self._loop: asyncio.AbstractEventLoop | None = None
        self._task: asyncio.Task[None] | None = None
        self._wanted = asyncio.Event()
        self._fresh = True
        self._colour = not os.environ.get("NO_COLOR")
        self._output = ChardevOutput(console)
        self._input = ChardevInput(console, lambda: self._session.app.is_done)
        self._session: PromptSession[object] = PromptSession(
            [("class:prompt", PROMPT)],
            history=history(),
            completer=_Completer(console.context),
            complete_while_typing=False,
            complete_style=CompleteStyle.READLINE_LIKE,
            reserve_space_for_menu=0,
            style=_STYLE,
            color_depth=ColorDepth.DEPTH_4_BIT if self._colour else ColorDepth.DEPTH_1_BIT,
            key_bindings=_bindings(),
            input=self._input,
            output=self._output,
        )
        self._session.app.terminal_size_polling_interval = None
        buffer = self._session.default_buffer
        buffer.on_text_changed += self._note
        buffer.on_cursor_position_changed += self._note

    # ---- called by the main loop ----------------------------------------------------------

    def wake(self) -> None:
        """There are keys."""
        self._call(self._input.deliver)

    def show(self) -> None:
        """Prompt, from now on."""
        self._call(self._show)

    def hide(self, timeout_s: float) -> None:
        """Wipe the prompt off the screen; returns when it is gone, or time is up."""
        hidden = Event()
        self._call(lambda: self._hide(hidden))
        hidden.wait(timeout_s)

    def resize(self) -> None:
        """The terminal has another size."""
        self._call(self._resize)

    def end(self) -> None:
        """Let the thread end."""
        self._call(lambda: self._task and self._task.cancel())

    # ---- the thread -----------------------------------------------------------------------

    def run(self, ready: Callable[[], object]) -> None:
        """Serve until :meth:`end`.

        :param ready: called once, when the methods above may be called
        """
        # A session of its own: the default one, and what counts as the application that runs,
        # would be shared with the editors of other terminals.
        with create_app_session(self._input, self._output):
            try:
                asyncio.run(self._serve(ready))
            except asyncio.CancelledError:
                pass

    async def _serve(self, ready: Callable[[], object]) -> None:
        self._loop = asyncio.get_running_loop()
        self._loop.set_exception_handler(_report)
        self._task = asyncio.current_task()
        ready()
        while True:
            await self._wanted.wait()
            text = await self._ask()
            for line in text.splitlines():
                result = await self._execute(line)
                if self._colour and result.startswith("Error: "):
                    result = f"{_RED}{result}{_PLAIN}"
                self._print(result)

    async def _ask(self) -> str:
        """Prompt once; return what was entered, or an empty text."""
        output = self._output
        output.muted = False
        if self._fresh:
            # The main loop, or the image before, may have shown a prompt here already.
            self._fresh = False
            output.write_raw(ERASE_LINE)
        try:
            text = await self._session.prompt_async(
                default=self._console.text,
                pre_run=self._place_cursor(),
                handle_sigint=False,
                set_exception_handler=False,
            )
        except EOFError:
            self._print(_HINT)
            return ""
        if text is _HIDDEN:
            return ""
        if len(str(text)) > MAX_LINE:
            self._console.text = ""
            self._print(_TOO_LONG)
            return ""
        return str(text)

    async def _execute(self, line: str) -> str:
        assert self._loop is not None
        future: asyncio.Future[str] = self._loop.create_future()
        self._console.run(line, lambda text: self._call(lambda: future.set_result(text)))
        return await future

    def _place_cursor(self) -> Callable[[], None]:
        # Read now: the buffer's default text puts the cursor behind it, which is noted, too.
        position = self._console.cursor

        def place() -> None:
            buffer = self._session.default_buffer
            buffer.cursor_position = min(position, len(buffer.text))

        return place

    def _note(self, buffer: Buffer) -> None:
        # Emptying the buffer for the next prompt is not something that was typed.
        if not self._session.app.is_done:
            self._console.text, self._console.cursor = buffer.text, buffer.cursor_position

    def _print(self, text: str) -> None:
        self._console.outbox.send(encode(text))

    def _call(self, function: Callable[[], object]) -> None:
        assert self._loop is not None
        try:
            self._loop.call_soon_threadsafe(function)
        except RuntimeError:
            pass  # the thread has ended: the main loop hears of it soon, if it does not know

    def _show(self) -> None:
        self._wanted.set()

    def _hide(self, hidden: Event) -> None:
        self._wanted.clear()
        app = self._session.app
        if app.is_running and not app.is_done:
            app.renderer.erase()
            self._output.flush()
            # What is drawn from here on until the next prompt would come too late.
            self._output.muted = True
            app.exit(result=_HIDDEN)
        hidden.set()

    def _resize(self) -> None:
        app = self._session.app
        if app.is_running and not app.is_done:
            app.renderer.erase(leave_alternate_screen=False)
            app.invalidate()


def _report(_loop: asyncio.AbstractEventLoop, problem: dict[str, object]) -> None:
    # Not prompt_toolkit's way: it waits for a key of a person who may be somewhere else.
    error = problem.get("exception")
    report_crash(error if isinstance(error, BaseException) else RuntimeError(problem["message"]))


class ChardevInput(Input):
    """Keys from the console's chardev.

    :param is_done: whether the line is entered, so that what follows is for the next one
    """

    def __init__(self, console: Terminal, is_done: Callable[[], bool]) -> None:
        self._console = console
        self._is_done = is_done
        self._callback: Callable[[], None] | None = None
        self._decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")
        self._keys: list[KeyPress] = []
        self._parser = Vt100Parser(self._keys.append)

    def deliver(self) -> None:
        """Have the keys that wait taken, if somebody does."""
        if self._callback is not None and self._console.has_typed() and not self._is_done():
            self._callback()
            asyncio.get_running_loop().call_soon(self.deliver)

    def fileno(self) -> int:
        raise NotImplementedError

    def typeahead_hash(self) -> str:
        return f"pyvmm-{id(self)}"

    def read_keys(self) -> list[KeyPress]:
        self._parser.feed(self._decoder.decode(self._console.take_typed()))
        return self._take()

    @property
    def closed(self) -> bool:
        return False

    def flush_keys(self) -> list[KeyPress]:
        self._parser.flush()
        return self._take()

    def raw_mode(self) -> AbstractContextManager[None]:
        return self._attached(self._callback)

    def cooked_mode(self) -> AbstractContextManager[None]:
        return self._attached(self._callback)

    def attach(self, input_ready_callback: Callable[[], None]) -> AbstractContextManager[None]:
        return self._attached(input_ready_callback)

    def detach(self) -> AbstractContextManager[None]:
        return self._attached(None)

    @contextmanager
    def _attached(self, callback: Callable[[], None] | None) -> Iterator[None]:
        before, self._callback = self._callback, callback
        asyncio.get_running_loop().call_soon(self.deliver)
        try:
            yield
        finally:
            self._callback = before

    def _take(self) -> list[KeyPress]:
        keys = self._keys[:]
        self._keys.clear()
        return keys


class ChardevOutput(Vt100_Output):
    """Escape sequences to the console's chardev.

    Never asks the terminal where the cursor is: the answer could reach the guest.
    """

    def __init__(self, console: Terminal) -> None:
        self._console = console
        #: Drop everything.
        self.muted = False

        def size() -> Size:
            rows, columns = console.chardev.window_size()
            return Size(rows=rows, columns=columns)

        super().__init__(_sink(), size, term=os.environ.get("TERM"), enable_cpr=False)

    def flush(self) -> None:
        text = "".join(self._buffer)
        self._buffer.clear()
        if text and not self.muted:
            self._console.outbox.send(text.encode("utf-8", "surrogateescape"))


def _sink() -> io.StringIO:
    # The base class wants a file, and with flush() replaced never writes to it.
    import io

    return io.StringIO()


class _Completer(Completer):
    def __init__(self, context: Context) -> None:
        self._context = context

    def get_completions(self, document: Document, event: CompleteEvent) -> Iterable[Completion]:
        line = document.text_before_cursor
        start = -len(line.rpartition(" ")[2])
        for text, about in complete(line, self._context):
            yield Completion(text, start_position=start, display_meta=about)


class _FileHistory(FileHistory):
    """History in a file, for as long as that can be written."""

    def store_string(self, string: str) -> None:
        try:
            super().store_string(string)
        except OSError:
            pass


def history() -> History:
    """Return the lines of earlier sessions, which a file keeps if that is possible."""
    state = os.environ.get("XDG_STATE_HOME") or os.path.expanduser("~/.local/state")
    path = Path(state, "pyvmm", "history")
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
    except OSError:
        return InMemoryHistory()
    return _FileHistory(str(path))


def _bindings() -> KeyBindings:
    bindings = KeyBindings()

    @bindings.add("c-c", filter=~is_searching)  # a search it leaves, by the editor's own
    def _clear(event: KeyPressEvent) -> None:
        event.current_buffer.reset()

    @bindings.add("c-z")
    def _ignore(_event: KeyPressEvent) -> None:
        """To stop this process would stop the guest."""

    return bindings
