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
        # What is done, and what is lost if that fails. Whoever gets a monitor's first answer may
        # rely on the rest; files, which can be gone at any moment, are opened first.
        self._steps: list[tuple[Callable[[], object], str]] = [
            (machine.kernel.keep, "there can be no reset"),
            (machine.keep_up_ram, "guest RAM gets no huge pages"),
            (migration.import_ahead, "there can be no update"),
            (_import_backing, "errors of memory cannot be told"),
            (migration.finish_source, "the state in the file has no description"),
            (self._publish, "'pyvmm list' does not show this VM"),
            (self._open_monitors, "there is no monitor"),
            (self._settle, "what nobody goes on with stays open"),
        ]

    @property
    def entry(self) -> Entry | None:
        """The VM's entry in the run directory, which the caller removes at the end."""
        return self._publication.entry if self._publication else self._entry

    def open(self) -> None:
        """Do it, or begin to: nothing that fails ends the guest."""
        loop = self._machine.loop
        if self._machine.handover.is_incoming:
            loop.call_later(REST_S, self._begin)
        elif self._is_awaited:
            self._finish()
        else:
            self._step()
            loop.call_later(REST_S, self._go_on)

    def _begin(self) -> None:
        """After an update, and after what the guest's devices had to do first of all."""
        if not self._steps:
            return
        self._step()
        # It takes the thread that imports it for the main one, which the terminal's signals
        # depend on.
        import threading  # noqa: F401

        self._imported.clear()
        try:
            spawn(self._import, report_crash)
        except HostError:
            self._imported.set()
            self._finish()  # without a thread it is done here

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
        """On a thread of its own: import what the steps will, and have the first ones follow; they
        tell what cannot be imported."""
        loop, ahead = self._machine.loop, self._migration.import_ahead
        try:
            for part in (_import_upkeep, ahead, _import_backing, self._import_monitors):
                try:
                    part()
                except Exception:
                    pass
                loop.call_soon(self._step)
        finally:
            self._imported.set()
            loop.call_soon(self._go_on)

    def _import_monitors(self) -> None:
        from pyvmm.monitor import attach, server  # noqa: F401

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
        if not self._steps:
            return
        step, lost = self._steps.pop(0)
        try:
            step()
        except Exception as error:
            # The guest runs already, perhaps for months: it does not end for want of this.
            self._machine.warn(f"{lost}: {type(error).__name__}: {error}")

    def _open_monitors(self) -> None:
        """Put a monitor on each chardev that is to have one."""
        machine = self._machine
        if machine.monitors:
            from pyvmm.monitor.attach import open_monitors

            self._monitors = open_monitors(machine, self._migration, machine.monitors)

    def _publish(self) -> None:
        """Make the VM known in the run directory, or go on there for the image before."""
        from pyvmm.monitor.server import Publication

        self._publication = Publication(self._machine, self._migration, self._entry)

    def _settle(self) -> None:
        """All of the machine is there: close what nobody goes on with."""
        self._migration.settle()
        gc.enable()


def _import_upkeep() -> None:
    from pyvmm.memory import upkeep  # noqa: F401


def _import_backing() -> None:
    from pyvmm.machine import cpu

    cpu.import_ahead()
