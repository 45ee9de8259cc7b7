"""The entropy device (virtio 1.3, 5.4): the host's random numbers for the guest.

What an evil guest can try: buffers of gigabytes; it gets a bounded part of each (the
specification lets a device fill less than the buffer), and, with a limit, so much in a period.
Has no state: over an update a period begins anew. Main loop thread.
"""

from __future__ import annotations

from pyvmm.backends.rng import Rng
from pyvmm.devices.virtio.device import VirtioDevice

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from pyvmm.core.eventloop import EventLoop, Timer

QUEUE_SIZE = 8
#: Bytes for one request.
MOST = 64 << 10


class VirtioRng(VirtioDevice):
    """The device; one queue, whose buffers it fills.

    :param source: where the numbers come from; by default the kernel's generator
    :param max_bytes: so many in a period at most; 0 for no limit
    :param period_ms: length of a period, which the first request begins
    """

    virtio_id = 4
    name = "virtio-rng-device"
    queue_sizes = (QUEUE_SIZE,)

    def __init__(
        self,
        loop: EventLoop,
        source: Rng | None = None,
        max_bytes: int = 0,
        period_ms: int = 1 << 16,
    ) -> None:
        super().__init__(loop)
        self._source = source or Rng()
        self._max_bytes = self._left = max_bytes
        self._period_ms = period_ms
        self._timer: Timer | None = None

    def properties(self) -> dict[str, Any]:
        return {"max-bytes": self._max_bytes, "period": self._period_ms}

    def handle_queue(self, index: int) -> None:
        queue = self.queues[index]
        queue.disable_notifications()
        for _ in range(queue.size):
            chain = queue.pop()
            if chain is None:
                if not queue.enable_notifications():
                    break
                continue
            wanted = min(chain.writable_size, MOST)
            data = self._draw(wanted)
            if wanted and not data:
                queue.unpop()  # until there is something
                break
            queue.answer(chain, data)
        else:
            self.kick(index)
        self.notify_used(index)

    def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._source.close()

    def _draw(self, count: int) -> bytes:
        if self._max_bytes:
            count = min(count, self._left)
        if not count:
            return b""
        data = self._source.read(count, lambda: self.kick(0))
        if self._max_bytes and data:
            self._left -= len(data)
            if self._timer is None:
                self._timer = self.loop.call_later(self._period_ms / 1000, self._begin_period)
        return data

    def _begin_period(self) -> None:
        self._timer = None
        self._left = self._max_bytes
        self.kick(0)
