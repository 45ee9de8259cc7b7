"""Migration as monitors and the command line see it.

Old image: ``outgoing``, the recipe from the running guest to execve, imported when the guest runs.
New image: ``incoming``, the recipe from the state to the running guest. What both show is
``status``. Main loop thread only.
"""

from __future__ import annotations

from pyvmm.core import runstate
from pyvmm.errors import ConfigError, MigrationError
from pyvmm.migration import open_channel
from pyvmm.migration.incoming import Incoming
from pyvmm.migration.status import Status, blockers

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from pyvmm.machine.machine import Machine
    from pyvmm.migration.channel import Channel
    from pyvmm.migration.outgoing import Done, Outgoing
    from pyvmm.migration.params import Capabilities, Settings


class Migration:
    """The migrations of one machine.

    :param started: when this process began, CLOCK_MONOTONIC in ns
    :raises ConfigError: ``-only-migratable`` is given, and something is in the way
    """

    def __init__(self, machine: Machine, started: int = 0) -> None:
        self._machine = machine
        self._status = Status(machine.emit)
        self._incoming = Incoming(machine, self._status)
        self._outgoing: Outgoing | None = None
        self._parameters: Settings | None = None
        self._capabilities: Capabilities | None = None
        self._status.mark("start", started)
        reasons = blockers(machine) if machine.config.only_migratable else []
        if reasons:
            raise ConfigError(f"-only-migratable: {reasons[0]}")

    def begin(self) -> None:
        """In a new image: load what ``-incoming`` names and let the guest go on.

        :raises PyvmmError: the state cannot be loaded; nothing runs
        """
        self._incoming.begin()

    def finish_source(self) -> None:
        """In a new image, once the guest runs: be done with the state that was loaded."""
        self._incoming.finish_source()

    def settle(self) -> None:
        """All of the machine is there, monitors and all: close what nobody goes on with."""
        self._incoming.end_start()
        self._incoming.settle()

    def import_ahead(self) -> None:
        """Import what an update will need, once the guest runs.

        :raises Exception: it cannot be imported
        """
        self._get_outgoing()

    # ---- what monitors show and set --------------------------------------------------------

    @property
    def status(self) -> str | None:
        """QEMU's MigrationStatus, None before the first migration."""
        return self._status.state

    @property
    def waiting(self) -> bool:
        """Whether ``-incoming defer`` still waits for its URI."""
        return self._incoming.is_waiting

    def info(self) -> dict[str, Any]:
        """Return what query-migrate shows."""
        result = self._status.info()
        reasons = blockers(self._machine)
        if reasons:
            result["blocked-reasons"] = reasons
        return result

    @property
    def parameters(self) -> Settings:
        """The parameters."""
        if self._parameters is None:
            from pyvmm.migration import params

            self._parameters = params.parameters()
        return self._parameters

    @property
    def capabilities(self) -> Capabilities:
        """The capabilities."""
        if self._capabilities is None:
            from pyvmm.migration import params

            self._capabilities = params.Capabilities(self._status.capabilities)
        return self._capabilities

    @property
    def early_events(self) -> list[tuple[str, dict[str, Any] | None, int]]:
        """Events (name, data, time in ns) from before there were monitors to tell of them."""
        return self._incoming.early_events

    def take_error(self) -> str | None:
        """Return what is wrong with an update that failed after the exec, if nobody was told."""
        return self._incoming.take_error()

    # ---- what they ask for -----------------------------------------------------------------

    def start(self, uri: str, detach: bool, done: Done) -> None:
        """``migrate``: begin an update with the command that the parameters name.

        :param detach: whether the caller waits for ``done``; it makes no difference here
        :param done: as of ``Outgoing.begin``
        :raises MigrationError: refused
        """
        channel = open_channel(uri)
        self._refuse_if_busy()
        mode = self.parameters.get("mode")
        if mode != "cpr-exec":
            raise MigrationError(
                f"mode {mode} is not supported; use migrate_set_parameter mode cpr-exec"
            )
        argv = self.parameters.get("cpr-exec-command")
        if not argv:
            raise MigrationError("cpr-exec mode requires setting cpr-exec-command")
        self._begin(argv, channel, done)

    def update(self, command: list[str] | None, done: Done) -> None:
        """``update``: begin an update with this process's own command line, or another one,
        and the state in memory.

        :param command: a ``pyvmm run`` command; -incoming is added
        :param done: as of ``Outgoing.begin``
        :raises MigrationError: refused
        """
        from pyvmm.migration.channel import MemoryChannel  # which ``outgoing`` has imported

        self._refuse_if_busy()
        channel = MemoryChannel()
        self._begin([*command, "-incoming", channel.text] if command else None, channel, done)

    def cancel(self) -> None:
        """Give up an update that has not stopped the guest yet."""
        if self._outgoing is not None:
            self._outgoing.cancel()

    def incoming(self, uri: str) -> None:
        """Load the state that ``-incoming defer`` waits for. After a failure that changed
        nothing it may be tried again.

        :raises CommandError: if nothing waits for a state
        :raises PyvmmError: the state cannot be loaded
        """
        self._incoming.load(uri)

    def close(self) -> None:
        """The VM ends."""
        if self._outgoing is not None:
            self._outgoing.close()

    def _refuse_if_busy(self) -> None:
        if self._status.active:
            raise MigrationError("There's a migration process in progress")
        if self._machine.runstate.state == runstate.INMIGRATE:
            raise MigrationError("Guest is waiting for an incoming migration")

    def _begin(self, argv: list[str] | None, channel: Channel, done: Done) -> None:
        for reason in blockers(self._machine):
            raise MigrationError(reason)
        try:
            outgoing = self._get_outgoing()
        except Exception as error:
            # Whatever the package on disk has become.
            problem = getattr(error, "strerror", None) or error
            raise MigrationError(f"The preflight cannot be made: {problem}") from None
        running = self.parameters.get("cpr-exec-running")
        outgoing.begin(argv, channel, done, running=running)

    def _get_outgoing(self) -> Outgoing:
        if self._outgoing is None:
            from pyvmm.migration.outgoing import Outgoing

            self._outgoing = Outgoing(self._machine, self._status, self._incoming.holder)
        return self._outgoing
