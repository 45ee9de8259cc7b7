"""What a device shares with the native code that answers some of its accesses
(``_native/answers.h``): which accesses they are, and the lock.

The device keeps what these accesses read and change in one structure, which its methods, native
code and the saved state use alike. All other accesses are the methods' alone.
"""

from __future__ import annotations

from pyvmm._native import SharedLock, ffi

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


def shared_lock(word: Any) -> SharedLock:
    """Return the lock of a device's structure.

    :param word: pointer to its word, kept alive by the caller
    """
    return SharedLock(address(word))


def address(word: Any) -> int:
    """Return where a pointer points to."""
    return int(ffi.cast("uintptr_t", word))
