"""The descriptors that live through an exec, by name, as QEMU's CPR state lists them.

Before any backend or device exists the new image fills the store from the CPR state; each
constructor then asks for its descriptor and opens a fresh one only if there is none. In the
running image the same store knows what is to be preserved by the next exec. Close-on-exec
stays set on all of them and is cleared as the very last act before execve, so that no helper
that is forked in between inherits guest RAM.
"""

from __future__ import annotations

import os

from pyvmm.errors import InternalError

Key = tuple[str, int]


class FdStore:
    """Preserved descriptors, keyed by (name, id); main loop thread only.

    :param inherited: what came through the exec, if this process was born by one
    """

    def __init__(self, inherited: dict[Key, int] | None = None) -> None:
        #: Whether this process was born by an exec that handed descriptors over.
        self.is_incoming = inherited is not None
        self._inherited = dict(inherited or {})
        self._kept: dict[Key, int] = {}
        self._dropped: list[int] = []
        for fd in self._inherited.values():
            os.set_inheritable(fd, False)

    def take(self, name: str, index: int = 0) -> int | None:
        """The inherited descriptor of that name, which the caller owns from now on."""
        return self._inherited.pop((name, index), None)

    def drop(self, fd: int) -> None:
        """Close what :meth:`take` gave and the taker has no use for; not before
        :meth:`close_unclaimed`, since the way back hands it to the old image again."""
        self._dropped.append(fd)

    def peek(self, name: str, index: int = 0) -> int | None:
        """The inherited descriptor of that name, which stays the store's."""
        return self._inherited.get((name, index))

    def take_all(self, name: str) -> dict[int, int]:
        """All inherited descriptors of that name, by id."""
        found = {key[1]: fd for key, fd in self._inherited.items() if key[0] == name}
        for index in found:
            del self._inherited[(name, index)]
        return found

    def keep(self, name: str, fd: int, index: int = 0) -> None:
        """Preserve ``fd`` over the next exec under this name.

        :raises InternalError: if the name is in use for another descriptor
        """
        if self._kept.setdefault((name, index), fd) != fd:
            raise InternalError(f"two descriptors are to be preserved as {name}[{index}]")

    def forget(self, name: str, index: int = 0) -> None:
        """No longer preserve that name; the owner is about to close its descriptor."""
        self._kept.pop((name, index), None)

    def kept(self) -> dict[Key, int]:
        """What the next exec has to preserve."""
        return dict(self._kept)

    def keep_all(self, prefix: str) -> None:
        """Take all inherited descriptors whose names begin so, and preserve them further."""
        for key in [key for key in self._inherited if key[0].startswith(prefix)]:
            self._kept[key] = self._inherited.pop(key)

    def close_unclaimed(self) -> list[Key]:
        """Close inherited descriptors that nobody asked for; their names."""
        names = list(self._inherited)
        for fd in (*self._inherited.values(), *self._dropped):
            try:
                os.close(fd)
            except OSError:
                pass  # Linux has closed it even so; the guest runs
        self._inherited.clear()
        self._dropped.clear()
        return names

    def set_inheritable(self, inheritable: bool) -> None:
        """Clear (or set again) close-on-exec on exactly the preserved descriptors."""
        for fd in self._kept.values():
            os.set_inheritable(fd, inheritable)
