"""``-chardev ringbuf``: the last bytes that were written, for a monitor to read.

Its contents are in no descriptor, so they are carried over a live update as state.
"""

from __future__ import annotations

from pyvmm.chardev.base import Chardev
from pyvmm.errors import VmStateError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pyvmm.core.eventloop import EventLoop
    from pyvmm.cpr.handover import Handover

DEFAULT_SIZE = 64 << 10


class RingbufChardev(Chardev):
    """A buffer that forgets its oldest bytes.

    :param size: how many bytes are remembered
    """

    def __init__(
        self, id: str, loop: EventLoop, handover: Handover, *, size: int = DEFAULT_SIZE
    ) -> None:
        super().__init__(id, loop, handover)
        self.size = size
        self._data = bytearray()

    @property
    def filename(self) -> str:
        return "ringbuf"

    def write(self, data: bytes) -> int:
        with self.lock:
            self._data += data
            del self._data[: -self.size]
        return len(data)

    def read(self, count: int) -> bytes:
        """Return up to ``count`` bytes, oldest first, and forget them."""
        with self.lock:
            data = bytes(self._data[:count])
            del self._data[:count]
        return data

    def save_state(self) -> bytes:
        with self.lock:
            return bytes(self._data)

    def load_state(self, state: bytes) -> None:
        if len(state) > self.size:
            raise VmStateError(
                self.parcel.name, f"{len(state)} bytes do not fit a ringbuf of {self.size}"
            )
        with self.lock:
            self._data[:] = state
