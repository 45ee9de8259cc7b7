"""The human monitor on a real terminal, seen through a terminal emulator."""

import os
import time
import tty

import pyte
import pytest

from pyvmm.chardev.base import OPENED, RESIZED, Frontend
from pyvmm.chardev.mux import MuxChardev
from pyvmm.chardev.stdio import StdioChardev
from pyvmm.core.eventloop import READABLE
from pyvmm.cpr.handover import Handover
from pyvmm.monitor.hmp import console as console_module
from pyvmm.monitor.hmp.console import Console
from pyvmm.monitor.hmp.lines import BANNER, PROMPT
from pyvmm.monitor.registry import Context

BANNER_LINE = BANNER.rstrip()
DEADLINE_S = 20


class Terminal:
    """A terminal of 80 by 24 with a console on it; the test is its user."""

    def __init__(self, context):
        self.context = context
        self.loop = context.machine.loop
        self.master, self.slave = os.openpty()
        tty.setraw(self.slave)
        os.set_blocking(self.master, False)
        self.screen = pyte.Screen(80, 24)
        self.stream = pyte.ByteStream(self.screen)
        self.raw = b""
        self.loop.add(self.master, READABLE, self._handle_output)
        self.chardev = StdioChardev(
            "mon0", self.loop, Handover(), stdin=self.slave, stdout=self.slave
        )
        self.console = None

    def open(self, chardev=None, state=b""):
        """Start a console, after an update if there is a state."""
        chardev = chardev or self.chardev
        old = self.context
        self.console = Console(chardev, Context(old.machine, old.migration, old.registry))
        if state:
            self.chardev.is_inherited = chardev.is_inherited = True
            self.console.load_state(state)
        chardev.attach(self.console)

    def update(self, chardev=None):
        """What an exec does to the console, as far as it can be done in one process."""
        self.console.quiesce()
        state = self.console.save_state()
        self.console.context.machine.loop.run_once(0)
        self.open(chardev, state)

    def type(self, text):
        os.write(self.master, text.encode())

    def lines(self):
        return [line.rstrip() for line in self.screen.display if line.strip()]

    def wait(self, done):
        """Run the main loop until ``done()``."""
        deadline = time.monotonic() + DEADLINE_S
        while not done():
            assert time.monotonic() < deadline, "\n".join(["on the screen:", *self.lines()])
            self.loop.run_once(0.05)

    def expect(self, *lines):
        """Wait until these are the last lines on the screen."""
        self.wait(lambda: self.lines()[-len(lines) :] == list(lines))

    def ready(self):
        """Wait until the editor has taken over from the prompt that stands for it."""
        self.wait(lambda: self.console._prompt is not None)
        self.wait(lambda: b"\x1b[?2004h" in self.raw)  # it has drawn: bracketed paste is on

    def close(self):
        if self.console is not None:
            self.console.close()
        self.loop.remove(self.master)
        self.chardev.close()
        os.close(self.master)
        os.close(self.slave)

    def _handle_output(self, _revents):
        data = os.read(self.master, 65536)
        self.raw += data
        self.stream.feed(data)


@pytest.fixture
def terminal(context, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    terminal = Terminal(context)
    yield terminal
    terminal.close()


@pytest.fixture
def opened(terminal):
    terminal.open()
    terminal.expect(BANNER_LINE, PROMPT.rstrip())
    terminal.ready()
    return terminal


def test_commands(opened):
    opened.type("info status\r")
    opened.expect(f"{PROMPT}info status", "VM status: running", PROMPT.rstrip())
    opened.type("bogus\r")
    opened.expect(f"{PROMPT}bogus", "unknown command: 'bogus'", PROMPT.rstrip())


def test_keys_typed_before_the_editor_is_ready_are_kept(terminal):
    terminal.open()
    terminal.type("info kvm\rinfo na")
    terminal.expect(f"{PROMPT}info kvm", "kvm support: enabled", f"{PROMPT}info na")
    terminal.type("me\r")
    terminal.expect(f"{PROMPT}info name", PROMPT.rstrip())


@pytest.mark.parametrize("plain", [True, False])
def test_scripts_can_wait_for_the_prompt(terminal, monkeypatch, plain):
    if plain:
        monkeypatch.setenv("NO_COLOR", "1")
    terminal.open()
    terminal.ready()
    terminal.raw = b""
    terminal.type("info kvm\r")
    terminal.wait(lambda: b"enabled\r" in terminal.raw)
    terminal.wait(lambda: b"(pyvmm) " in terminal.raw.partition(b"enabled\r")[2])
    assert (b"\x1b[0;32m" in terminal.raw) is not plain


def test_editing_and_history(opened):
    opened.type("info stotus\x1b[D\x1b[D\x1b[D\x7fa\r")  # three to the left, rub out, a
    opened.expect("VM status: running", PROMPT.rstrip())
    buffer = opened.console._prompt._session.default_buffer
    opened.wait(lambda: len(buffer._working_lines) > 1)  # the history is loaded behind the prompt
    opened.type("\x1b[A")
    opened.expect(f"{PROMPT}info status")
    opened.type("\x03")  # Ctrl-C
    opened.expect(PROMPT.rstrip())
    opened.type("info kvm\r")
    opened.expect("kvm support: enabled", PROMPT.rstrip())


def test_history_is_kept_in_a_file(opened, tmp_path):
    opened.type("info status\r")
    opened.expect("VM status: running", PROMPT.rstrip())
    history = tmp_path / "pyvmm" / "history"
    assert "+info status\n" in history.read_text()
    assert history.stat().st_mode & 0o777 == 0o600


def test_completion(opened):
    opened.type("info stat\t")
    opened.expect(f"{PROMPT}info status")
    opened.type("\x03migrate_set_parameter mode cpr-e\t\r")
    opened.expect(f"{PROMPT}migrate_set_parameter mode cpr-exec", PROMPT.rstrip())
    assert opened.context.migration.parameters.get("mode") == "cpr-exec"


def test_ctrl_d_does_not_end_the_machine(opened):
    opened.type("\x04")
    opened.expect("Type quit to end pyvmm; the guest ends with it.", PROMPT.rstrip())
    assert opened.context.machine.acts == []


def test_quit(opened):
    opened.type("quit\r")
    opened.wait(lambda: opened.context.machine.acts == ["quit 0 host-qmp-quit"])


def test_pasted_lines_are_run_one_by_one(opened):
    opened.type("\x1b[200~stop\rinfo status\x1b[201~\r")
    opened.expect("VM status: paused", PROMPT.rstrip())


def test_the_prompt_waits_for_a_migration(opened):
    opened.type("migrate file:a\rinfo kvm\r")
    opened.wait(lambda: opened.context.migration.started)
    opened.context.migration.finish("it went wrong")
    opened.expect(
        f"{PROMPT}migrate file:a",
        "Error: it went wrong",
        f"{PROMPT}info kvm",
        "kvm support: enabled",
        PROMPT.rstrip(),
    )


@pytest.mark.parametrize("plain", [True, False])
def test_errors_are_red_unless_colour_is_unwanted(terminal, monkeypatch, plain):
    if plain:
        monkeypatch.setenv("NO_COLOR", "1")
    terminal.open()
    terminal.type("cpu 7\r")
    terminal.expect("Error: invalid CPU index", PROMPT.rstrip())
    assert (b"\x1b[31m" in terminal.raw) is not plain


def test_a_half_typed_line_lives_through_an_update(opened):
    opened.type("stop\rinfo st")
    opened.expect(f"{PROMPT}stop", f"{PROMPT}info st")
    opened.wait(lambda: opened.console.text == "info st")
    first = opened.console
    opened.update()
    opened.expect(BANNER_LINE, f"{PROMPT}stop", f"{PROMPT}info st")
    opened.type("atus\r")
    opened.expect(f"{PROMPT}stop", f"{PROMPT}info status", "VM status: paused", PROMPT.rstrip())
    first.close()


def test_the_cursor_stays_where_it_was(opened):
    opened.type("info sttus\x1b[D\x1b[D\x1b[D")
    opened.wait(lambda: (opened.console.text, opened.console.cursor) == ("info sttus", 7))
    first = opened.console
    opened.update()
    opened.expect(BANNER_LINE, f"{PROMPT}info sttus")
    opened.type("a\r")
    opened.expect(f"{PROMPT}info status", "VM status: running", PROMPT.rstrip())
    first.close()


def test_who_waited_for_an_update_that_failed_after_the_exec_is_told_once(opened):
    opened.type("migrate file:a\r")
    opened.wait(lambda: opened.context.migration.started)
    first = opened.console
    opened.context.migration.error = "it broke (the guest is back in the image before)"
    opened.update()
    opened.wait(lambda: any("it broke" in line for line in opened.lines()))
    assert opened.context.migration.error is None
    opened.update()
    opened.type("info kvm\r")
    opened.wait(lambda: "kvm support: enabled" in opened.lines())
    assert sum("it broke" in line for line in opened.lines()) == 1
    first.close()


def test_a_long_line_leaves_no_trace_on_the_screen(opened):
    long = "x" * 200
    opened.type(long)
    opened.wait(lambda: opened.console.text == long)
    opened.wait(lambda: "".join(opened.lines()).count("x") == 200)
    first = opened.console
    opened.update()
    opened.ready()
    opened.type("\x15info kvm\r")
    opened.expect(BANNER_LINE, f"{PROMPT}info kvm", "kvm support: enabled", PROMPT.rstrip())
    first.close()


def test_keys_behind_a_waiting_command_live_through_an_update(opened):
    opened.type("migrate file:a\rinfo kvm\rinfo na")
    opened.wait(lambda: opened.context.migration.started and opened.console.has_typed())
    first = opened.console
    opened.update()
    opened.expect("kvm support: enabled", f"{PROMPT}info na")
    first.close()


def test_a_failed_exec_brings_the_prompt_back(opened):
    opened.type("info st")
    opened.wait(lambda: opened.console.text == "info st")
    opened.console.quiesce()
    opened.expect(BANNER_LINE)
    opened.console.restart()
    opened.expect(BANNER_LINE, f"{PROMPT}info st")
    opened.type("atus\r")
    opened.expect("VM status: running", PROMPT.rstrip())


def test_quiescing_takes_no_time(opened, monkeypatch):
    # Not even if the editor has no time for it.
    limits = []
    monkeypatch.setattr(opened.console._prompt, "hide", limits.append)
    opened.console.quiesce()
    assert limits == [0.002]


def test_a_line_entered_but_not_run_is_run_by_the_new_image(opened):
    opened.console.text, opened.console.entered = "info kvm", True
    state = opened.console.save_state()
    first = opened.console
    opened.open(state=state)
    opened.expect("kvm support: enabled", PROMPT.rstrip())
    first.close()


def test_the_screen_may_change_its_size(opened):
    opened.type("info status")
    opened.expect(f"{PROMPT}info status")
    opened.console.handle_event(RESIZED)
    opened.type("\r")
    opened.expect("VM status: running", PROMPT.rstrip())


class Guest(Frontend):
    """The serial console beside the monitor."""

    def __init__(self):
        self.heard = b""

    def can_receive(self):
        return 16

    def receive(self, data):
        self.heard += data


def test_behind_a_mux(terminal):
    mux = MuxChardev("mux0", terminal.chardev, lambda: None)
    serial, guest = mux.frontend_chardev(0), Guest()
    serial.attach(guest)
    terminal.open(mux.frontend_chardev(1))
    serial.write(b"login: ")
    terminal.expect("login:")
    assert terminal.console._started is False  # a guest's console does not pay for the monitor
    terminal.type("\x01c")
    terminal.expect("login:", BANNER_LINE, PROMPT.rstrip())
    terminal.type("info st")
    terminal.expect("login:", BANNER_LINE, f"{PROMPT}info st")
    terminal.type("\x01c")
    terminal.expect("login:", BANNER_LINE)
    serial.write(b"ok\r\n")
    terminal.type("root")
    terminal.wait(lambda: guest.heard == b"root")
    terminal.expect("login:", BANNER_LINE, "ok")
    terminal.type("\x01c")
    terminal.expect("ok", f"{PROMPT}info st")
    terminal.type("atus\r")
    terminal.expect(f"{PROMPT}info status", "VM status: running", PROMPT.rstrip())


def test_leaving_before_the_editor_is_ready(terminal):
    mux = MuxChardev("mux0", terminal.chardev, lambda: None)
    mux.frontend_chardev(0).attach(Guest())
    terminal.open(mux.frontend_chardev(1))
    terminal.type("\x01c\x01c")
    terminal.wait(lambda: terminal.console._prompt is not None)
    terminal.expect(BANNER_LINE)
    terminal.type("\x01c")
    terminal.expect(BANNER_LINE, PROMPT.rstrip())


def test_without_the_editor_there_still_is_a_monitor(terminal, monkeypatch, capfd):
    def fail(_self):
        raise ImportError("No module named 'prompt_toolkit'")

    monkeypatch.setattr(console_module.Console, "_run_prompt", fail)
    terminal.open()
    terminal.wait(lambda: terminal.console._fallback is not None)
    terminal.type("info kvx\x7fm\r")
    terminal.expect(f"{PROMPT}info kvm", "kvm support: enabled", PROMPT.rstrip())
    assert "no line editing: No module named" in capfd.readouterr().err


def test_keys_that_come_when_the_editor_has_ended_do_no_harm(opened):
    prompt = opened.console._prompt
    prompt.end()
    opened.wait(prompt._loop.is_closed)
    opened.type("x")
    opened.wait(opened.console.has_typed)
    opened.console.quiesce()


def test_another_user_finds_nothing_of_the_last_one(opened):
    opened.type("secret")
    opened.wait(lambda: opened.console.text == "secret")
    opened.console.handle_event("closed")
    assert opened.console.text == ""
    opened.console.handle_event(OPENED)
    opened.expect(BANNER_LINE, PROMPT.rstrip())
    assert "secret" not in opened.lines()[-1]
