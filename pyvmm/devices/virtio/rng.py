"""The entropy device (virtio 1.3, 5.4): the host's random numbers for the guest.

They come from getrandom(2), which never blocks once the host has booted. What an evil guest
can try: buffers of gigabytes; it gets a bounded part of each (the specification lets a device
fill less than the buffer). Has no state; main loop thread.
"""

from __future__ import annotations

import os

from pyvmm.devices.virtio.device import VirtioDevice

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pyvmm.devices.virtio.queue import Chain, Queue

QUEUE_SIZE = 8
#: Bytes for one request.
MOST = 64 << 10


class VirtioRng(VirtioDevice):
    """The device; one queue, whose buffers it fills."""

    virtio_id = 4
    name = "virtio-rng-device"
    queue_sizes = (QUEUE_SIZE,)

    def handle_chain(self, queue: Queue, chain: Chain) -> None:
        written = chain.write(os.getrandom(min(chain.writable_size, MOST)))
        queue.push(chain.head, written)
