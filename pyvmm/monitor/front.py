"""What a VM gets once its guest runs: monitors, its entry in the run directory, and all that an
update, a reset or a fault of the host's will need to have imported. When that comes, the package on
disk may be another version, and the kernel file another, too.

It takes some tens of milliseconds, nearly all of them imports. After an update the guest's devices
need the main loop at once: so a thread imports while the loop runs, and the loop does the rest, one
step at a time. At a VM's first start all of it comes before the loop if there is a monitor, which
hears of whatever the guest does. If there is none the loop does it, step by step, and not at all
for a guest that ends at once, as a test's may.

Main loop thread, but for the imports.
"""

from __future__ import annotations

import gc

from pyvmm.core.threads import Event, report_crash, spawn
from pyvmm.errors import HostError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from pyvmm.machine.machine import Machine
    from pyvmm.migration.manager import Migration
    from pyvmm.monitor.frontend import MonitorFrontend
    from pyvmm.monitor.server import Publication
    from pyvmm.rundir import Entry

#: How long the end of a VM waits for imports that are under way.
IMPORT_TIMEOUT_S = 10.0
#: How long a guest without a monitor is left alone first.
REST_S = 0.002


class Front:
    """The front of one VM.

    :param entry: what was reserved in the run directory for a VM with a name
    """

    def __init__(self, machine: Machine, migration: Migration, entry: Entry | None) -> None:
        self._machine = machine
        self._migration = migration
        self._entry = entry
        self._monitors: list[MonitorFrontend] = []
        self._publication: Publication | None = None
        self._imported = Event()  # no import is under way
        self._imported.set()
        # Whoever gets a monitor's first answer may rely on the rest.
        self._steps: list[Callable[[], None]] = [
            self._keep_up_ram,
            self._import_ahead,
            self._migration.finish_source,
            self._publish,
            self._open_monitors,
            self._settle,
        ]

    @property
    def entry(self) -> Entry | None:
        """The VM's entry in the run directory, which the caller removes at the end."""
        return self._publication.entry if self._publication else self._entry

    def open(self) -> None:
        """Do it, or begin to: nothing that fails ends the guest."""
        machine = self._machine
        if machine.handover.is_incoming:
            machine.loop.call_later(REST_S, self._begin)
            return
        self._keep_kernel()
        if self._is_awaited:
            self._finish()
        else:
            machine.loop.call_later(REST_S, self._go_on)

    def _begin(self) -> None:
        """After an update, and after what the guest's devices had to do first of all."""
        if not self._steps:
            return
        self._keep_kernel()
        # It takes the thread that imports it for the main one, which the terminal's signals
        # depend on.
        import threading  # noqa: F401

        self._imported.clear()
        try:
            spawn(self._import, self._handle_crash)
        except HostError:
            self._imported.set()
            self._finish()  # without a thread it is done here

    def _handle_crash(self, error: BaseException) -> None:
        report_crash(error)
        self._imported.set()

    def _keep_kernel(self) -> None:
        # Files can be gone at any moment: it opens them.
        self._attempt(self._machine.kernel.keep, "there can be no reset")

    @property
    def _is_awaited(self) -> bool:
        """Whether it is needed even if the VM ends: by who is at a monitor and hears of that, or
        to take over what the image before left."""
        return bool(self._machine.monitors) or self._machine.handover.is_incoming

    def close(self) -> None:
        """The VM ends."""
        if self._steps and self._is_awaited:
            self._imported.wait(IMPORT_TIMEOUT_S)
            self._finish()
        for monitor in self._monitors:
            monitor.close()
        if self._publication is not None:
            self._publication.close()

    def _import(self) -> None:
        """On a thread of its own: import what the steps will; they tell what cannot be."""
        # In the order in which the guest feels it.
        for part in (self._import_upkeep, self._import_monitors, self._migration.import_ahead):
            try:
                part()
            except Exception:
                pass
        self._imported.set()
        self._machine.loop.call_soon(self._go_on)

    def _import_upkeep(self) -> None:
        try:
            from pyvmm.memory import upkeep  # noqa: F401
        finally:
            self._machine.loop.call_soon(self._step)

    def _import_monitors(self) -> None:
        from pyvmm.machine import cpu
        from pyvmm.monitor import attach, server  # noqa: F401

        cpu.import_ahead()
        for config, chardev in self._machine.monitors:
            attach.kind(config, chardev)

    def _finish(self) -> None:
        while self._steps:
            self._step()

    def _go_on(self) -> None:
        self._step()
        if self._steps:
            self._machine.loop.call_soon(self._go_on)

    def _step(self) -> None:
        if self._steps:
            self._machine.attempt(self._steps.pop(0), "start")

    def _keep_up_ram(self) -> None:
        self._attempt(self._machine.keep_up_ram, "guest RAM gets no huge pages")

    def _open_monitors(self) -> None:
        """Put a monitor on each chardev that is to have one."""
        machine = self._machine
        if not machine.monitors:
            return

        def attach() -> None:
            from pyvmm.monitor.attach import open_monitors

            self._monitors = open_monitors(machine, self._migration, machine.monitors)

        self._attempt(attach, "there is no monitor")

    def _publish(self) -> None:
        """Make the VM known in the run directory, or go on there for the image before."""

        def publish() -> None:
            from pyvmm.monitor.server import Publication

            self._publication = Publication(self._machine, self._migration, self._entry)

        self._attempt(publish, "'pyvmm list' does not show this VM")

    def _import_ahead(self) -> None:
        """Have each part import what it needs later."""
        from pyvmm.machine import cpu

        self._attempt(self._migration.import_ahead, "there can be no update")
        self._attempt(cpu.import_ahead, "errors of memory cannot be told")

    def _attempt(self, part: Callable[[], object], lost: str) -> None:
        # The guest runs already, perhaps for months: it does not end for want of this.
        try:
            part()
        except Exception as error:
            self._machine.warn(f"{lost}: {type(error).__name__}: {error}")

    def _settle(self) -> None:
        """All of the machine is there: close what nobody goes on with."""
        self._migration.settle()
        gc.enable()
