"""A device's output to its chardev, which native code and the device's methods put into one ring:
what the guest takes for sent, and the host has not taken yet.

The main loop writes it in batches: the first byte after a rest at once, those that follow a moment
later. Whoever is in the device's methods may write it earlier, which keeps the order. It is empty
whenever the device is at rest, but for what the chardev refuses.
"""

from __future__ import annotations

import os
import time

from pyvmm._native import ffi, lib
from pyvmm.core.eventloop import READABLE
from pyvmm.errors import HostError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from pyvmm._native import SharedLock
    from pyvmm.chardev.base import Chardev

SIZE = lib.PYVMM_OUTPUT_SIZE
#: How long the bytes behind the first one of a burst may wait. Nobody who reads them notices.
BATCH_S = 0.001
#: How long a reader that is slow holds up the machine's end, for what the guest takes for sent.
PATIENCE_S = 1.0
_TURN_S = 0.005
_RECOVER_S = 1.0


class Output:
    """The ring of one device. All but :meth:`prepare`, :meth:`attach` and :meth:`close` is called
    with the device's lock held.

    :param ring: ``struct pyvmm_output *``
    :param chardev: where the bytes go
    :param lock: the device's
    :param flush: has the device call :meth:`write`; returns whether a later call is of any use
        before the chardev says so
    """

    def __init__(
        self, ring: Any, chardev: Chardev, lock: SharedLock, flush: Callable[[], bool]
    ) -> None:
        self._ring = ring
        self._bytes = memoryview(ffi.buffer(ring.bytes))
        self._chardev = chardev
        self._lock = lock
        self._flush = flush
        self._fd = -1
        ring.event_fd = -1

    def __len__(self) -> int:
        return int(self._ring.tail - self._ring.head & 0xFFFFFFFF)

    def put(self, data: bytes) -> None:
        """Append bytes, for which there must be room."""
        ring = self._ring
        for byte in data:
            ring.bytes[ring.tail % SIZE] = byte
            ring.tail = ring.tail + 1 & 0xFFFFFFFF

    def content(self) -> bytes:
        """Return the bytes, oldest first."""
        begin = self._ring.head % SIZE
        end = begin + len(self)
        return bytes(self._bytes[begin:end]) + bytes(self._bytes[: max(end - SIZE, 0)])

    def write(self) -> None:
        """Give the chardev what it takes."""
        while count := len(self):
            begin = self._ring.head % SIZE
            taken = self._chardev.write(bytes(self._bytes[begin : begin + count]))
            self._ring.head = self._ring.head + taken & 0xFFFFFFFF
            if taken < min(count, SIZE - begin):
                return

    def clear(self) -> None:
        """Forget all of them."""
        self._ring.head = self._ring.tail

    def drop_latest(self, count: int) -> None:
        """Forget the bytes that were put last."""
        self._ring.tail = self._ring.tail - count & 0xFFFFFFFF

    def prepare(self) -> None:
        """Do what can fail of :meth:`attach`. A file may hang with its disk: who sends waits for it
        then, and the main loop never does, so native code gets none of its output.

        :raises HostError: the host allows no further descriptor
        """
        if self._fd < 0 and not self._chardev.waits_for_host:
            try:
                self._fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
            except OSError as error:
                raise HostError(
                    f"chardev {self._chardev.id}: {error.strerror}: raise the limit (ulimit -n)"
                ) from None

    def attach(self) -> None:
        """Have native code put bytes as soon as the main loop runs, which has much else to do
        before it does. Main loop thread."""
        self._chardev.loop.call_soon(self._go_on)

    def recover(self) -> None:
        """One of the loop's calls here failed: go on, without failing all the time."""
        self._chardev.loop.call_later(_RECOVER_S, self._go_on)

    def _go_on(self) -> None:
        if self._fd >= 0:
            self._chardev.loop.add(self._fd, READABLE, self._handle_event)
            with self._lock:
                self._ring.event_fd = self._fd
            self._collect()

    def close(self, *, patient: bool = False) -> None:
        """Write the rest. No vCPU runs any more.

        :param patient: wait for a reader that is slow
        """
        end = time.monotonic() + (PATIENCE_S if patient else 0)
        with self._lock:
            self._ring.event_fd = -1
            self._flush()
            while len(self) and time.monotonic() < end:
                time.sleep(_TURN_S)
                self._flush()
        if self._fd >= 0:
            self._chardev.loop.remove(self._fd)
            os.close(self._fd)
            self._fd = -1

    def _handle_event(self, _revents: int) -> None:
        try:
            os.eventfd_read(self._fd)
        except BlockingIOError:
            return
        self._collect()

    def _collect(self) -> None:
        with self._lock:
            if not (len(self) and self._flush()):
                # At rest: the next byte shall be told of.
                self._ring.is_awaited = 1
                return
        self._chardev.loop.call_later(BATCH_S, self._collect)
