"""What every network back end offers, and what sits on one.

A frame travels with a ``virtio_net_hdr`` before it (virtio 1.3, 5.1.6: 12 bytes), whatever
the back end: it is all zero where a back end has no offloads. Frames are pulled: the front
end takes as many as it has room for, and the rest stays in the kernel. Everything belongs to
the loop's thread, on which the front end's methods are called too, at times from within its own
calls.
"""

from __future__ import annotations

from pyvmm._native import copy
from pyvmm.cpr.handover import NETDEV, Passenger

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from pyvmm.core.eventloop import EventLoop
    from pyvmm.cpr.handover import Handover

#: ``struct virtio_net_hdr`` with num_buffers.
HEADER = 12
#: The longest frame that is passed on (QEMU's limit too), the header not counted.
MAX_FRAME = 4096 + 65536
#: Of preadv(2) and its like: UIO_MAXIOV.
MAX_PARTS = 1024


class NetFrontend:
    """What sits on a back end: a network device."""

    def handle_frames(self) -> None:
        """Frames may be there: take them with ``peek`` and ``consume``, or stop watching."""

    def handle_writable(self) -> None:
        """The back end takes frames again, after a ``send`` that returned False."""

    def handle_link(self, up: bool) -> None:
        """The peer came or went."""


class NetBackend(Passenger):
    """One back end. It touches nothing before :meth:`start`.

    :param id: the name given on the command line
    :param handover: has the parcel of the network back end of that id
    """

    #: ``type`` in ``info network``.
    kind = ""
    #: Whether headers say something: checksum and segmentation offload.
    has_offloads = False
    #: Whether somebody is at the other end.
    link_up = True

    def __init__(self, id: str, loop: EventLoop, handover: Handover) -> None:
        self.id = id
        self.loop = loop
        self.parcel = handover.parcel(NETDEV, id)
        self.frontend: NetFrontend | None = None

    @property
    def info(self) -> dict[str, Any]:
        """What ``info network`` prints behind the type, in QEMU's names."""
        return {}

    def peek(self) -> memoryview | None:
        """Return the next frame with its header, which the caller may read and write until
        :meth:`consume`; None if there is none now."""
        raise NotImplementedError

    def consume(self) -> None:
        """Forget the frame that :meth:`peek` returned: it was passed on, or is to be dropped."""
        raise NotImplementedError

    def pull(self, receive: Callable[[int, memoryview], tuple[int, int]]) -> int:
        """Have ``receive`` read frames, without a :meth:`peek` for each, where the back end can
        do that. A frame that was peeked and not consumed comes first.

        :param receive: reads from a descriptor, of which each read is a header and its frame, into
            a buffer, and passes them on; it returns what it spent of its budget, and the length of
            a frame that it left in the buffer for the next peek; 0 for none
        :returns: what was spent; 0 if nothing was read
        """
        return 0

    @property
    def frame_fd(self) -> int:
        """A descriptor that takes a header and its frame with one writev, which is quicker than
        :meth:`send`; a frame that it does not take goes by that. -1 for none."""
        return -1

    def send(self, parts: list[memoryview]) -> bool:
        """Pass a header and its frame on, at most :data:`MAX_PARTS` parts and
        :data:`MAX_FRAME` bytes; afterwards they are the caller's again.

        :returns: False if it has to be sent again after ``handle_writable``; what nobody
            takes at the other end is dropped
        :raises OSError: EFAULT: the host cannot back a part, and nothing was passed on
        """
        raise NotImplementedError

    def start(self) -> None:
        """Work, at first or again: the state is complete, and the device works. Frames may be there
        already. Idempotent."""
        raise NotImplementedError

    def watch(self, wanted: bool) -> None:
        """Call ``handle_frames`` when frames come; or do not, and leave them where they
        are."""
        raise NotImplementedError

    def set_offloads(self, *, csum: bool, tso4: bool, tso6: bool, ecn: bool) -> None:
        """Set what the guest accepts in the headers of frames that it receives. Any thread."""

    def save_state(self) -> bytes:
        """Return what goes over an exec beside the descriptors."""
        return b""

    def load_state(self, state: bytes) -> None:
        """Take over what :meth:`save_state` gave in the image before; before it starts.

        :raises VmStateError: if it is not possible state
        """

    def recover(self) -> None:
        """One of the loop's calls to this back end failed: go on, but not at once, if the
        same would fail again."""

    def close(self) -> None:
        """Give everything back. Idempotent."""


def skip(parts: list[memoryview], count: int) -> list[memoryview]:
    """Return what is left of *parts* without their first *count* bytes."""
    for index, part in enumerate(parts):
        if len(part) > count:
            return [part[count:], *parts[index + 1 :]]
        count -= len(part)
    return []


def join(parts: list[memoryview]) -> bytes:
    """Return the parts as one.

    :raises OSError: EFAULT: the host cannot back one of them
    """
    whole = memoryview(bytearray(sum(map(len, parts))))
    at = 0
    for part in parts:
        copy(whole[at : at + len(part)], part)
        at += len(part)
    return bytes(whole)
