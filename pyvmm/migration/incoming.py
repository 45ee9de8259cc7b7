"""The new image of an update, or one that goes on from a file: from the state to the running guest,
and what is told of that.

What this imports is part of the pause; what is of use only when the guest runs is imported then.
Main loop thread only.
"""

from __future__ import annotations

import os
import time

from pyvmm import wayback
from pyvmm.core import runstate
from pyvmm.cpr.handover import CLIENT, CPR, OWN, ROLLBACK
from pyvmm.errors import CommandError, PyvmmError
from pyvmm.migration import open_channel
from pyvmm.migration.status import PACKED

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from pyvmm.cpr.handover import Handover
    from pyvmm.machine.machine import Machine
    from pyvmm.migration.channel import Channel
    from pyvmm.migration.holder import Holder
    from pyvmm.migration.status import Status
    from pyvmm.migration.takeover import Takeover
    from pyvmm.vmstate.stream import Loaded


class Incoming:
    """The one load of a machine's state, if ``-incoming`` is there.

    :ivar early_events: name, data and time in ns of each event from before there were monitors to
        tell of them
    """

    def __init__(self, machine: Machine, status: Status) -> None:
        self.early_events: list[tuple[str, dict[str, Any] | None, int]] = []
        self._error: str | None = None
        self._machine = machine
        self._status = status
        # What was loaded, and from where, as long as nothing was added to it.
        self._unfinished: tuple[Channel, Loaded] | None = None
        self._holder: Holder | None = None
        # Whether an -incoming defer still waits for its URI.
        self.is_waiting = machine.config.incoming == "defer"
        handover = machine.handover
        self._is_recording = handover.is_incoming
        machine.subscribe(self._record)
        status.unpack({name: handover.parcel(OWN, name).take_state() for name in PACKED})
        self._failure = take_failure(handover)

    @property
    def holder(self) -> Holder:
        """What holds the old image's memory, and will hold this one's."""
        if self._holder is None:
            from pyvmm.migration.holder import Holder

            self._holder = Holder(self._machine)
        return self._holder

    def begin(self) -> None:
        """Load what ``-incoming`` names and let the guest go on.

        :raises PyvmmError: the state cannot be loaded; nothing runs
        """
        machine = self._machine
        if self.is_waiting:
            if wayback.is_open():
                wayback.stop_timer()
        elif machine.config.incoming:
            self._load(open_channel(machine.config.incoming))
        # Off the pause, but before the descriptors that nobody took are closed.
        self._try(self._adopt_added)

    def load(self, uri: str) -> None:
        """Load the state that ``-incoming defer`` waits for. After a failure that changed
        nothing it may be tried again.

        :raises CommandError: if nothing waits for a state
        :raises PyvmmError: the state cannot be loaded
        """
        if not self._machine.config.incoming:
            raise CommandError("'-incoming' was not specified on the command line")
        if not self.is_waiting:
            raise CommandError("The incoming migration has already been started")
        source = open_channel(uri)
        self._status.error = None
        try:
            self._load(source)
        except PyvmmError as error:
            self._status.fail(str(error))
            raise
        self.is_waiting = False
        self.finish_source()
        self._try(self.settle)

    def settle(self) -> None:
        """All is there that goes on with something: close the rest, unless a state is still waited
        for, since the way back needs it."""
        if not self.is_waiting:
            for name, index in self._machine.handover.settle():
                self._machine.warn(f"nothing wanted the inherited descriptor {name}[{index}]")

    def finish_source(self) -> None:
        """Add to the state that was loaded what only tools read, which takes some milliseconds, and
        let the source go."""
        unfinished, self._unfinished = self._unfinished, None
        if unfinished is not None:
            from pyvmm.migration import savevm

            source, loaded = unfinished
            machine = self._machine
            self._try(lambda: source.append(lambda: savevm.describe(machine, loaded)))
            self._try(lambda: source.release(machine.handover))

    def take_error(self) -> str | None:
        """Return what is wrong with an update that failed after the exec, if nobody was told."""
        error, self._error = self._error, None
        return error

    def _load(self, source: Channel) -> None:
        """The recipe, from the state to the running guest."""
        from pyvmm.migration import savevm  # a fresh start does without it

        machine, status = self._machine, self._status
        status.mark("load")
        status.enter("setup")
        status.enter("active")
        loaded = savevm.read(machine, source.read(machine.handover))
        takeover = self._find_carrier()
        if not machine.handover.is_incoming:
            savevm.settle_clocks(machine, loaded)
        state = savevm.apply(machine, loaded, with_cpus=takeover is None)
        status.mark("resume")
        if state == runstate.RUNNING and not machine.autostart:
            state = runstate.PAUSED
        # All that can fail came before (the threads were started with the machine), or is the
        # takeover. Behind the close of the way back nothing opens, allocates, starts a thread or
        # waits for more than the vCPUs' threads: the guest changes its memory from there on.
        if takeover is None:
            machine.runstate.set(state)
            state_fd = wayback.close()
            if state == runstate.RUNNING:
                self._try(machine.set_running)
        else:
            state_fd = self._take_over(takeover, state)
        status.mark("running")
        # The rest is not in the pause, and the guest does not end for want of it.
        self._try(machine.handover.release)
        self._try(machine.attach_devices)
        self._unfinished = source, loaded
        failure, status.where = self._failure
        if failure:
            self._error = f"{failure} (the guest is back in the image before)"
            status.fail(self._error)
        else:
            status.enter("completed")
        self._try(lambda: self._close_way_back(state_fd))
        self._try(self._release_memory)
        if machine.handover.is_incoming and machine.runstate.running:
            machine.loop.call_soon(self._watch_memory)

    def _find_carrier(self) -> Takeover | None:
        """Return the way from the carrier to here, if the guest runs there."""
        fd = self._machine.handover.parcel(CPR, "carrier").take()
        if fd is None:
            return None
        from pyvmm.migration.takeover import Takeover

        return Takeover(self._machine, self._status, fd)

    def _take_over(self, takeover: Takeover, state: str) -> int | None:
        """Have the guest here, in run state ``state``; close the way back, and return what
        ``wayback.close`` does."""
        # The alarm would go back in the middle; the carrier's own deadline goes on.
        if wayback.is_open():
            wayback.stop_timer()
        takeover.begin(state)
        # From here on the guest is this image's.
        state_fd = wayback.close()
        self._try(lambda: takeover.finish(self.holder))
        return state_fd

    def _close_way_back(self, state_fd: int | None) -> None:
        if state_fd is not None:
            os.close(state_fd)
        for id in ("exe", "way-back"):
            parcel = self._machine.handover.parcel(CPR, id)
            fd = parcel.take()
            if fd is not None:
                parcel.close(fd)

    def _watch_memory(self) -> None:
        def watch() -> None:
            from pyvmm.migration.refault import Refault

            Refault(self._machine, self._status)

        self._try(watch)

    def _release_memory(self) -> None:
        self.holder.release()

    def _adopt_added(self) -> None:
        """Go on with what monitors' clients added to the machine."""
        machine = self._machine
        machine.handover.keep_all(CLIENT)
        for problem in machine.chardevs.load_added():
            machine.warn(problem)

    def _record(self, name: str, data: dict[str, Any] | None) -> None:
        if self._is_recording:
            self.early_events.append((name, data, time.time_ns()))

    def end_start(self) -> None:
        """The monitors are there: say what is wrong with the update, if they told nobody."""
        self._is_recording = False
        self.early_events.clear()
        error = self.take_error()
        if error is not None:
            self._machine.warn(f"update failed: {error}")
        elif self._status.note:
            self._machine.warn(f"update: {self._status.note}")

    def _try(self, step: Callable[[], object]) -> None:
        # Whatever goes wrong with one step, the guest must run on.
        self._machine.attempt(step, "update")


def take_failure(handover: Handover) -> tuple[str, str]:
    """In an image that was executed: return, once, why it is back and the function that failed;
    empty if it is a new one."""
    why, where = wayback.take_failure()
    # Images from before version 1 of the way back's record say it there.
    told = [handover.parcel(ROLLBACK, name).take_state() for name in ("error", "where")]
    error, function = (text.decode("utf-8", "replace") for text in told)
    return (why, where) if why else (error, function)
