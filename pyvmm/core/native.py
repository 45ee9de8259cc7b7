"""What a device shares with the native code that answers some of its accesses
(``_native/answers.h``): which accesses they are, and the lock.

The device keeps what these accesses read and change in one structure, which its methods, native
code and the saved state use alike. All other accesses are the methods' alone.
"""

from __future__ import annotations

from pyvmm._native import ffi, lib, try_lock, unlock
from pyvmm.core.threads import Lock

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import Any


class NativeAnswers:
    """Which accesses to a region native code answers: those of its kind that are named here.

    :param kind: a PYVMM_... number: which device it is, for native code
    :param device: its structure, a pointer; NULL if the kind has none
    :param reads: the offsets of the registers, in memory the multiples of 4
    :param writes: likewise
    """

    __slots__ = ("device", "kind", "reads", "writes")

    def __init__(
        self, kind: int, device: Any, reads: Iterable[int] = (), writes: Iterable[int] = ()
    ) -> None:
        self.kind = kind
        self.device = device
        self.reads = frozenset(reads)
        self.writes = frozenset(writes)


class SharedLock:
    """A lock that native code tries: while a thread has it here, it gets no answer there, and
    whoever is in there is out again in a moment.

    :param word: the lock's word in the device's structure, a pointer, kept alive by the caller
    """

    __slots__ = ("_address", "_lock", "_word")

    def __init__(self, word: Any) -> None:
        # Around the word, so that threads wait for each other as for any other lock.
        self._lock = Lock()
        self._word = word
        self._address = int(ffi.cast("uintptr_t", word))

    def acquire(self, blocking: bool = True, timeout: float = -1) -> bool:
        """Take it; return whether that was possible."""
        if not self._lock.acquire(blocking, timeout):
            return False
        if not try_lock(self._address):
            lib.pyvmm_lock(self._word)
        return True

    def release(self) -> None:
        """Give it back."""
        unlock(self._address)
        self._lock.release()

    def locked(self) -> bool:
        """Return whether somebody has it here."""
        return self._lock.locked()

    def __enter__(self) -> None:
        self._lock.acquire()
        if not try_lock(self._address):
            lib.pyvmm_lock(self._word)

    def __exit__(self, *_: object) -> None:
        unlock(self._address)
        self._lock.release()
