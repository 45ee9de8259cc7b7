"""The VM's entry in the run directory: info, and monitors for any number of clients.

It is put there once the guest runs, and taken over from the image before likewise; only the
lock of a VM that was given a name is taken sooner. Each client of ``monitor.sock`` (HMP) and
``qmp.sock`` (QMP) gets a monitor of its own. Listeners, clients and lock go through a live
update with their descriptors. Main loop thread only.
"""

from __future__ import annotations

import _socket
import errno
import os
import stat
import time

from pyvmm import __version__, rundir
from pyvmm.chardev.address import UnixAddress
from pyvmm.chardev.config import ChardevConfig
from pyvmm.chardev.fdio import FdChardev, read_socket
from pyvmm.core.eventloop import READABLE
from pyvmm.cpr.handover import MONITOR, RUN
from pyvmm.errors import ConfigError
from pyvmm.machine.config import MonitorConfig
from pyvmm.monitor.attach import open_monitors

# Not when the first client comes: the package on disk may be another version by then.
from pyvmm.monitor.hmp import lines  # noqa: F401
from pyvmm.monitor.qmp import session  # noqa: F401

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from pyvmm.core.eventloop import EventLoop
    from pyvmm.cpr.handover import Handover
    from pyvmm.machine.machine import Machine
    from pyvmm.migration.manager import Migration
    from pyvmm.monitor.frontend import MonitorFrontend

MAX_CLIENTS = 32  # of one socket at a time; further ones wait in its backlog
_RETRY_S = 1.0  # after an accept that failed for want of descriptors or memory


class Publication:
    """The entry of one machine.

    :param entry: what was reserved for a VM with a name; None takes over the entry of the
        image before, or reserves one
    :raises PyvmmError: there can be no entry; the machine is as it was
    """

    def __init__(self, machine: Machine, migration: Migration, entry: rundir.Entry | None) -> None:
        lock, name = machine.handover.parcel(RUN, "lock"), machine.config.name
        lock_fd = lock.take()
        inherited = None if lock_fd is None else rundir.inherit(lock_fd)
        self.entry = entry or inherited or rundir.reserve(name or f"vm-{os.getpid()}")
        lock.keep(self.entry.lock_fd)
        if inherited and name not in ("", inherited.name):
            machine.warn(f"-name {name}: in the run directory the VM keeps the name {self.name}")
        self._servers: list[MonitorServer] = []
        try:
            self._write_info(machine, migration, inherited)
        except OSError as error:
            # A full disk, perhaps: 'pyvmm list' knows less, and that is all.
            machine.warn(f"run directory, {rundir.INFO}: {error.strerror}")
        try:
            for mode, file in (("readline", rundir.HMP_SOCKET), ("control", rundir.QMP_SOCKET)):
                address = UnixAddress(self.entry.file(file), f"run directory, {file}")
                server = MonitorServer(address, mode, machine, migration)
                server.start(keep_listener=inherited is not None)
                self._servers.append(server)
        except (ConfigError, OSError) as error:
            machine.warn(str(error))

    @property
    def name(self) -> str:
        """The name that the VM is found by."""
        return self.entry.name

    def close(self) -> None:
        """The VM ends: clients are sent away. The caller removes the entry."""
        for server in self._servers:
            server.close()

    def _write_info(
        self, machine: Machine, migration: Migration, inherited: rundir.Entry | None
    ) -> None:
        old = rundir.read_info(inherited.path) if inherited else {}
        updated = inherited is not None and migration.status != "failed"
        self.entry.write_info(
            {
                "pid": os.getpid(),
                "memory": machine.config.memory_size,
                "smp": machine.config.smp,
                "started": old.get("started", time.monotonic_ns() // 1_000_000),
                "updates": old.get("updates", 0) + updated,
                "version": __version__,
            }
        )


class Client(FdChardev):
    """The stream of one client after the other.

    :param on_free: called when a client has gone
    """

    def __init__(
        self, id: str, loop: EventLoop, handover: Handover, on_free: Callable[[], None]
    ) -> None:
        super().__init__(id, loop, handover)
        self._on_free = on_free

    @property
    def filename(self) -> str:
        return f"run:{self.id}"

    def adopt(self, fd: int) -> None:
        """A client is there."""
        os.set_blocking(fd, False)
        self.parcel.keep(fd)
        self._open_stream(fd, fd)

    def inherit(self) -> bool:
        """Go on with the client of the image before; return whether there was one."""
        fd = self.parcel.take()
        if fd is None:
            return False
        if not stat.S_ISSOCK(os.fstat(fd).st_mode):
            self.parcel.close(fd)
            return False
        self.is_inherited = True
        self.adopt(fd)
        return True

    def recover(self) -> None:
        self._disconnect()

    def _read_fd(self, fd: int, count: int) -> bytes:
        return read_socket(self.frontend, fd, count)

    def _handle_disconnected(self) -> None:
        self._on_free()


class MonitorServer:
    """One listening socket with a monitor for each client.

    :param mode: ``readline`` (HMP) or ``control`` (QMP)
    """

    def __init__(
        self, address: UnixAddress, mode: str, machine: Machine, migration: Migration
    ) -> None:
        self._address = address
        self._mode = mode
        self._machine = machine
        self._migration = migration
        self._parcel = machine.handover.parcel(RUN, mode)
        self._listener: _socket.socket | None = None
        # A client's chardev and monitor serve another one when it has gone.
        self._clients: list[Client] = []
        self._monitors: list[MonitorFrontend] = []

    def start(self, *, keep_listener: bool) -> None:
        """Listen, and go on with the clients of the image before.

        :param keep_listener: whether an inherited listener is still the one that is found
        :raises ConfigError: the address cannot be used
        """
        for number in range(MAX_CLIENTS):
            client = self._make_client(number)
            if client.inherit():
                self._add(client)
            else:
                self._machine.handover.parcel(MONITOR, client.id).take_state()
        self._listener = self._take_listener(keep_listener) or self._address.listen()
        self._parcel.keep(self._listener.fileno())
        self._watch()

    def recover(self) -> None:
        """One of the loop's calls failed: look at the listener again, later."""
        self._machine.loop.call_later(_RETRY_S, self._watch)

    def close(self) -> None:
        """Send everybody away."""
        if self._listener is not None:
            self._machine.loop.remove(self._listener.fileno())
            self._parcel.close(self._listener.detach())
            self._listener = None
        for monitor in self._monitors:
            monitor.close()
        for client in self._clients:
            client.close()

    def _take_listener(self, keep: bool) -> _socket.socket | None:
        fd = self._parcel.take()
        if fd is None:
            return None
        if keep and stat.S_ISSOCK(os.fstat(fd).st_mode):
            listener = _socket.socket(fileno=fd)
            if self._address.matches(listener):
                return listener
            listener.detach()
        self._parcel.close(fd)
        return None

    def _make_client(self, number: int) -> Client:
        machine = self._machine
        return Client(f"{self._parcel.name}/{number}", machine.loop, machine.handover, self._watch)

    def _add(self, client: Client) -> None:
        config = ChardevConfig("chardev", client.id, {}, self._parcel.name)
        spec = (MonitorConfig(config, self._mode), client)
        self._monitors += open_monitors(self._machine, self._migration, [spec])
        self._clients.append(client)

    def _watch(self) -> None:
        if self._listener is not None:
            self._machine.loop.add(self._listener.fileno(), READABLE, self._handle_client)

    def _handle_client(self, _revents: int) -> None:
        assert self._listener is not None
        client = self._free_client()
        if client is None:
            self._machine.loop.remove(self._listener.fileno())  # until one goes
            return
        try:
            # Unlike accept() it gives the bare descriptor, close-on-exec already set.
            fd, _peer = self._listener._accept()  # type: ignore[attr-defined]
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                self._machine.loop.remove(self._listener.fileno())
                self._machine.loop.call_later(_RETRY_S, self._watch)
            return
        if client not in self._clients:
            self._add(client)
        client.adopt(fd)

    def _free_client(self) -> Client | None:
        for client in self._clients:
            if not client.connected:
                return client
        used = {client.id for client in self._clients}
        for number in range(MAX_CLIENTS):
            client = self._make_client(number)
            if client.id not in used:
                return client
        return None
