"""Live update: the outgoing recipe of the old image and the incoming one of the new.

cpr-exec, the plain order: the vCPUs stop, the state is written, execve replaces the program,
and the new image, with the same process id, memory and connections, loads the state and goes
on. Before the stop the new command is tried out (``preflight``), and the disks come to rest
(``quiesce``); until execve has succeeded every failure is undone; after it an image that cannot
take over executes the old one (``rollback``).

Everything here runs on the main loop thread. All that the steps between stop and exec, and
their undoing, call is imported with this module: the package on disk may be another version
by then.
"""

from __future__ import annotations

import os
import time

from pyvmm import _native, wayback
from pyvmm.core import runstate
from pyvmm.errors import CommandError, ConfigError, MigrationError, PyvmmError
from pyvmm.migration import params, rollback, savevm
from pyvmm.migration.progress import Progress
from pyvmm.migration.target import MemoryTarget, Target, parse
from pyvmm.vmstate.stream import MAX_BLOCKS

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, Protocol

    from pyvmm.machine.machine import Machine
    from pyvmm.migration.preflight import Probe
    from pyvmm.migration.quiesce import Quiesce

    class Passenger(Protocol):
        """What has host-side state to carry over an exec beside the chardevs: a monitor."""

        def quiesce(self) -> None:
            """The exec is about to come."""

        def restart(self) -> None:
            """It did not come: go on."""

        def save_state(self) -> bytes:
            """What the new image has to know."""

    Done = Callable[[str | None], None]

HOLDER_FD = "cpr/holder"
ADDED = "chardev-added/"  # begins the names of chardevs that no command line has
CLIENT_FDS = "client-fd/"  # begins the names of what monitors' clients handed over
NOTE = "note"  # what made the update slower than it should be, as a CPR value
REAP_INTERVAL_S = 0.05
# All has come to rest before the vCPUs stop. This is for a thread that looks at its queue, and
# for what a driver can still begin (a flush), which must not be waited for in the pause.
DRAIN_S = 0.1
_WALL = 0x40000000  # waitpid(2): children of clone that send no signal, too


class Migration:
    """The migrations of one machine.

    :param machine: the machine
    :param carried: host-side values from the image before; empty if there was none
    """

    def __init__(self, machine: Machine, carried: dict[str, bytes]) -> None:
        self.machine = machine
        self.carried = carried
        self.parameters = params.parameters()
        self.capabilities = params.capabilities()
        self.progress = Progress()
        self.progress.note = carried.pop(NOTE, b"").decode("utf-8", "replace")
        self.passengers: dict[str, Passenger] = {}
        #: Events (name, data, time in ns) from before there were monitors to tell of them.
        self.missed: list[tuple[str, dict[str, Any] | None, int]] = []
        #: What is wrong with an update that failed after the exec, until somebody was told.
        self.untold: str | None = None
        self._recording = bool(carried)
        for name in carried.pop("capabilities", b"").decode("ascii", "replace").split():
            if name in params.SUPPORTED:
                self.capabilities.update({name: True})
        machine.subscribe(self._record)
        self._done: Done | None = None
        self._probe: Probe | None = None
        self._quiesce: Quiesce | None = None
        self.progress.quiesced_at = carried.pop("quiesced", b"")
        # Whether an -incoming defer still waits for its URI.
        self._deferred = machine.config.incoming == "defer"
        self._holders = machine.fds.take_all(HOLDER_FD)
        # Those of earlier updates, if one came before they were waited for.
        pids = carried.pop("holders", b"")
        self._ended = [int.from_bytes(pids[at : at + 4]) for at in range(0, len(pids), 4)]
        # What the way back needs, until it is given up.
        taken = (machine.fds.take(name) for name in (rollback.EXE_FD, rollback.RECORD_FD))
        self._way_back_fds = [fd for fd in taken if fd is not None]
        self._failure = rollback.failure(carried)
        blockers = self.blockers() if machine.config.only_migratable else []
        if blockers:
            raise ConfigError(f"-only-migratable: {blockers[0]}")

    @property
    def status(self) -> str | None:
        """QEMU's MigrationStatus, None before the first migration."""
        return self.progress.status

    @property
    def error(self) -> str | None:
        """Why the last migration failed."""
        return self.progress.error

    def info(self) -> dict[str, Any]:
        """What query-migrate returns."""
        result = self.progress.info()
        reasons = self.blockers()
        if reasons:
            result["blocked-reasons"] = reasons
        return result

    def blockers(self) -> list[str]:
        """What keeps this machine from being updated, whatever the command."""
        count = len(self.machine.ram_blocks)
        too_many = [
            f"{count} blocks of memory, of which a state names {MAX_BLOCKS}; leave out an -object"
        ]
        unfinished = [
            f"vCPU {cpu.index} is in the middle of an access to memory that the host cannot back;"
            " mend that and cont first"
            for cpu in self.machine.cpus
            if cpu.is_unfinished
        ]
        private = [
            f"Memory region {backend.id} is not compatible with CPR: it is private to this "
            "process; share=on is required for -object, and -machine anon-alloc=memfd"
            for backend in self.machine.ram_blocks
            if not backend.is_shared or backend.fd is None
        ]
        return (too_many if count > MAX_BLOCKS else []) + unfinished + private

    # ---- outgoing --------------------------------------------------------------------------

    def start(self, uri: str, detach: bool, done: Done) -> None:
        """``migrate``: begin an update with the command that the parameters name.

        :param detach: whether the caller waits for ``done``; it makes no difference here
        :param done: called with an error text if the update fails after this returned, None
            if it was cancelled; after a success there is nobody left to call
        :raises MigrationError: refused
        """
        target = parse(uri)
        self._refuse_if_busy()
        mode = self.parameters.get("mode")
        if mode != "cpr-exec":
            raise MigrationError(
                f"mode {mode} is not supported; use migrate_set_parameter mode cpr-exec"
            )
        argv = self.parameters.get("cpr-exec-command")
        if not argv:
            raise MigrationError("cpr-exec mode requires setting cpr-exec-command")
        self._begin(argv, target, done)

    def update(self, command: list[str] | None, done: Done) -> None:
        """``update``: begin an update with this process's own command line, or another one,
        and the state in memory.

        :param command: a ``pyvmm run`` command; -incoming is added
        :param done: as for :meth:`start`
        :raises MigrationError: refused
        """
        self._refuse_if_busy()
        target = MemoryTarget()
        argv = rollback.own_command(target.text)
        if command:
            argv = [*command, "-incoming", target.text]
        self._begin(argv, target, done)

    @property
    def waiting(self) -> bool:
        """Whether ``-incoming defer`` still waits for its URI."""
        return self._deferred

    def cancel(self) -> None:
        """Give up an update that has not stopped the guest yet."""
        if self.progress.status == "setup":
            self._set_status("cancelling")
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

    def _refuse_if_busy(self) -> None:
        if self.progress.active:
            raise MigrationError("There's a migration process in progress")
        if self.machine.runstate.state == runstate.INMIGRATE:
            raise MigrationError("Guest is waiting for an incoming migration")

    def _begin(self, argv: list[str], target: Target, done: Done) -> None:
        for reason in self.blockers():
            raise MigrationError(reason)
        try:
            from pyvmm.migration import preflight, program, quiesce
        except (ImportError, OSError) as error:
            problem = getattr(error, "strerror", None) or error
            raise MigrationError(f"The preflight cannot be made: {problem}") from None
        preflight.check_descriptors(self.machine.fds)
        if any("\0" in word for word in argv):
            raise MigrationError("A word of a command cannot contain NUL")
        path = program.find(argv[0])
        target.prepare()
        self.progress.begin()
        own = preflight.describe(self.machine.config)

        def probed(result: dict[str, Any] | MigrationError) -> None:
            self._probe = None
            try:
                if isinstance(result, MigrationError):
                    raise result
                preflight.compare(own, result, target)
                preflight.check_descriptors(self.machine.fds)
            except Exception as error:
                # Another program's answer may be of any form, and the guest runs.
                end(error)
                return
            if self.progress.status == "cancelling":
                end(None)
                return
            self.progress.mark("quiesce")
            self._quiesce = quiesce.Quiesce(self.machine, quiesced)

        def quiesced(error: MigrationError | None) -> None:
            if error is None:
                self._update(argv, path, target)
            else:
                self._quiesce = None
                end(error)

        def end(error: Exception | None) -> None:
            target.discard(self.machine.fds)
            if error is None or self.progress.status == "cancelling":
                self._set_status("cancelled")
                self._tell(None)
            else:
                self._fail(_explain(error))

        try:
            kept = self.machine.fds.kept().values()
            self._probe = preflight.Probe(self.machine.loop, path, argv, kept, probed)
        except MigrationError:
            target.discard(self.machine.fds)
            raise
        self._done = done
        self._set_status("setup")

    def _update(self, argv: list[str], path: str, target: Target) -> None:
        """The recipe, from the running guest to the exec."""
        machine, progress, fds = self.machine, self.progress, self.machine.fds
        before = machine.runstate.state
        undo: list[Callable[[], None]] = []
        if self._quiesce is not None:
            undo.append(self._quiesce.undo)
        try:
            # Terminals are made ready while the guest still runs.
            for passenger in self.passengers.values():
                undo.append(passenger.restart)
                passenger.quiesce()
            # A file may be loaded when the host has been started again.
            boot_id = () if isinstance(target, MemoryTarget) else (savevm.read_boot_id(),)
            progress.mark("stop")
            undo.append(lambda: self._restart_guest(before))
            self._stop_guest(before)
            self._set_status("active")
            if self.capabilities.get("events"):
                # QEMU's number for the pass over memory after the guest has stopped.
                machine.emit("MIGRATION_PASS", {"pass": 2})
            self._set_status("device")
            progress.mark("save")
            undo.append(lambda: target.discard(fds))
            state = savevm.save(machine, before, *boot_id)
            target.write(state, fds)
            if not isinstance(target, MemoryTarget):
                # The way back does not depend on a file that others can reach.
                copy = MemoryTarget()
                undo.append(lambda: copy.discard(fds))
                copy.write(state, fds)
            undo.append(self._hold_memory())
            # In QEMU's order: the outgoing side is done. If the exec fails, "failed" follows.
            self._set_status("completed")
            progress.mark("exec")
            undo.append(lambda: rollback.disarm(fds))
            rollback.arm(fds)
            if machine.signalled:
                raise MigrationError(f"Signal {machine.signalled} ends the VMM")
            cpr_fd, environment = rollback.publish(fds, self._values(), MemoryTarget.text)
            undo.append(lambda: os.close(cpr_fd))
            os.set_inheritable(cpr_fd, True)
            # The very last act: a helper forked earlier must not inherit guest memory.
            undo.append(lambda: fds.set_inheritable(False))
            fds.set_inheritable(True)
            try:
                os.execve(path, argv, os.environ | environment)
            except OSError as error:
                raise MigrationError(f"execve {path} failed: {error.strerror}") from None
        except Exception as error:
            text = _explain(error)
            self._note_failure(text)
            while undo:
                self._try(undo.pop())
            self._tell(text)

    def _try(self, step: Callable[[], None]) -> None:
        # Whatever goes wrong with one step, the guest must run on.
        self.machine.attempt(step, "update")

    def _stop_guest(self, before: str) -> None:
        # What the guest asked for in its last moments (a reset, its end) is acted on first.
        machine = self.machine
        machine.pause_cpus(DRAIN_S)
        while machine.end.has_requests and not machine.ended:
            machine.end.serve()
            machine.pause_cpus(DRAIN_S)
        for reason in self.blockers():
            raise MigrationError(reason)
        if machine.runstate.state != before or machine.ended:
            raise MigrationError(f"The guest ended in the meantime ({machine.runstate.state})")
        machine.runstate.set(runstate.FINISH_MIGRATE)
        if before == runstate.RUNNING:
            machine.emit("STOP", None)

    def _restart_guest(self, before: str) -> None:
        machine = self.machine
        if machine.runstate.state != runstate.FINISH_MIGRATE:
            # It did not get as far, or the guest ended by itself.
            if machine.runstate.running and not machine.ended:
                machine.resume_cpus()
        elif before == runstate.RUNNING:
            machine.set_running()
        else:
            machine.runstate.set(before)

    def _hold_memory(self) -> Callable[[], None]:
        """Keep the old address space and the VM alive beyond the exec, so that taking them
        apart is not part of the pause; how to undo it."""
        machine = self.machine
        read_fd, write_fd = os.pipe2(os.O_CLOEXEC)
        vm_fds = [machine.platform.vm.fd, *(cpu.vcpu.fd for cpu in machine.cpus)]
        try:
            pid = _native.hold_memory(vm_fds, read_fd)
        except PyvmmError as error:
            # The host allows no further process. The update takes longer, that is all; the
            # new image says so, once the guest runs.
            pid = 0
            self.progress.note = f"the old memory was taken apart in the pause ({error})"
        os.close(read_fd)
        if pid:
            machine.fds.keep(HOLDER_FD, write_fd, pid)

        def undo() -> None:
            machine.fds.forget(HOLDER_FD, pid)
            os.close(write_fd)
            if pid:
                os.waitpid(pid, _WALL)

        return undo

    def _values(self) -> dict[str, bytes]:
        chardevs = self.machine.chardevs.save_state()
        netdevs = self.machine.netdevs.save_state() if self.machine.netdevs else {}
        monitors = {id: passenger.save_state() for id, passenger in self.passengers.items()}
        return {
            "progress": self.progress.pack(),
            "quiesced": self.progress.quiesced_at,
            "capabilities": " ".join(
                name for name in self.capabilities.names() if self.capabilities.get(name)
            ).encode(),
            **({NOTE: self.progress.note.encode()} if self.progress.note else {}),
            "holders": b"".join(pid.to_bytes(4) for pid in self._ended),
            **{f"chardev/{id}": value for id, value in chardevs.items()},
            **{f"netdev/{id}": value for id, value in netdevs.items()},
            **{f"monitor/{id}": value for id, value in monitors.items()},
            **self.machine.kernel.save_state(),
            **{f"{ADDED}{id}": value for id, value in self.machine.chardevs.save_added().items()},
        }

    def _fail(self, error: str) -> None:
        self._note_failure(error)
        self._tell(error)

    def _note_failure(self, error: str) -> None:
        self.progress.error = error
        self._set_status("failed")

    def _tell(self, error: str | None) -> None:
        done, self._done = self._done, None
        if done is not None:
            done(error)

    # ---- incoming --------------------------------------------------------------------------

    def begin(self) -> None:
        """In a new image: load what ``-incoming`` names and let the guest go on.

        :raises PyvmmError: the state cannot be loaded; nothing runs
        """
        if self._deferred:
            if wayback.is_open():
                wayback.stop_timer()
        elif self.machine.config.incoming:
            self._load(parse(self.machine.config.incoming))
        # Off the pause, but before the descriptors that nobody took are closed.
        self._try(self._adopt_added)
        self.machine.loop.call_soon(self._end_start)

    def incoming(self, uri: str) -> None:
        """Load the state that ``-incoming defer`` waits for. After a failure that changed
        nothing it may be tried again.

        :raises CommandError: if nothing waits for a state
        :raises PyvmmError: the state cannot be loaded
        """
        if not self.machine.config.incoming:
            raise CommandError("'-incoming' was not specified on the command line")
        if not self._deferred:
            raise CommandError("The incoming migration has already been started")
        source = parse(uri)
        self.progress.error = None
        try:
            self._load(source)
        except PyvmmError as error:
            self._note_failure(str(error))
            raise
        self._deferred = False

    def _load(self, source: Target) -> None:
        """The recipe of the new image, from the state to the running guest."""
        machine, progress = self.machine, self.progress
        progress.unpack(self.carried.pop("progress", b""))
        progress.mark("load")
        self._set_status("setup")
        self._set_status("active")
        loaded = savevm.read(machine, source.read(machine.fds))
        if not machine.fds.is_incoming:
            savevm.settle_clocks(machine, loaded)
        state = savevm.apply(machine, loaded)
        progress.mark("resume")
        if state == runstate.RUNNING and not machine.autostart:
            state = runstate.PAUSED
        machine.runstate.set(state)
        # All that can fail came before (the threads were started with the machine). Behind the
        # next line nothing opens, allocates, starts a thread or waits: the guest changes its
        # memory from there on.
        state_fd = wayback.close()
        if state == runstate.RUNNING:
            self._try(lambda: machine.set_running())
        progress.mark("running")
        if state_fd is not None:
            self._way_back_fds.append(state_fd)
        # The rest is not in the pause, and the guest does not end for want of it.
        self._try(machine.attach_devices)
        self._try(lambda: source.append(lambda: savevm.describe(machine, loaded)))
        self._try(lambda: source.release(machine.fds))
        failure, progress.where = self._failure
        if failure:
            self.untold = f"{failure} (the guest is back in the image before)"
            self._fail(self.untold)
        else:
            self._set_status("completed")
        self._try(self._release_memory)

    def _adopt_added(self) -> None:
        """Go on with what monitors' clients added to the machine."""
        machine = self.machine
        machine.fds.keep_all(CLIENT_FDS)
        added = [name for name in self.carried if name.startswith(ADDED)]
        for problem in machine.chardevs.load_added({n: self.carried.pop(n) for n in added}):
            machine.warn(problem)

    def _record(self, name: str, data: dict[str, Any] | None) -> None:
        if self._recording:
            self.missed.append((name, data, time.time_ns()))

    def _end_start(self) -> None:
        # The monitors are there by now.
        self._recording = False
        self.missed.clear()
        if self.untold is not None:
            self.machine.warn(f"update failed: {self.untold}")
            self.untold = None
        elif self.progress.note:
            self.machine.warn(f"update: {self.progress.note}")

    def _release_memory(self) -> None:
        while self._way_back_fds:
            os.close(self._way_back_fds.pop())
        for pid, fd in self._holders.items():
            os.close(fd)
            self._ended.append(pid)
        self._holders.clear()
        self._reap()

    def _reap(self) -> None:
        for pid in list(self._ended):
            try:
                if not os.waitpid(pid, _WALL | os.WNOHANG)[0]:
                    continue
            except ChildProcessError:
                pass
            self._ended.remove(pid)
        if self._ended:
            self.machine.loop.call_later(REAP_INTERVAL_S, self._reap)

    def _set_status(self, status: str) -> None:
        self.progress.status = status
        if self.capabilities.get("events"):
            failure = self.progress.failure() if status == "failed" else {}
            self.machine.emit("MIGRATION", {"status": status, **failure})


def _explain(error: Exception) -> str:
    if isinstance(error, PyvmmError):
        return str(error)
    return f"{type(error).__name__}: {error}"
