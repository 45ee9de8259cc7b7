"""Live update: the outgoing recipe of the old image and the incoming one of the new.

cpr-exec, the plain order: the vCPUs stop, the state is written, execve replaces the program,
and the new image, with the same process id, memory and connections, loads the state and goes
on. Until execve has succeeded every failure leaves the guest as it was: what is checked
beforehand is refused while it runs, and whatever fails later is undone.

Everything here runs on the main loop thread. All that the steps between stop and exec, and
their undoing, call is imported with this module: the package on disk may be another version
by then.
"""

from __future__ import annotations

import os

from pyvmm import _native
from pyvmm.core import runstate
from pyvmm.cpr import state as cpr_state
from pyvmm.errors import CommandError, MigrationError, PyvmmError
from pyvmm.migration import command, params, savevm
from pyvmm.migration.progress import Progress
from pyvmm.migration.uri import FileUri

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, Protocol

    from pyvmm.machine.machine import Machine

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
REAP_INTERVAL_S = 0.05
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
        self.passengers: dict[str, Passenger] = {}
        self._done: Done | None = None
        # Whether an -incoming defer still waits for its URI.
        self._deferred = machine.config.incoming == "defer"

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
        return self.progress.info()

    # ---- outgoing --------------------------------------------------------------------------

    def start(self, uri: str, detach: bool, done: Done) -> None:
        """Check everything and let the main loop begin the update.

        :param detach: whether the caller waits for ``done``; it makes no difference here
        :param done: called with an error text if the update fails after this returned; after
            a success there is nobody left to call
        :raises MigrationError: refused, the guest has not been stopped
        """
        if self.progress.active:
            raise MigrationError("There's a migration process in progress")
        if self.machine.runstate.state == runstate.INMIGRATE:
            raise MigrationError("Guest is waiting for an incoming migration")
        target = FileUri(uri)
        argv, program = self._check(target)
        self.progress.begin()
        state_fd = target.open_write()
        self._done = done
        self._set_status("setup")
        self.machine.loop.call_soon(lambda: self._update(argv, program, target, state_fd))

    def cancel(self) -> None:
        """Give up an update that has not stopped the guest yet."""
        if self.progress.status == "setup":
            self._set_status("cancelled")

    def _check(self, uri: FileUri) -> tuple[list[str], str]:
        mode = self.parameters.get("mode")
        if mode != "cpr-exec":
            raise MigrationError(
                f"mode {mode} is not supported; use migrate_set_parameter mode cpr-exec"
            )
        argv = self.parameters.get("cpr-exec-command")
        if not argv:
            raise MigrationError("cpr-exec mode requires setting cpr-exec-command")
        for backend in self.machine.backends:
            if not backend.is_shared or backend.fd is None:
                raise MigrationError(
                    f"Memory region {backend.id} is not compatible with CPR: it is private to "
                    "this process; share=on is required for -object, and -machine "
                    "anon-alloc=memfd"
                )
        program = command.find_program(argv[0])
        command.check(argv, self.machine.config, uri)
        return argv, program

    def _update(self, argv: list[str], program: str, uri: FileUri, state_fd: int) -> None:
        """The recipe, from the running guest to the exec."""
        machine, progress = self.machine, self.progress
        if progress.status == "cancelled":
            os.close(state_fd)
            self._finish(None)
            return
        before = machine.runstate.state
        undo: list[Callable[[], None]] = [lambda: os.close(state_fd)]
        try:
            progress.mark("stop")
            if not self._stop_guest(before):
                raise MigrationError(f"The guest ended ({machine.runstate.state}) meanwhile")
            undo.append(lambda: self._restart_guest(before))
            self._set_status("device")
            data = savevm.save(machine, before)
            uri.write(state_fd, data)
            progress.mark("save")
            for passenger in self.passengers.values():
                passenger.quiesce()
                undo.append(passenger.restart)
            undo.append(self._hold_memory())
            progress.mark("exec")
            cpr_fd = cpr_state.publish(machine.fds, self._values())
            undo.append(lambda: os.close(cpr_fd))
            os.set_inheritable(cpr_fd, True)
            # The very last act: a helper forked earlier must not inherit guest memory.
            machine.fds.set_inheritable(True)
            undo.append(lambda: machine.fds.set_inheritable(False))
            os.execve(program, argv, os.environ | {cpr_state.ENVIRONMENT: str(cpr_fd)})
        except Exception as error:
            while undo:
                undo.pop()()
            self._finish(_explain(error, program))

    def _stop_guest(self, before: str) -> bool:
        # What the guest asked for in its last moments (a reset, its end) is acted on first.
        machine = self.machine
        machine.pause_cpus()
        while machine.has_requests:
            machine.serve_requests()
            machine.pause_cpus()
        if machine.runstate.state != before or machine.loop.stopping:
            return False
        machine.runstate.set(runstate.FINISH_MIGRATE)
        if before == runstate.RUNNING:
            machine.emit("STOP", None)
        return True

    def _restart_guest(self, before: str) -> None:
        machine = self.machine
        if before == runstate.RUNNING:
            machine.resume(before)
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
        except PyvmmError:
            # The host allows no further process. The update takes longer, that is all.
            pid = 0
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
        return {
            "progress": self.progress.pack(),
            **{f"chardev/{id}": value for id, value in chardevs.items()},
            **{
                f"monitor/{id}": passenger.save_state() for id, passenger in self.passengers.items()
            },
        }

    def _finish(self, error: str | None) -> None:
        if error is not None:
            self.progress.error = error
            self._set_status("failed")
            self.machine.warn(error)
        done, self._done = self._done, None
        if done is not None:
            done(error)

    # ---- incoming --------------------------------------------------------------------------

    def begin(self) -> None:
        """In a new image: load what ``-incoming`` names and let the guest go on.

        :raises PyvmmError: the state cannot be loaded; nothing runs
        """
        incoming = self.machine.config.incoming
        if incoming and not self._deferred:
            self._load(FileUri(incoming))

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
        self._load(FileUri(uri))
        self._deferred = False

    def _load(self, uri: FileUri) -> None:
        """The recipe of the new image, from the state to the running guest."""
        machine, progress = self.machine, self.progress
        progress.unpack(self.carried.pop("progress", b""))
        self._set_status("active")
        loaded = savevm.read(machine, uri.read())
        progress.mark("load")
        state = savevm.apply(machine, loaded)
        if state == runstate.RUNNING and not machine.autostart:
            state = runstate.PAUSED
        if state == runstate.RUNNING:
            machine.resume(state)
        else:
            machine.runstate.set(state)
        progress.mark("resume")
        # From here the guest runs; the rest is not part of the pause.
        machine.attach_devices()
        self._set_status("completed")
        self._release_memory()

    def _release_memory(self) -> None:
        for pid, fd in self.machine.fds.take_all(HOLDER_FD).items():
            os.close(fd)
            self._reap(pid)

    def _reap(self, pid: int) -> None:
        try:
            done, _ = os.waitpid(pid, _WALL | os.WNOHANG)
        except ChildProcessError:
            return
        if not done:
            self.machine.loop.call_later(REAP_INTERVAL_S, lambda: self._reap(pid))

    def _set_status(self, status: str) -> None:
        self.progress.status = status
        if self.capabilities.get("events"):
            self.machine.emit("MIGRATION", {"status": status})


def _explain(error: Exception, program: str) -> str:
    if isinstance(error, PyvmmError):
        return str(error)
    if isinstance(error, OSError):
        return f"execve {program} failed: {error.strerror}"
    return f"{type(error).__name__}: {error}"
