"""The guest's end, and the machine's: what a guest's reset, shutdown or crash leads to
(``-action``), and what an error of KVM or of the host's memory does.

vCPUs and devices exist before the machine, and report here. A report stops the vCPUs at once, so
that no further instruction runs, and waits as a request for the main loop.
"""

from __future__ import annotations

from pyvmm._native import lib
from pyvmm._util import log
from pyvmm.core import runstate
from pyvmm.errors import RamError
from pyvmm.machine.cpu import CpuEvents

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import Any, Protocol

    from pyvmm.core.eventloop import EventLoop
    from pyvmm.core.runstate import RunState
    from pyvmm.machine.cpu import Cpu

    class Control(Protocol):
        """Runs and stops the guest: the machine."""

        cpus: list[Cpu]
        runstate: RunState

        def halt(self, state: str) -> None:
            """Stop the guest, whatever its devices are at."""

        def resume_cpus(self) -> None:
            """Let the vCPUs run on."""

        def reset_alone(self, reason: str) -> None:
            """Reset the machine, with nobody to be told by an exception."""


EXIT_FAILURE = 1

PANICKED = 1  # bit of the pvpanic port


class GuestEnd(CpuEvents):
    """Acts on what ends the guest. Main loop thread, but for the ``on_…``, ``request_…`` and
    ``report_…`` methods, which any thread may call.

    :param loop: where requests are acted on
    :param actions: ``-action``: what follows each event
    :param emit: tells of an event, with QMP's names
    :param on_end: called once, when the machine has come to its end; who owns it closes it then
    :ivar ended: whether it has
    :ivar exit_code: of the VMM, as the guest or the operator ended it
    """

    def __init__(
        self,
        loop: EventLoop,
        actions: Mapping[str, str],
        emit: Callable[[str, dict[str, Any] | None], None],
        on_end: Callable[[], None],
    ) -> None:
        self.ended = False
        self.exit_code = 0
        self._loop = loop
        self._actions = actions
        self.emit = emit
        self._on_end = on_end
        self._requests: list[Callable[[], None]] = []
        self._control: Control | None = None

    def attach(self, control: Control) -> None:
        """The machine is there: its guest may run, and come to its end."""
        self._control = control
        if self._requests:
            self._loop.call_soon(self.serve)

    @property
    def control(self) -> Control:
        """The machine. No guest runs without one."""
        assert self._control is not None
        return self._control

    # ---- what the guest does; any thread ---------------------------------------------------

    def request_reset(self) -> None:
        """The guest pulled the reset line."""
        self._stop_for(lambda: self._reset("guest-reset"))

    def request_power_off(self) -> None:
        """The guest switched itself off."""
        self._stop_for(lambda: self._shutdown("guest-shutdown"))

    def request_exit(self, exit_code: int) -> None:
        """The guest ends the VMM, with a verdict (isa-debug-exit)."""
        self._stop_for(lambda: self.quit(exit_code, "guest-shutdown"))

    def report_panic(self, event: int) -> None:
        """The guest's kernel reports its end on the pvpanic port."""
        if event & PANICKED:
            self._stop_for(self._panic)

    def on_shutdown_exit(self, index: int) -> None:
        self._stop_for(lambda: self._reset("guest-reset"))

    def on_system_event(self, index: int, kind: int) -> None:
        if kind == lib.KVM_SYSTEM_EVENT_RESET:
            self.request_reset()
        elif kind == lib.KVM_SYSTEM_EVENT_CRASH:
            self.report_panic(PANICKED)
        else:
            self.request_power_off()

    def on_thread_error(self, error: str) -> None:
        """An I/O thread has died."""
        self._stop_for(lambda: self.fail(error))

    def on_ram_error(self, error: RamError) -> None:
        """The host cannot back memory that the guest needs, directly or in a device; who needs it
        tries again when the guest goes on."""
        self._stop_for(lambda: self._ram_error(error))

    def on_cpu_error(self, index: int, error: str) -> None:
        self._stop_for(lambda: self.fail(f"vCPU {index}: {error}"))

    def _stop_for(self, request: Callable[[], None]) -> None:
        # A device's thread may die before there are vCPUs.
        for cpu in self._control.cpus if self._control is not None else ():
            cpu.request_stop()
        self._requests.append(request)
        self._loop.call_soon(self.serve)

    # ---- requests --------------------------------------------------------------------------

    def serve(self) -> None:
        """Act on what was asked for.

        The main loop does so by itself. An update does it before it saves: what waits here
        would not survive the exec.
        """
        # Each once: a request that has to wait queues itself again (:meth:`postpone`).
        for _ in range(len(self._requests)):
            if self._requests and not self.ended and self._control is not None:
                self._requests.pop(0)()

    @property
    def has_requests(self) -> bool:
        """Whether something was asked for that was not acted on yet."""
        return bool(self._requests)

    def postpone(self, request: Callable[[], None], delay_s: float) -> None:
        """Make that request, which cannot be served yet, ``delay_s`` seconds from now."""
        # It waits among the other requests, which an update serves before it saves.
        self._requests.append(request)
        self._loop.call_later(delay_s, self.serve)

    # ---- and what follows from it ----------------------------------------------------------

    def quit(self, exit_code: int = 0, reason: str = "host-qmp-quit") -> None:
        """End the machine; the first call decides the exit code."""
        if not self.ended:
            self.ended = True
            self.exit_code = exit_code
            self.emit("SHUTDOWN", {"guest": reason.startswith("guest"), "reason": reason})
            self._on_end()

    def fail(self, error: str) -> None:
        """The machine cannot go on, by an error that is not the guest's."""
        log.say(error)
        self._act("internal-error", runstate.INTERNAL_ERROR, "host-error")

    def on_io_error(self) -> None:
        """A request to the host failed, and is made again when the guest goes on. Main loop."""
        # Only a guest that runs is halted: it may be paused by now.
        if self.control.runstate.running:
            self.control.halt(runstate.IO_ERROR)

    def _reset(self, reason: str) -> None:
        if self._actions["reboot"] == "shutdown":
            self._shutdown(reason)
            return
        self.control.reset_alone(reason)

    def _shutdown(self, reason: str) -> None:
        if self._actions["shutdown"] == "pause":
            self.emit("SHUTDOWN", {"guest": True, "reason": reason})
        self._act("shutdown", runstate.SHUTDOWN, reason)

    def _panic(self) -> None:
        action = self._actions["panic"]
        shown = {"none": "run", "pause": "pause"}.get(action, "poweroff")
        self.emit("GUEST_PANICKED", {"action": shown})
        self._act("panic", runstate.GUEST_PANICKED, "guest-panic")

    def _ram_error(self, error: RamError) -> None:
        if self.control.runstate.running:
            log.say(f"{error}, then cont")
            self.control.halt(runstate.IO_ERROR)

    def _act(self, event: str, state: str, reason: str) -> None:
        """Do what ``-action`` says of *event*, which makes an end of the guest: let it go on, end
        the VMM, or leave the guest in *state*."""
        action = self._actions[event]
        if action == "none":
            if self.control.runstate.running:
                self.control.resume_cpus()
        elif action == "pause":
            self.control.halt(state)
        else:
            self.quit(EXIT_FAILURE if action == "exit-failure" else 0, reason)
