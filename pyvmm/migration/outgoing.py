"""The old image of an update: from the running guest to execve.

Before the stop the new command is tried out (``preflight``), and the disks come to rest
(``quiesce``); until execve has succeeded every failure is undone; after it an image that cannot
take over executes the old one (``rollback``).

Everything here runs on the main loop thread. All that the steps between stop and exec, and
their undoing, call is imported with this module, once the guest runs: the package on disk may be
another version when the update comes.
"""

from __future__ import annotations

from pyvmm.cpr.handover import OWN
from pyvmm.errors import MigrationError, PyvmmError
from pyvmm.kvm.trial import Trial

# The channel to a file is of use to ``open_channel``.
from pyvmm.migration import file_channel, preflight, program, rollback, savevm  # noqa: F401
from pyvmm.migration.channel import MemoryChannel
from pyvmm.migration.cpr_exec import CprExec
from pyvmm.migration.quiesce import Quiesce
from pyvmm.migration.running_exec import FallBack, RunningExec

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from pyvmm.machine.machine import Machine
    from pyvmm.migration.channel import Channel
    from pyvmm.migration.holder import Holder
    from pyvmm.migration.status import Status

    Done = Callable[[str | None], None]

#: How long the trial of the kernel may take beside the preflight, which takes longer.
TRIAL_TIMEOUT_S = 2.0
#: A plain update's pause, or so: if a vCPU's move takes longer, nothing is gained by it.
LONGEST_MOVE_MS = 30.0


class Answer:
    """What the new image's answer to the preflight says of the way to it.

    :ivar former: it knows sections by their former names only
    :ivar plain: why the guest cannot run through the exec; empty if it can

    :param kernel: why this kernel does not let it
    """

    def __init__(self, answer: dict[str, Any], kernel: str) -> None:
        self.former = not preflight.reads_places(answer)
        self.plain = preflight.explain_plain(answer) or kernel


class Outgoing:
    """The updates of one machine to a next image, one at a time."""

    def __init__(self, machine: Machine, status: Status, holder: Holder) -> None:
        self._machine = machine
        self._status = status
        self._holder = holder
        self._done: Done | None = None
        self._wants_running = True
        self._trial: Trial | None = None
        # What a trial of the kernel has found; None before the first. One serves all images: the
        # kernel stays, and the guest feels what is done beside the probe.
        self._kernel: str | None = "" if status.kernel_lets else None
        self._probe: preflight.Probe | None = None
        self._quiesce: Quiesce | None = None

    def begin(
        self, argv: list[str] | None, channel: Channel, done: Done, *, running: bool = True
    ) -> None:
        """Begin an update.

        :param argv: the next image's command; None for that of this one
        :param channel: where the state goes
        :param done: called with an error text if the update fails after this returned, None
            if it was cancelled; after a success there is nobody left to call
        :param running: whether the guest shall run through the exec, if it can
        :raises MigrationError: refused
        """
        machine, status = self._machine, self._status
        argv = argv or rollback.own_command(channel.text)
        preflight.check_descriptors(machine.handover)
        if any("\0" in word for word in argv):
            raise MigrationError("A word of a command cannot contain NUL")
        path = program.find(argv[0])
        channel.prepare()
        status.begin()
        own = preflight.describe(machine.config)

        def probed(result: dict[str, Any] | MigrationError) -> None:
            self._probe = None
            kernel = self._judge_kernel()
            try:
                if isinstance(result, MigrationError):
                    raise result
                preflight.compare(own, result, channel, savevm.used(machine))
                preflight.check_descriptors(machine.handover)
                answer = Answer(result, kernel)
            except Exception as error:
                # Another program's answer may be of any form, and the guest runs.
                end(error)
                return
            if status.state == "cancelling":
                end(None)
                return
            status.mark("quiesce")
            self._quiesce = Quiesce(machine, lambda error: quiesced(error, answer))

        def quiesced(error: MigrationError | None, answer: Answer) -> None:
            if error is None:
                self._update(argv, path, channel, answer)
            else:
                self._quiesce = None
                end(error)

        def end(error: Exception | None) -> None:
            channel.discard(machine.handover)
            if error is None or status.state == "cancelling":
                status.enter("cancelled")
                self._tell(None)
            else:
                status.fail(_explain(error))
                self._tell(status.error)

        try:
            kept = machine.handover.kept().values()
            self._probe = preflight.Probe(machine.loop, path, argv, kept, probed)
        except MigrationError:
            channel.discard(machine.handover)
            raise
        if machine.upkeep is not None:
            machine.upkeep.quiesce()
        self._done = done
        self._wants_running = running
        if running and self._kernel is None:
            self._trial = Trial(machine.platform.system)
        status.enter("setup")

    def cancel(self) -> None:
        """Give up an update that has not stopped the guest yet."""
        if self._status.state == "setup":
            self._status.enter("cancelling")
            if self._probe is not None:
                self._probe.cancel()
            elif self._quiesce is not None:
                self._quiesce.cancel()

    def close(self) -> None:
        """The VM ends: a probe that still runs has nobody to answer."""
        if self._probe is not None:
            self._probe.cancel()
        if self._quiesce is not None:
            self._quiesce.close()
        self._judge_kernel(0)

    def _judge_kernel(self, timeout_s: float = TRIAL_TIMEOUT_S) -> str:
        """Return why this kernel does not let the guest run through an exec, or empty."""
        trial, self._trial = self._trial, None
        if trial is not None:
            self._kernel = trial.end(timeout_s)
            if not self._kernel and trial.move_ms > LONGEST_MOVE_MS:
                self._kernel = (
                    f"on this kernel (before Linux 6.13) a vCPU takes {trial.move_ms:.0f} ms from"
                    " one task to another"
                )
            self._status.kernel_lets = not self._kernel
        return self._kernel or ""

    def _update(self, argv: list[str], path: str, channel: Channel, answer: Answer) -> None:
        """From the running guest to the exec, the guest running if it can."""
        machine, status = self._machine, self._status
        # The way back does not depend on a file that others can reach.
        channels = [channel, MemoryChannel()] if channel.is_lasting else [channel]
        undo: list[Callable[[], None]] = []
        if self._quiesce is not None:
            undo.append(self._quiesce.undo)
        status.fallback = answer.plain if self._wants_running else ""
        try:
            if not answer.plain and self._wants_running:
                try:
                    self._pass_on(RunningExec, undo, argv, path, channels, answer)
                except FallBack as reason:
                    self._unwind(undo, keep=int(self._quiesce is not None))
                    status.fallback = str(reason)
            self._pass_on(CprExec, undo, argv, path, channels, answer)
        except Exception as error:
            text = _explain(error)
            status.fail(text)
            self._unwind(undo)
            for each in channels:
                each.discard(machine.handover)
            self._tell(text)

    def _pass_on(
        self,
        kind: type[CprExec],
        undo: list[Callable[[], None]],
        argv: list[str],
        path: str,
        channels: list[Channel],
        answer: Answer,
    ) -> None:
        """The recipe; return only by an exception."""
        machine, status, handover = self._machine, self._status, self._machine.handover
        before = machine.runstate.state
        way = kind(machine, status, self._holder, before, undo)
        status.running = way.is_running
        # Terminals are made ready while the guest still runs.
        for passenger in handover.passengers.values():
            undo.append(passenger.restart)
            passenger.quiesce()
        for channel in channels:
            channel.reserve(handover)
        state_fd = None
        undo.append(lambda: rollback.close(handover, state_fd))
        state_fd = rollback.prepare(handover)
        way.prepare(state_fd)
        # A file may be loaded when the host has been started again.
        boot_id = (savevm.read_boot_id(),) if channels[0].is_lasting else ()
        status.mark("stop")
        way.stop_guest()
        status.enter("active")
        # QEMU's number for the pass over memory after the guest has stopped.
        status.emit("MIGRATION_PASS", {"pass": 2})
        status.enter("device")
        status.mark("save")
        state = savevm.save(
            machine, before, *boot_id, former=answer.former, with_cpus=not way.is_running
        )
        for channel in channels:
            channel.write(state, handover)
        way.hold_memory()
        # In QEMU's order: the outgoing side is done. If the exec fails, "failed" follows.
        status.enter("completed")
        status.mark("exec")
        self._give_status()
        way.execute(path, argv)

    def _unwind(self, undo: list[Callable[[], None]], keep: int = 0) -> None:
        while len(undo) > keep:
            # Whatever goes wrong with one step, the guest must run on.
            self._machine.attempt(undo.pop(), "update")

    def _give_status(self) -> None:
        for name, state in self._status.pack().items():
            self._machine.handover.parcel(OWN, name).give(state)

    def _tell(self, error: str | None) -> None:
        if self._machine.upkeep is not None:
            self._machine.upkeep.unquiesce()
        done, self._done = self._done, None
        if done is not None:
            done(error)


def _explain(error: Exception) -> str:
    if isinstance(error, PyvmmError):
        return str(error)
    return f"{type(error).__name__}: {error}"
