"""The network device (virtio 1.3, 5.1): one pair of queues on a network back end.

Frames go by without being looked at: from the guest's buffers straight to the back end, and
from the back end's buffer into as many of the guest's as they need. Checksum and segmentation
offloads are offered if the back end has them. Left out: control queue (so the device is always
promiscuous), multiqueue, RSS, UDP segmentation.

What an evil guest can try: frames that are no frames (dropped), headers that make no sense (the
kernel behind a tap checks them and drops the frame), queues that never end (a kick is worth so
many frames, then others on the loop have their turn), buffers too small for anything (a frame
that all of the queue has no room for is dropped; one that it has no room for now waits, and with
it all others, in the host).

``handle_…`` run on the loop's thread, register accesses and resets on vCPU threads.
"""

from __future__ import annotations

import errno
import struct

from pyvmm.backends.net.base import HEADER, MAX_FRAME, MAX_PARTS, NetFrontend
from pyvmm.devices.virtio import fastpath
from pyvmm.devices.virtio.device import VirtioDevice
from pyvmm.errors import GuestError, RamError
from pyvmm.vmstate.fields import Buffer, Description, Record, u16

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from pyvmm.backends.net.base import NetBackend
    from pyvmm.core.eventloop import EventLoop
    from pyvmm.devices.virtio.queue import Chain, Queue

RX, TX = 0, 1
QUEUE_SIZE = 256

# Feature bits (5.1.3).
F_CSUM = 1 << 0
F_GUEST_CSUM = 1 << 1
F_MTU = 1 << 3
F_MAC = 1 << 5
F_GUEST_TSO4 = 1 << 7
F_GUEST_TSO6 = 1 << 8
F_GUEST_ECN = 1 << 9
F_HOST_TSO4 = 1 << 11
F_HOST_TSO6 = 1 << 12
F_HOST_ECN = 1 << 13
F_MRG_RXBUF = 1 << 15
F_STATUS = 1 << 16

#: All that can be switched off; -device has a property of each name.
FEATURES = (
    F_MRG_RXBUF | F_STATUS | F_CSUM | F_GUEST_CSUM | F_GUEST_TSO4 | F_GUEST_TSO6 | F_GUEST_ECN
    | F_HOST_TSO4 | F_HOST_TSO6 | F_HOST_ECN
)  # fmt: skip
#: What only a back end with offloads can do.
OFFLOADS = FEATURES & ~(F_MRG_RXBUF | F_STATUS)
#: Of them, those of the frames that the driver receives.
GUEST_OFFLOADS = F_GUEST_CSUM | F_GUEST_TSO4 | F_GUEST_TSO6 | F_GUEST_ECN
# What a feature is nothing without (5.1.3.1): any of these.
_REQUIRED = (
    (F_GUEST_TSO4 | F_GUEST_TSO6, F_GUEST_CSUM),
    (F_GUEST_ECN, F_GUEST_TSO4 | F_GUEST_TSO6),
    (F_HOST_TSO4 | F_HOST_TSO6, F_CSUM),
    (F_HOST_ECN, F_HOST_TSO4 | F_HOST_TSO6),
)

# Of the header before a frame (5.1.6).
HDR_NEEDS_CSUM = 1
GSO_TCPV4, GSO_TCPV6, GSO_ECN = 1, 4, 0x80
_SEGMENTED = {GSO_TCPV4: F_GUEST_TSO4, GSO_TCPV6: F_GUEST_TSO6}

S_LINK_UP = 1

#: The least that an Ethernet frame has: its addresses and type.
MIN_FRAME = 14
_CONFIG = struct.Struct("<6sHHH")  # mac, status, max_virtqueue_pairs, mtu
_NUM_BUFFERS = slice(10, 12)
# What is done at once before others on the loop have their turn.
_FRAMES = 64
_BYTES = 256 << 10


def _check(state: Record) -> None:
    if state.status & ~S_LINK_UP:
        raise ValueError(f"status {state.status:#x} does not exist")


class VirtioNet(VirtioDevice, NetFrontend):
    """The device.

    :param backend: where its frames go to and come from
    :param mac: its address, 6 bytes
    :param mtu: the largest packet that the network takes; 0 if that is not said
    :param features: which of :data:`FEATURES` are offered, as far as the back end can do them
    """

    virtio_id = 1
    name = "virtio-net-device"
    # What the guest knows. The address stays, whatever the next command line counts up to.
    vmstate = Description("virtio-net", [Buffer("mac", 6), u16("status")], check=_check)

    def __init__(
        self,
        loop: EventLoop,
        backend: NetBackend,
        mac: bytes,
        *,
        mtu: int = 0,
        features: int = FEATURES,
        rx_queue_size: int = QUEUE_SIZE,
        tx_queue_size: int = QUEUE_SIZE,
    ) -> None:
        super().__init__(loop)
        self.backend = backend
        self.mac = mac
        self.mtu = mtu
        self.queue_sizes = (rx_queue_size, tx_queue_size)
        if not backend.has_offloads:
            features &= ~OFFLOADS
        for feature, required in _REQUIRED:
            features &= ~(0 if features & required else feature)
        self.features = features | F_MAC | (F_MTU if mtu else 0)
        # Receive buffers, with their sizes, taken for a frame that they have no room for yet.
        self._parked: list[tuple[Chain, int]] = []
        self._room = 0
        self.status = S_LINK_UP if backend.link_up else 0
        self._update_config()
        backend.frontend = self

    def properties(self) -> dict[str, Any]:
        mac = ":".join(f"{byte:02x}" for byte in self.mac)
        return {"mac": mac, "netdev": self.backend.id, "host_mtu": self.mtu}

    # ---- the life of the device ------------------------------------------------------------

    def on_activate(self) -> None:
        self._set_offloads(self.driver_features)
        self.kick(RX)  # there may be frames, and there is no kick if there are buffers already

    def reset(self) -> None:
        self._parked.clear()
        self._room = 0
        self._set_offloads(0)

    def drain(self, timeout_s: float | None = None) -> None:
        with self.lock:
            for _ in self._parked:
                self.queues[RX].unpop()
            self._parked.clear()
            self._room = 0

    def start(self) -> None:
        # Not now: this may be a vCPU's thread, and a new image must not touch the host's side
        # before there is no way back.
        self.loop.call_soon(self.backend.start)

    def attach(self) -> None:
        # The image before may have told the driver otherwise.
        if self.backend.link_up != bool(self.status & S_LINK_UP):
            self.handle_link(self.backend.link_up)

    def load(self, state: Record) -> None:
        self.mac, self.status = state.mac, state.status
        self._update_config()
        self._set_offloads(self.driver_features)

    # ---- frames ----------------------------------------------------------------------------

    def handle_queue(self, index: int) -> None:
        if index == RX:
            self._receive()
        else:
            self._transmit(self.queues[TX])

    def handle_frames(self) -> None:
        if self.running:
            self.work(self._receive)
        else:
            self.backend.watch(False)  # until the kick that follows

    def handle_writable(self) -> None:
        self.kick(TX)

    def handle_link(self, up: bool) -> None:
        def change() -> None:
            self.status = S_LINK_UP if up else 0
            self._update_config()

        # Not every driver knows of that field.
        self.change_config(change, tell=bool(self.driver_features & F_STATUS))
        if up:
            self.kick(RX)

    def _receive(self) -> None:
        queue, backend = self.queues[RX], self.backend
        if not self.running or not queue.ready:
            backend.watch(False)
            return
        queue.disable_notifications()
        budget = _BYTES
        while budget > 0:
            if not self._parked:
                budget -= backend.pull(self._pull)
            frame = backend.peek()
            if frame is None:
                backend.watch(True)
                break
            if self._suits(frame) and not self._deliver(queue, frame):
                backend.watch(False)
                break
            backend.consume()
            budget -= max(len(frame), _BYTES // _FRAMES)
        else:
            self.kick(RX)
        self.notify_used(RX)

    def _suits(self, frame: memoryview) -> bool:
        """Return whether the driver can take a frame. One that waited in the host may have offloads
        that only the driver before a reset had agreed to."""
        if len(frame) < HEADER + MIN_FRAME:
            return False
        if not (frame[0] or frame[1]):
            return True
        accepted, gso = self.driver_features, frame[1]
        if not accepted & F_GUEST_CSUM:
            frame[0] &= HDR_NEEDS_CSUM  # anything else is a hint
            return not (frame[0] or gso)
        if gso & GSO_ECN and not accepted & F_GUEST_ECN:
            return False
        return not gso or bool(accepted & _SEGMENTED.get(gso & ~GSO_ECN, 0))

    def _pull(self, fd: int, buffer: memoryview) -> tuple[int, int]:
        return fastpath.receive(
            self.queues[RX],
            fd,
            buffer,
            HEADER + MIN_FRAME,
            mergeable=bool(self.driver_features & F_MRG_RXBUF),
            # A driver that took all that is offered takes any frame, and any driver a plain one.
            plain=bool(self.features & ~self.driver_features & GUEST_OFFLOADS),
            budget=_BYTES,
            least=_BYTES // _FRAMES,
        )

    def _deliver(self, queue: Queue, frame: memoryview) -> bool:
        """Put a frame into the driver's buffers; return False if there are not enough yet."""
        parked = self._parked
        mergeable = bool(self.driver_features & F_MRG_RXBUF)
        # Mostly one call does all of it. The second is for buffers that the driver has added
        # meanwhile; it must not keep this going with ever more.
        for _ in range(0 if parked else 2):
            count = fastpath.spread(queue, frame, mergeable=mergeable)
            if count > 0:
                return True
            if not count:
                break
            if not queue.enable_notifications(~count):
                return False
        while self._room < len(frame):
            if parked and (not mergeable or len(parked) == queue.size):
                return True  # there never will be enough: the frame is dropped
            chain = queue.pop()
            if chain is not None:
                if chain.readable:
                    raise GuestError("a receive buffer that is for reading")
                size = chain.writable_size
                parked.append((chain, size))
                self._room += size
            elif not queue.enable_notifications():
                return False
        self._fill(queue, frame)
        return True

    def _fill(self, queue: Queue, frame: memoryview) -> None:
        used: list[tuple[int, int]] = []
        rest = len(frame)
        for chain, size in self._parked:
            if not rest:
                break
            used.append((chain.head, min(size, rest)))
            rest -= used[-1][1]
        frame[_NUM_BUFFERS] = len(used).to_bytes(2, "little")
        at = 0
        for (chain, _), (_, written) in zip(self._parked, used, strict=False):
            chain.write(frame[at : at + written])
            at += written
        # The driver takes num_buffers of them at once (5.1.6.3.2).
        queue.push_all(used)
        self._room -= sum([size for _, size in self._parked[: len(used)]])
        del self._parked[: len(used)]

    def _transmit(self, queue: Queue) -> None:
        queue.disable_notifications()
        left = min(queue.size, _FRAMES)
        while left > 0:
            fd = self.backend.frame_fd
            if fd >= 0:
                left -= fastpath.send(queue, fd, HEADER + MIN_FRAME, HEADER + MAX_FRAME, left)
            left -= 1
            chain = queue.pop()
            if chain is None:
                if not queue.enable_notifications():
                    break
                continue
            try:
                sent = self._send(chain)
                if sent:
                    queue.push(chain.head, 0)
            except RamError:
                queue.unpop()
                raise
            if not sent:
                queue.unpop()  # until handle_writable
                break
        else:
            self.kick(TX)
        self.notify_used(TX)

    def _send(self, chain: Chain) -> bool:
        size = chain.readable_size
        if size < HEADER:
            raise GuestError(f"a frame of {size} bytes, without its header")
        if not HEADER + MIN_FRAME <= size <= HEADER + MAX_FRAME:
            return True
        parts = chain.readable_views()
        if len(parts) >= MAX_PARTS:
            parts = [memoryview(chain.read(size))]
        try:
            return self.backend.send(parts)
        except OSError as error:
            if error.errno != errno.EFAULT:
                raise
            raise chain.find_lack() from None

    # ---- what the driver was told ----------------------------------------------------------

    def _set_offloads(self, accepted: int) -> None:
        self.backend.set_offloads(
            csum=bool(accepted & F_GUEST_CSUM),
            tso4=bool(accepted & F_GUEST_TSO4),
            tso6=bool(accepted & F_GUEST_TSO6),
            ecn=bool(accepted & F_GUEST_ECN),
        )

    def _update_config(self) -> None:
        # Fields of features that are not offered do not exist, but have their places.
        self.config = _CONFIG.pack(self.mac, self.status, 0, self.mtu)
