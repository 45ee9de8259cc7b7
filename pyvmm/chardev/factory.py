"""All chardevs of a machine: made from configurations, found by name, saved and closed.

Modules are imported as they are needed: a live update waits for each. Loop thread only.
"""

from __future__ import annotations

import os

from pyvmm.chardev.base import Chardev
from pyvmm.chardev.config import ChardevConfig, parse_chardev
from pyvmm.cpr.handover import ADDED, Passenger
from pyvmm.errors import CommandError, ConfigError, PyvmmError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from pyvmm.chardev.mux import MuxChardev
    from pyvmm.chardev.stdio import StdioChardev
    from pyvmm.core.eventloop import EventLoop
    from pyvmm.cpr.handover import Handover


class Added(Passenger):
    """A chardev that was made while the machine runs: the next image's command line has none."""

    def __init__(self, config: ChardevConfig, chardev: Chardev) -> None:
        self._config = config
        self._chardev = chardev

    def save_state(self) -> bytes:
        """Return what it is, and its state."""
        return os.fsencode(self._config.line()) + b"\0" + self._chardev.save_state()


class ChardevSet:
    """The chardevs, in the order in which they were made.

    First :meth:`create` all that ``-chardev`` asks for; then each front end gets its own by
    :meth:`claim`; then, after an exec, :meth:`load_state`.

    :param quit: called for Ctrl-a x
    """

    def __init__(self, loop: EventLoop, handover: Handover, quit: Callable[[], None]) -> None:
        self._loop = loop
        self._handover = handover
        self._quit = quit
        self._chardevs: dict[str, Chardev] = {}
        self._muxes: dict[str, MuxChardev] = {}
        self._users: dict[str, int] = {}
        # Ids of those that were made while the machine runs.
        self._added: set[str] = set()
        self._running = False
        self.stdio: StdioChardev | None = None

    def create(self, config: ChardevConfig) -> Chardev:
        """Make a chardev and return it. With ``mux=on`` it makes two: the mux, which it returns,
        and ``ID-base`` under it.

        :raises ConfigError: if the name or stdio is taken, or what it names cannot be opened
        :raises HostError: if the host has no room for it
        :raises VmStateError: if an inherited descriptor is of another kind
        """
        mux = config.flag("mux")
        id = f"{config.id}-base" if mux else config.id
        for name in (id, config.id):
            if name in self._chardevs:
                raise ConfigError(f"{config.option}: the name {name} is in use; give another id")
        chardev = self._make(config, id)
        self._insert(id, chardev)
        if mux:
            from pyvmm.chardev.mux import MuxChardev

            self._muxes[config.id] = chardev = MuxChardev(config.id, chardev, self._quit)
            self._insert(config.id, chardev)
        return chardev

    def claim(self, config: ChardevConfig) -> Chardev:
        """Return the chardev for one front end: made now, or by ``-chardev`` before.

        Front ends of a mux get the focus in the order in which they claim it.

        :raises ConfigError: as :meth:`create`; if there is none of that name, or it has a
            front end and no mux
        """
        if config.kind != "chardev":
            self.create(config)
        if config.id not in self._chardevs:
            raise ConfigError(
                f"{config.option}: there is no chardev {config.id};"
                f" add -chardev KIND,id={config.id}"
            )
        user = self._users.get(config.id, 0)
        mux = self._muxes.get(config.id)
        if mux is None and user:
            raise ConfigError(
                f"{config.option}: chardev {config.id} is in use; give the chardev mux=on"
            )
        chardev = self._chardevs[config.id] if mux is None else mux.frontend_chardev(user)
        self._users[config.id] = user + 1
        return chardev

    def add(self, config: ChardevConfig) -> Chardev:
        """Make a chardev while the machine runs, and return it; updates keep it.

        :raises PyvmmError: as :meth:`create`
        """
        self._running = True
        chardev = self.create(config)
        chardev.parcel.leave()
        self._handover.parcel(ADDED, config.id).board(Added(config, chardev))
        self._added.add(config.id)
        return chardev

    def remove(self, id: str) -> None:
        """Close a chardev that nobody uses.

        :raises CommandError: with QEMU's texts
        """
        if id not in self._chardevs:
            raise CommandError(f"Chardev '{id}' not found")
        chardev = self._chardevs[id]
        if chardev.frontend_open or self._users.get(id):
            raise CommandError(f"Chardev '{id}' is busy")
        if id not in self._added:
            # The next image's command line has it, and would bring it back.
            raise CommandError(f"Chardev '{id}' is of the command line and stays")
        del self._chardevs[id]
        self._added.discard(id)
        self._handover.parcel(ADDED, id).leave()
        if chardev is self.stdio:
            self.stdio = None
        chardev.close()

    def get(self, id: str) -> Chardev | None:
        """Return the chardev of that name; None if there is none."""
        return self._chardevs.get(id)

    def items(self) -> list[tuple[str, Chardev]]:
        """Return names and chardevs, for ``info chardev``."""
        return list(self._chardevs.items())

    def wait_connected(self) -> None:
        """Serve the loop until every ``wait=on`` has its client, or the loop is stopped."""
        for chardev in list(self._chardevs.values()):
            chardev.wait_connected()

    def load_added(self) -> list[str]:
        """Make again what was added in the image before; return what stands in the way of those
        that cannot be."""
        problems = []
        for id in self._handover.inherited_states(ADDED):
            state = self._handover.parcel(ADDED, id).take_state()
            line, _, inner = state.partition(b"\0")
            try:
                chardev = self.add(parse_chardev(os.fsdecode(line)))
                if inner:
                    chardev.load_state(inner)
            except PyvmmError as error:
                problems.append(str(error))
        return problems

    def load_state(self) -> None:
        """Go on with what the image before saved. State of a chardev that is gone is dropped.

        :raises VmStateError: if a state is not possible
        """
        for chardev in self._chardevs.values():
            state = chardev.parcel.take_state()
            if state:
                chardev.load_state(state)

    def close(self) -> None:
        """Close all, front ends before what they share."""
        while self._chardevs:
            _id, chardev = self._chardevs.popitem()
            chardev.close()
        self._muxes.clear()
        self.stdio = None

    def _insert(self, id: str, chardev: Chardev) -> None:
        self._chardevs[id] = chardev
        chardev.parcel.board(chardev)

    def _make(self, config: ChardevConfig, id: str) -> Chardev:
        loop, handover, option = self._loop, self._handover, config.option
        if config.kind == "stdio":
            if self.stdio is not None:
                raise ConfigError(
                    f"{option}: stdio is in use by {self.stdio.id};"
                    " share it with mux=on, or use mon:stdio"
                )
            from pyvmm.chardev.stdio import StdioChardev

            signal = config.flag("signal") if "signal" in config.options else None
            self.stdio = StdioChardev(id, loop, handover, signal=signal)
            return self.stdio
        if config.kind == "file":
            from pyvmm.chardev.file import FileChardev

            path, append = config.text("path"), config.flag("append")
            return FileChardev(id, loop, handover, path=path, append=append, option=option)
        if config.kind == "pty":
            from pyvmm.chardev.pty import PtyChardev

            path, announced = config.text("path"), not self._running
            return PtyChardev(id, loop, handover, path=path, option=option, announced=announced)
        if config.kind == "socket":
            return self._make_socket(config, id)
        if config.kind == "ringbuf":
            from pyvmm.chardev.ringbuf import DEFAULT_SIZE, RingbufChardev

            return RingbufChardev(id, loop, handover, size=config.size("size", DEFAULT_SIZE))
        from pyvmm.chardev.null import NullChardev

        return NullChardev(id, loop, handover)

    def _make_socket(self, config: ChardevConfig, id: str) -> Chardev:
        from pyvmm.chardev.address import Address, TcpAddress, UnixAddress
        from pyvmm.chardev.socket import SocketChardev

        address: Address
        if config.text("path"):
            address = UnixAddress(config.text("path"), config.option)
        else:
            address = TcpAddress(config.text("host"), config.number("port"), config.option)
        return SocketChardev(
            id,
            self._loop,
            self._handover,
            address=address,
            server=config.flag("server"),
            wait=config.flag("wait", True),
            reconnect_s=config.number("reconnect"),
            nodelay=config.flag("nodelay"),
            running=self._running,
        )
