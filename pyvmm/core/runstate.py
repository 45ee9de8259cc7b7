"""The run states of a machine, with QEMU's names, and which may follow which.

Changed on the main loop thread only. Observers are called after each change, in the order
in which they were added.
"""

from __future__ import annotations

from pyvmm.errors import StateError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

PRELAUNCH = "prelaunch"
INMIGRATE = "inmigrate"
RUNNING = "running"
PAUSED = "paused"
FINISH_MIGRATE = "finish-migrate"
POSTMIGRATE = "postmigrate"
SHUTDOWN = "shutdown"
GUEST_PANICKED = "guest-panicked"
INTERNAL_ERROR = "internal-error"
IO_ERROR = "io-error"

# What may come upon a guest that stands already: it asked for its end before it was stopped, or
# a thread that works for it died, or it cannot be loaded again.
_ENDS = {SHUTDOWN, GUEST_PANICKED, INTERNAL_ERROR}
_STOPPED = {RUNNING, FINISH_MIGRATE, PAUSED, PRELAUNCH, *_ENDS}

# From each state, the states that may follow. Whatever stops a guest may be followed by a
# reset (prelaunch), by cont (running), or by an update, which keeps the state it found.
TRANSITIONS: dict[str, set[str]] = {
    PRELAUNCH: {RUNNING, PAUSED, FINISH_MIGRATE, INMIGRATE, *_ENDS},
    INMIGRATE: {
        RUNNING,
        PAUSED,
        PRELAUNCH,
        SHUTDOWN,
        GUEST_PANICKED,
        INTERNAL_ERROR,
        IO_ERROR,
        POSTMIGRATE,
    },
    RUNNING: {PAUSED, FINISH_MIGRATE, SHUTDOWN, GUEST_PANICKED, INTERNAL_ERROR, IO_ERROR},
    PAUSED: {RUNNING, FINISH_MIGRATE, PRELAUNCH, POSTMIGRATE, *_ENDS},
    FINISH_MIGRATE: {
        RUNNING,
        PAUSED,
        PRELAUNCH,
        POSTMIGRATE,
        SHUTDOWN,
        GUEST_PANICKED,
        INTERNAL_ERROR,
        IO_ERROR,
    },
    POSTMIGRATE: {RUNNING, PAUSED, FINISH_MIGRATE, PRELAUNCH, *_ENDS},
    SHUTDOWN: {PAUSED, PRELAUNCH, FINISH_MIGRATE, INTERNAL_ERROR},
    GUEST_PANICKED: _STOPPED - {GUEST_PANICKED},
    INTERNAL_ERROR: {PAUSED, PRELAUNCH, FINISH_MIGRATE},
    IO_ERROR: _STOPPED,
}


class RunState:
    """The present state of one machine.

    :param state: the state to begin in
    """

    def __init__(self, state: str = PRELAUNCH) -> None:
        self.state = state
        self._observers: list[Callable[[str, str], None]] = []

    def observe(self, observer: Callable[[str, str], None]) -> None:
        """Have ``observer(old, new)`` called after every change."""
        self._observers.append(observer)

    def set(self, new: str) -> None:
        """Go to ``new``; going to the present state does nothing.

        :raises StateError: if ``new`` may not follow the present state, which stays
        """
        old = self.state
        if new == old:
            return
        if new not in TRANSITIONS[old]:
            raise StateError(f"The machine cannot go from {old} to {new}")
        self.state = new
        for observer in self._observers:
            observer(old, new)

    def allows(self, new: str) -> bool:
        """Return whether ``new`` may follow the present state."""
        return new in TRANSITIONS[self.state]

    @property
    def running(self) -> bool:
        """Whether the vCPUs may run."""
        return self.state == RUNNING

    def needs_reset(self) -> bool:
        """Return whether only a reset leads back to a running guest."""
        return self.state in (SHUTDOWN, INTERNAL_ERROR)
