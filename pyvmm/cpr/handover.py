"""What goes through an exec: descriptors and host-side state, by kind and id.

Before any back end or device exists the new image fills the hand-over from the CPR state. Each
object asks for its :class:`Parcel` when it is made: what it finds there it goes on with, and only
if there is nothing it opens something fresh. In the running image the same hand-over knows what is
to go through the next exec, so that an update has no list of objects to visit. Close-on-exec stays
set on all descriptors and is cleared as the very last act before execve, so that no helper that is
forked in between inherits guest RAM.

What was inherited stays open until the guest runs, whoever has no use for it
(:meth:`Handover.close`): the image before needs it if it has to come back.

On the wire (``cpr.state``) an object is called KIND/ID; an id that a user gives has no slash. Two
kinds have bare names there: RAM, as in QEMU, the name of the block, and what is pyvmm's own, of
which :data:`RESERVED` are descriptors, so that no block may be called so. Main loop thread only.
"""

from __future__ import annotations

import os

from pyvmm.errors import InternalError, MigrationError

TYPE_CHECKING = False
if TYPE_CHECKING:
    Key = tuple[str, int]

# Kinds of objects that the user names.
RAM = "ram"
BLOCK = "block"
CHARDEV = "chardev"
ADDED = "chardev-added"  # one that no command line has
NETDEV = "netdev"
RNG = "rng"
MONITOR = "monitor"
CLIENT = "client-fd"  # what monitors' clients handed over

# What is told of one of them beside its own state.
HUGE = "huge"  # which pages of a block of memory are huge

# And of others, with the names that they have.
FW_CFG = "fw_cfg"  # the contents of -fw_cfg files
BOOT = "boot"  # what a reset loads: kernel, initrd
RUN = "run"  # the entry in the run directory: lock, and the listeners of readline, control
CPR = "cpr"  # an update's own descriptors: vmstate, holder, exe, way-back
ROLLBACK = "rollback"  # for images before version 1 of the way back's record
OWN = ""  # /dev/kvm: kvm; what an update says: progress, quiesced, capabilities, note, holders

KVM = "kvm"
#: Names of descriptors that are no block of memory.
RESERVED = (KVM,)


class Passenger:
    """What has host-side state that goes over an exec."""

    def quiesce(self) -> None:
        """An exec is about to come; the guest runs."""

    def restart(self) -> None:
        """The exec did not come: go on."""

    def save_state(self) -> bytes:
        """Return what the next image has to know; the guest stands."""
        return b""


class Handover:
    """What came through the exec, if this process was born by one, and what the next one takes.

    :param fds: descriptors that the image before left, by name on the wire and index; None if
        there was none
    :param states: its host-side states, by name on the wire
    :ivar is_incoming: whether there was an image before
    :ivar passengers: what is asked for its state, by name on the wire
    """

    def __init__(
        self, fds: dict[Key, int] | None = None, states: dict[str, bytes] | None = None
    ) -> None:
        self.is_incoming = fds is not None
        self.passengers: dict[str, Passenger] = {}
        self._fds = dict(fds or {})
        self._states = dict(states or {})
        self._kept: dict[Key, int] = {}
        self._given: dict[str, bytes] = {}
        # Descriptors that must not be closed yet, and those of them that are closed once they may.
        self._lent = set(self._fds.values())
        self._dropped: list[int] = []
        for fd in self._lent:
            os.set_inheritable(fd, False)

    def parcel(self, kind: str, id: str) -> Parcel:
        """Return what one object takes and gives."""
        if kind == RAM and id in RESERVED:
            raise InternalError(f"no block of memory can be called {id}")
        return Parcel(self, id if kind in (RAM, OWN) else f"{kind}/{id}")

    def inherited_states(self, kind: str) -> dict[str, bytes]:
        """Return the states of a kind that nobody has taken, by id."""
        return {
            name.removeprefix(f"{kind}/"): state
            for name, state in self._states.items()
            if name.startswith(f"{kind}/")
        }

    def kept(self) -> dict[Key, int]:
        """Return the descriptors that the next exec has to preserve, by name on the wire and
        index."""
        return dict(self._kept)

    def kept_of(self, kind: str) -> dict[Key, int]:
        """Return the kept descriptors of a kind, by id and index."""
        return {
            (name.removeprefix(f"{kind}/"), index): fd
            for (name, index), fd in self._kept.items()
            if name.startswith(f"{kind}/")
        }

    def keep_all(self, kind: str) -> None:
        """Take all inherited descriptors of a kind, and preserve them further."""
        for key in [key for key in self._fds if key[0].startswith(f"{kind}/")]:
            self._kept[key] = self._fds.pop(key)

    def states(self) -> dict[str, bytes]:
        """Return the host-side states for the next image, by name on the wire."""
        saved = {name: passenger.save_state() for name, passenger in self.passengers.items()}
        return {name: state for name, state in (self._given | saved).items() if state}

    def close(self, fd: int) -> None:
        """Close a descriptor that is not preserved any more; one that was inherited not before
        :meth:`release`."""
        if fd in self._lent:
            self._lent.discard(fd)
            self._dropped.append(fd)
        else:
            os.close(fd)

    def release(self) -> None:
        """The guest runs, and the image before does not come back: close what is of no use, from
        now on at once."""
        self._lent.clear()
        while self._dropped:
            _close(self._dropped.pop())

    def settle(self) -> list[Key]:
        """The same, and all that is wanted was taken: close the rest, too. Return the names and
        indices of what nobody asked for."""
        self.release()
        names = list(self._fds)
        for fd in self._fds.values():
            _close(fd)
        self._fds.clear()
        return names

    def set_inheritable(self, inheritable: bool) -> None:
        """Clear (or set again) close-on-exec on exactly the preserved descriptors."""
        for fd in self._kept.values():
            os.set_inheritable(fd, inheritable)


def _close(fd: int) -> None:
    try:
        os.close(fd)
    except OSError:
        pass  # Linux has closed it even so; the guest runs


class Parcel:
    """What one object takes from the image before and gives to the next.

    :ivar name: on the wire
    """

    __slots__ = ("_handover", "name")

    def __init__(self, handover: Handover, name: str) -> None:
        self._handover = handover
        self.name = name

    @property
    def is_incoming(self) -> bool:
        """Whether there was an image before."""
        return self._handover.is_incoming

    # ---- from the image before -------------------------------------------------------------

    def take(self, index: int = 0) -> int | None:
        """Return the inherited descriptor of that index, which is the caller's from now on; it
        goes through the next exec only if it is kept."""
        return self._handover._fds.pop((self.name, index), None)

    def require(self, what: str, index: int = 0) -> int | None:
        """Do as :meth:`take`, but return None only in an image that no exec made.

        :param what: what the descriptor is, with the object's name, for the error
        :raises MigrationError: the image before did not hand it over, and a fresh one would be
            another
        """
        fd = self.take(index)
        if fd is None and self.is_incoming:
            raise MigrationError(f"The {what} was not handed over by the image before")
        return fd

    def take_all(self) -> dict[int, int]:
        """Return all inherited descriptors, by index."""
        fds = self._handover._fds
        return {index: fds.pop((name, index)) for name, index in [*fds] if name == self.name}

    def peek(self, index: int = 0) -> int | None:
        """Return the inherited descriptor, which can be taken later."""
        return self._handover._fds.get((self.name, index))

    def take_state(self) -> bytes:
        """Return the inherited state, once; empty if there is none."""
        return self._handover._states.pop(self.name, b"")

    # ---- for the next image ----------------------------------------------------------------

    def keep(self, fd: int, index: int = 0) -> None:
        """Preserve ``fd`` over the next exec.

        :raises InternalError: if another descriptor is to be preserved in its place
        """
        if self._handover._kept.setdefault((self.name, index), fd) != fd:
            raise InternalError(f"two descriptors are to be preserved as {self.name}[{index}]")

    def kept(self, index: int = 0) -> int | None:
        """Return the descriptor that is to be preserved; None if none is."""
        return self._handover._kept.get((self.name, index))

    def forget(self, index: int = 0) -> None:
        """No longer preserve the descriptor, which the caller closes."""
        self._handover._kept.pop((self.name, index), None)

    def close(self, fd: int, index: int = 0) -> None:
        """Close ``fd``, which is of no use, or not any more, and no longer preserve it. One that
        was inherited stays open until the guest runs."""
        if self.kept(index) == fd:
            self.forget(index)
        self._handover.close(fd)

    def give(self, state: bytes) -> None:
        """Hand ``state`` over with the next exec, in the place of what was given before."""
        self._handover._given[self.name] = state

    def board(self, passenger: Passenger) -> None:
        """Have ``passenger`` asked for the state when the next exec comes."""
        self._handover.passengers[self.name] = passenger

    @property
    def is_boarded(self) -> bool:
        """Whether somebody is asked for the state."""
        return self.name in self._handover.passengers

    def leave(self) -> None:
        """Have nobody asked for the state any more."""
        self._handover.passengers.pop(self.name, None)
