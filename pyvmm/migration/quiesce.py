"""The step of an update between the preflight and the stop: the guest runs, and what the host
has under way for it comes to its end, so that no disk is waited for in the pause.

::

    waiting ---- nothing under way, and every vCPU came by ----> standing: done(None)
       |                                                            |
       +---- the deadline passed: undo(), done(error) --> over      +---- undo() --> over
       +---- cancel(): undo(), done(error) -----------> over

From ``waiting`` on, the devices that wait for the host's storage begin no work: what the guest
asks of them is done when they go on, here or in the new image. All others work until the vCPUs
stop, since theirs never takes long. Not a state of the machine: a guest that is reset, paused,
continued or ended meanwhile is so, and the update takes it as it finds it at the stop, or finds
that it has ended. The devices stand until :meth:`Quiesce.undo` all the same.

A vCPU that is in a device's register (a driver resets a disk that hangs, a chardev's file
hangs) could not stop. So each is asked to come by, which costs it one exit; while one does not,
the others run on.

A disk that does not get done in :data:`DEADLINE_S` makes an error, not another attempt: whoever
asked for the update shall know of it, and a guest whose disks are made to stand again and again
would be worse off than with the old image.

Main loop thread only.
"""

from __future__ import annotations

import time

from pyvmm.errors import MigrationError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from pyvmm.core.eventloop import Timer
    from pyvmm.machine.machine import Machine

#: How long the guest's disks may stand. Longer than a slow disk's slowest request: a drive that
#: repairs an error has an answer after 7 s (the limit that drives for arrays have). Shorter than
#: any guest bears, whose drivers wait for 30 s and more.
DEADLINE_S = 8.0
_SHORTEST_S, _LONGEST_S = 0.001, 0.02  # between two looks

WAITING, STANDING, OVER = "waiting", "standing", "over"


class Quiesce:
    """One such step, which begins at once.

    :param done: called once, from the loop at the soonest, with None when all stand, or the
        error when they do not; not after :meth:`undo`
    """

    def __init__(self, machine: Machine, done: Callable[[MigrationError | None], None]) -> None:
        self.state = WAITING
        self._machine = machine
        self._done = done
        self._devices = [device for device in machine.devices if device.waits_for_host]
        self._missing: set[int] | None = None  # vCPUs that were asked and have not come by
        self._interval_s = _SHORTEST_S
        self._deadline = time.monotonic() + DEADLINE_S
        for device in self._devices:
            device.quiesce()
        self._timer: Timer = machine.loop.call_later(0, self._look)

    def undo(self) -> None:
        """Let the devices go on, whatever has become of it. Idempotent."""
        if self.state != OVER:
            self.state = OVER
            self._timer.cancel()
            for device in self._devices:
                device.unquiesce()

    def cancel(self) -> None:
        """Give up, if it is not over: :meth:`undo`, and ``done`` with an error."""
        self._fail("the update was cancelled")

    def recover(self) -> None:
        """One of the loop's calls failed, by a bug: the guest must have its disks back."""
        self._fail("internal error in the quiesce")

    def close(self) -> None:
        """The VM ends: do nothing any more."""
        self.state = OVER
        self._timer.cancel()

    def _fail(self, text: str) -> None:
        if self.state == WAITING:
            self.undo()
            self._done(MigrationError(text))

    def _look(self) -> None:
        if self.state != WAITING or self._machine.ended:
            return
        self._timer.cancel()
        # All are asked: the operator shall know of each that hangs.
        problems = [problem for device in self._devices if (problem := device.busy())]
        if not problems and self._missing is None:
            self._ask_cpus()
        if not problems and not self._missing:
            self.state = STANDING
            self._done(None)
        elif time.monotonic() >= self._deadline:
            problems += [f"vCPU {index} does not leave KVM_RUN" for index in self._missing or ()]
            self._fail(
                f"the host did not get done in {DEADLINE_S:.0f} s: {'; '.join(problems)}."
                " The guest was not stopped; wait for the host and try again"
            )
        else:
            self._timer = self._machine.loop.call_later(self._interval_s, self._look)
            self._interval_s = min(2 * self._interval_s, _LONGEST_S)

    def _ask_cpus(self) -> None:
        machine = self._machine
        missing = self._missing = {cpu.index for cpu in machine.cpus}

        def came(index: int) -> None:
            missing.discard(index)
            if not missing:
                machine.loop.call_soon(self._look)

        for cpu in machine.cpus:
            if not cpu.post(lambda index=cpu.index: came(index)):  # type: ignore[misc]
                missing.discard(cpu.index)
