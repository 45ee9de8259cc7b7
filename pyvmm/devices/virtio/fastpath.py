"""Frames, bytes and blocks between a queue and the host, moved by native code.

What drivers do all the time takes Python longer than the host (_native/virtq.c). These functions
do as many chains of a :class:`Queue` as they can and stop in front of the first that is not for
them: a broken one, one whose memory the host cannot back, one that has to wait. It is left in the
queue, for :meth:`Queue.pop` and the device's own code.

As with the queue's own methods, the caller holds the device's lock, and nothing is done while the
queue is not ready.
"""

from __future__ import annotations

from pyvmm._native import ffi, lib

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from pyvmm.devices.virtio.queue import Queue


def spread(queue: Queue, frame: memoryview, *, mergeable: bool) -> int:
    """Put a network frame, which begins with its header, into the next chains, if each is one
    buffer, and give them back to the driver.

    :param mergeable: whether the driver takes a frame in several of them
    :returns: how many chains that took; 0 if it has to be done with :meth:`Queue.pop`; ``~n`` if
        there are only ``n``, too few, for now
    :raises RamError: the host cannot back the device area; no chain was given back
    """
    if not queue.ready:
        return 0
    source = ffi.from_buffer(frame), len(frame)
    count = lib.pyvmm_spread(*_place(queue), *source, mergeable)
    if count > 0:
        queue.publish(count)
    return count


def receive(
    queue: Queue,
    fd: int,
    buffer: memoryview,
    shortest: int,
    *,
    mergeable: bool,
    plain: bool,
    budget: int,
    least: int,
) -> tuple[int, int]:
    """Read frames from a descriptor, of which each read is a header and its frame, and
    :func:`spread` them, until there is none or one that cannot be spread.

    :param buffer: as long as the longest frame
    :param shortest: bytes; shorter frames are dropped
    :param plain: whether a frame whose header has a flag or is of a segmented frame cannot be
        spread
    :param budget: bytes that are moved at once, about; a frame counts ``least`` at least
    :returns: what was spent of the budget, and the length of a frame that is in the buffer
        and has to be put into chains by other means; 0 if there is none
    """
    if not queue.ready:
        return 0, 0
    received = ffi.new("struct pyvmm_received *")
    target = ffi.from_buffer(buffer), len(buffer)
    how = mergeable, plain, budget, least
    lib.pyvmm_receive(*_place(queue), fd, *target, shortest, *how, received)
    queue.advance(received.chains)
    return received.spent, received.held


def send(queue: Queue, fd: int, shortest: int, longest: int, most: int) -> int:
    """Write the next chains to a descriptor, each with one call, and give them back to the
    driver; a frame that the descriptor refuses for good is dropped.

    :param shortest: bytes; shorter chains are left, as are those longer than ``longest``
    :param most: how many at once
    :returns: how many
    """
    if not queue.ready:
        return 0
    count = lib.pyvmm_send(*_place(queue), fd, shortest, longest, most)
    queue.advance(count)
    return count


def pour(queue: Queue, fd: int, sent: int, *, budget: int, least: int) -> tuple[int, int, bool]:
    """Write the bytes of the next chains to a stream, many with one call, and give those back to
    the driver that were written to their end.

    :param fd: does not block
    :param sent: bytes of the next chain that were written before
    :param budget: bytes that are written at once, about; a chain counts ``least`` at least
    :returns: what was spent of the budget, ``sent`` from now on, and whether the descriptor takes
        no more until it is writable
    """
    if not queue.ready:
        return 0, sent, False
    poured = ffi.new("struct pyvmm_poured *", {"sent": sent})
    lib.pyvmm_pour(*_place(queue), fd, budget, least, poured)
    queue.advance(poured.chains)
    return poured.spent, poured.sent, bool(poured.is_full)


def serve(
    queue: Queue,
    fd: int,
    read_flags: int,
    *,
    writable: bool,
    block: int,
    longest: int,
    capacity: int,
    most: int,
) -> int:
    """Do the next requests of a block device, reads and writes, on a disk, and give them back to
    the driver.

    :param read_flags: flags with which preadv2 does not wait; -1: reads are left
    :param writable: whether writes are not left
    :param block: bytes; requests that are not multiples are left
    :param longest: bytes; longer requests are left, as are those beyond ``capacity``
    :param most: how many at once
    :returns: how many
    """
    if not queue.ready:
        return 0
    disk = ffi.new("struct pyvmm_disk *", (fd, read_flags, writable, block, longest, capacity))
    count = lib.pyvmm_serve(*_place(queue), disk, most)
    queue.advance(count)
    return count


def _place(queue: Queue) -> tuple[Any, int, int]:
    """Return the ``struct pyvmm_ring *`` of a ready queue, and the queue's two indices."""
    regions = queue.memory.regions  # another object after each change of the memory
    if queue.native is None or queue.native[1] is not regions:
        ram = [
            (each.gpa, each.end, ffi.cast("uint8_t *", each.address))
            for each in regions
            if not each.readonly
        ]
        spans = ffi.new("struct pyvmm_span[]", ram)
        table, avail, used = queue.rings
        rings = (
            ffi.cast("uint64_t *", table),
            ffi.cast("uint16_t *", avail),
            ffi.cast("uint32_t *", used),
        )
        ring = (spans, len(ram), queue.size, queue.indirect, *rings)
        queue.native = ffi.new("struct pyvmm_ring *", ring), regions, spans
    return queue.native[0], queue.last_avail_idx, queue.used_idx
