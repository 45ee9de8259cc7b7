"""The human monitor over a byte stream, and how it lives through an update."""

import itertools

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pyvmm.chardev.base import MUX_IN, MUX_OUT, Frontend
from pyvmm.chardev.mux import MuxChardev
from pyvmm.errors import VmStateError
from pyvmm.monitor.hmp.lines import BANNER, PROMPT, LineMonitor
from pyvmm.monitor.hmp.state import MAX_LINE, MonitorState
from pyvmm.monitor.registry import Context
from pyvmm.testing.memory_chardev import MemoryChardev

HELLO = BANNER.replace("\n", "\r\n") + PROMPT


class Link:
    """A client and the monitor that it talks to."""

    def __init__(self, context, state=None, resumed=False):
        self.chardev = MemoryChardev(loop=context.machine.loop)
        self.chardev.is_inherited = resumed
        self.monitor = LineMonitor(self.chardev, context)
        if state is not None:
            self.monitor.load_state(state)
        self.chardev.attach(self.monitor)

    def say(self, data):
        self.chardev.feed(data.encode() if isinstance(data, str) else data)
        self.chardev.loop.run_once(0)
        return self.heard()

    def heard(self):
        return self.chardev.take_output().decode()

    def after_exec(self):
        """The same client, with the monitor of the new image."""
        old = self.monitor.context
        context = Context(old.machine, old.migration, old.registry)
        link = Link(context, self.monitor.save_state(), resumed=True)
        link.say(bytes(self.chardev.unread))
        return link


@pytest.fixture
def link(context):
    link = Link(context)
    assert link.heard() == HELLO
    return link


def test_lines_are_answered(link):
    assert link.say("info status\n") == f"VM status: running\r\n{PROMPT}"
    assert link.say("stop\r\n") == PROMPT
    assert link.say("info status\r") == f"VM status: paused\r\n{PROMPT}"
    assert link.say("\n") == ""  # belongs to the CR before it
    assert link.say("\n\r") == PROMPT * 2
    assert link.say("info kvm\ninfo name\n") == f"kvm support: enabled\r\n{PROMPT}\r\n{PROMPT}"


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=30)
@given(st.lists(st.integers(0, 60), max_size=4))
def test_it_does_not_matter_how_input_is_cut(context, cuts):
    text = b"info status\r\ncpu 1\nbogus\r\ncpu 0\ninfo kvm\n"
    link = Link(context)
    cuts = sorted({0, len(text), *(cut for cut in cuts if cut < len(text))})
    heard = "".join(link.say(text[a:b]) for a, b in itertools.pairwise(cuts))
    assert heard == (
        f"{HELLO}VM status: running\r\n{PROMPT}{PROMPT}unknown command: 'bogus'\r\n"
        f"{PROMPT}{PROMPT}kvm support: enabled\r\n{PROMPT}"
    )


def test_overlong_lines_are_refused(link):
    answer = link.say(b"x" * (3 * MAX_LINE) + b"\ninfo kvm\n")
    assert answer == (
        f"Error: a line has at most {MAX_LINE} bytes\r\n{PROMPT}kvm support: enabled\r\n{PROMPT}"
    )


def test_any_bytes_are_answered(link):
    link.chardev.feed(b"\xff\xfe\x00\n")
    assert link.chardev.take_output() == b"unknown command: '\xff\xfe\0'\r\n" + PROMPT.encode()
    assert link.say("info kvm\n").endswith(f"kvm support: enabled\r\n{PROMPT}")


def test_no_input_is_taken_while_a_command_is_under_way(link, context):
    assert link.say("migrate file:a\n") == ""
    assert link.say("info kvm\n") == ""
    assert bytes(link.chardev.unread) == b"info kvm\n"
    context.migration.finish("no")
    link.chardev.loop.run_once(0)
    assert link.heard() == f"Error: no\r\n{PROMPT}kvm support: enabled\r\n{PROMPT}"


def test_input_behind_a_waiting_command_is_kept(link, context):
    assert link.say("migrate file:a\ninfo kvm\n") == ""
    context.migration.finish(None)
    assert link.heard() == f"{PROMPT}kvm support: enabled\r\n{PROMPT}"


def test_the_next_client_inherits_nothing(link, context):
    link.say("migrate file:a\ninfo kvm\nhalf a li")
    link.chardev.disconnect()
    link.chardev.connect()
    assert link.heard() == HELLO
    context.migration.finish("meant for the first client")
    assert link.heard() == ""
    assert link.say("ne\n") == f"unknown command: 'ne'\r\n{PROMPT}"


def test_a_client_that_reads_slowly_gets_all(context):
    link = Link(context)
    link.heard()
    whole = link.say("help\n")
    link.chardev.make_room(10)
    first = link.say("help\n")
    assert first == whole[:10]
    link.chardev.make_room(None)
    assert first + link.heard() == whole


def test_a_half_typed_line_lives_through_an_update(link):
    assert link.say("info st") == ""
    new = link.after_exec()
    assert new.heard() == ""
    assert new.say("atus\n") == f"VM status: running\r\n{PROMPT}"


def test_the_prompt_of_the_command_that_updates_is_shown_by_the_new_image(link):
    assert link.say("migrate file:a\ninfo kvm\ninfo na") == ""
    new = link.after_exec()
    assert new.heard() == ""  # after_exec has heard it
    assert new.say("me\n") == f"\r\n{PROMPT}"


def test_owed_prompt_and_waiting_lines_come_in_order(context):
    link = Link(context)
    link.heard()
    link.say("migrate file:a\ninfo kvm\n")
    new = Link(
        Context(context.machine, context.migration, context.registry),
        link.monitor.save_state(),
        resumed=True,
    )
    assert new.heard() == f"{PROMPT}kvm support: enabled\r\n{PROMPT}"


def test_output_that_was_not_read_lives_through_an_update(context):
    link = Link(context)
    link.heard()
    link.chardev.make_room(10)
    first = link.say("info kvm\n")
    assert first == "kvm suppor"
    new = Link(context, link.monitor.save_state(), resumed=True)
    assert new.heard() == f"t: enabled\r\n{PROMPT}"


def test_a_line_end_may_be_cut_by_an_update(link):
    assert link.say("info kvm\r").endswith(PROMPT)
    new = link.after_exec()
    assert new.say("\n") == ""


def test_the_current_cpu_lives_through_an_update(link):
    link.say("cpu 1\n")
    assert link.after_exec().monitor.context.cpu_index == 1


def test_only_the_client_from_before_is_not_greeted(link):
    new = link.after_exec()
    new.chardev.disconnect()
    new.chardev.is_inherited = False
    new.chardev.connect()
    assert new.heard() == HELLO


def test_a_client_that_left_during_the_update_leaves_nothing(link, context):
    link.say("info st")
    new = Link(context, link.monitor.save_state(), resumed=False)
    assert new.heard() == HELLO
    assert new.say("\n") == PROMPT


@given(st.binary(max_size=64))
def test_impossible_state_is_refused(data):
    try:
        state = MonitorState.unpack(data)
    except VmStateError:
        return
    assert state.pack() == data


def test_state_with_another_cpu_is_refused(context):
    with pytest.raises(VmStateError, match="no CPU #7"):
        Link(context, MonitorState(cpu_index=7).pack())


def test_state_is_bounded(context):
    huge = MonitorState(line=b"x" * (MAX_LINE + 1)).pack()
    with pytest.raises(VmStateError, match="too long"):
        Link(context, huge)
    with pytest.raises(VmStateError):
        MonitorState.unpack(MonitorState(line=b"x").pack() + b"y")


def test_the_line_is_shown_again_when_the_mux_comes_back(link):
    link.say(b"info a\xffb")
    link.monitor.handle_event(MUX_OUT)
    assert link.heard() == "\r\n"
    link.monitor.handle_event(MUX_IN)
    assert link.chardev.take_output() == PROMPT.encode() + b"info a\xffb"


def test_behind_a_mux_it_greets_when_it_first_has_the_input(context):
    base = MemoryChardev(loop=context.machine.loop)
    mux = MuxChardev("mux0", base, lambda: None)
    serial, port = mux.frontend_chardev(0), mux.frontend_chardev(1)
    serial.attach(Frontend())
    monitor = LineMonitor(port, context)
    port.attach(monitor)
    base.feed(b"")
    assert base.take_output() == b""
    base.feed(b"\x01c")
    assert base.take_output().decode() == HELLO
    base.feed(b"info kvm\n")
    assert base.take_output().decode() == f"kvm support: enabled\r\n{PROMPT}"
    base.feed(b"info kvm\n\x01c")  # the mux looks for its keys first
    assert base.take_output().decode() == "\r\nkvm support: enabled\r\n"
    base.feed(b"\x01c")
    assert base.take_output().decode() == PROMPT

    # The new image, where the monitor has the focus from the start.
    base.is_inherited = True
    mux_state, state = mux.save_state(), monitor.save_state()
    mux = MuxChardev("mux0", base, lambda: None)
    mux.load_state(mux_state)
    mux.frontend_chardev(0).attach(Frontend())
    monitor = LineMonitor(mux.frontend_chardev(1), context)
    monitor.load_state(state)
    mux.frontend_chardev(1).attach(monitor)
    assert base.take_output() == b""
    base.feed(b"info kvm\n")
    assert base.take_output().decode() == f"kvm support: enabled\r\n{PROMPT}"


def test_a_simple_terminal_shows_what_is_typed(context):
    chardev = MemoryChardev(loop=context.machine.loop)
    chardev.attach(LineMonitor(chardev, context, echo=True))
    chardev.take_output()
    chardev.feed("info käx".encode())
    assert chardev.take_output().decode() == "info käx"
    chardev.feed(b"\x7f\x7f\x08\x7f")
    assert chardev.take_output() == b"\b \b" * 4
    chardev.feed(b"\x7f" * 20)
    assert chardev.take_output() == b"\b \b" * 4
    chardev.feed(b"bogus\x15info kvm\r")
    assert chardev.take_output().decode() == (
        f"bogus\r\n{PROMPT}info kvm\r\nkvm support: enabled\r\n{PROMPT}"
    )


def test_who_waited_for_an_update_that_failed_after_the_exec_is_told_once(link):
    def after_exec(link):
        return Link(link.monitor.context, link.monitor.save_state(), resumed=True)

    link.monitor.context.migration.error = "it broke"
    assert after_exec(link).heard() == ""  # this one waited for nothing
    assert link.say("migrate file:a\n") == ""
    assert after_exec(link).heard() == f"Error: it broke\r\n{PROMPT}"
    assert after_exec(link).heard() == PROMPT
