"""The block device (virtio 1.3, 5.2): a disk for the guest, on a disk image.

Left out: several queues, secure erase, zones, lifetime, and the legacy SCSI commands. Requests
are served on the device's own loop. Those that the host answers from its page cache are done
there and then; what has to wait for a disk goes to worker threads, several at a time, and is
returned in the order in which it ends. Data goes directly between guest memory and the file,
and what is most frequent goes without Python: reads and writes that are as they should be and
that the host does at once. Whatever else comes is judged here, once.

What an evil guest can try: requests without header or status, of any type and framing, beyond
the disk's end or not of whole blocks, discards with unknown flags and endless lists, buffers
that it changes meanwhile (it harms its own data), and resets with requests under way (which
wait for these). None of them allocates what the guest chose.

What the host could not do is told to the guest, or pauses it (``werror``, ``rerror``): the
request waits in ``retries``, and with it the driver, until the guest goes on. So does one whose
buffers the host cannot back.
"""

from __future__ import annotations

import errno
import struct
import time

from pyvmm.core.threads import report_crash
from pyvmm.core.workers import Workers
from pyvmm.devices.virtio import fastpath
from pyvmm.devices.virtio.device import VirtioDevice
from pyvmm.errors import ConfigError, GuestError, HostError, RamError
from pyvmm.vmstate.fields import Description, StructArray, boolean, u16, u32, u64

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from pyvmm.backends.block import BlockFile
    from pyvmm.core.eventloop import EventLoop
    from pyvmm.devices.virtio.queue import Chain, Queue
    from pyvmm.vmstate.fields import Record

F_SEG_MAX = 1 << 2
F_RO = 1 << 5
F_BLK_SIZE = 1 << 6
F_FLUSH = 1 << 9
F_TOPOLOGY = 1 << 10
F_CONFIG_WCE = 1 << 11
F_DISCARD = 1 << 13
F_WRITE_ZEROES = 1 << 14

T_IN = 0
T_OUT = 1
T_FLUSH = 4
T_GET_ID = 8
T_DISCARD = 11
T_WRITE_ZEROES = 13

S_OK = 0
S_IOERR = 1
S_UNSUPP = 2

SECTOR = 512
ID_SIZE = 20
UNMAP = 1  # flag of a write-zeroes segment
#: Sectors of a segment, and segments of a request. Where zeroes have to be written, one request
#: must not take so long that a drain does not see its end.
MAX_DISCARD, MAX_DISCARD_SEGMENTS = 1 << 22, 32
MAX_ZEROES, MAX_ZEROES_SEGMENTS = 1 << 19, 1
WORKERS = 16
#: Bytes that are copied on the device's own thread. Copies of more than that go on beside each
#: other, which is worth a change of threads.
INLINE_MAX = 128 << 10
#: Requests that are done at once, before the driver is told and others have their turn.
BATCH = 64
DRAIN_TIMEOUT_S = 10.0
ERROR_INTERVAL_S = 1.0
MAX_ERRNO = 4095

_HEADER = struct.Struct("<I4xQ")
_SEGMENT = struct.Struct("<QII")
# Capacity; size_max, seg_max; geometry; blk_size; topology; writeback; num_queues; the limits
# of discard and write-zeroes with write_zeroes_may_unmap.
_CONFIG = struct.Struct("<QIII I BBHI Bx H III IIB3x")
_WRITEBACK = 32  # offset of that byte

_STATE = [u64("capacity"), u32("block_size"), boolean("writeback"), u32("flush_error")]


def _check_retries(state: Record) -> None:
    heads = [one.head for one in state.retries]
    if len(heads) != len(set(heads)):
        raise ValueError(f"requests {heads} wait twice")


_REQUEST = Description("virtio-blk-request", [u16("head")])
_RETRIES = Description(
    "virtio-blk/retries",
    [u16("retry_count"), StructArray("retries", _REQUEST, "retry_count", 1024)],
    needed=lambda device: device.retries,
    check=_check_retries,
)


class BlkConfig:
    """The properties of one disk.

    :ivar drive: id of the drive, for the operator
    :ivar write_cache: whether the device begins as a write-back cache; None: as the drive says
    :ivar block_size: logical block size in bytes; 0: what the disk image needs
    :ivar physical_block_size: in bytes; 0: the logical one
    :ivar werror: as the drive's; empty: as the drive says
    :ivar rerror: the same
    """

    def __init__(
        self,
        drive: str,
        *,
        serial: str = "",
        write_cache: bool | None = None,
        config_wce: bool = True,
        discard: bool = True,
        write_zeroes: bool = True,
        block_size: int = 0,
        physical_block_size: int = 0,
        queue_size: int = 256,
        werror: str = "",
        rerror: str = "",
    ) -> None:
        self.drive = drive
        self.serial = serial
        self.write_cache = write_cache
        self.config_wce = config_wce
        self.discard = discard
        self.write_zeroes = write_zeroes
        self.block_size = block_size
        self.physical_block_size = physical_block_size
        self.queue_size = queue_size
        self.werror = werror
        self.rerror = rerror


class VirtioBlk(VirtioDevice):
    """The device.

    :param file: the disk image
    :param config: the properties of the ``-device``
    :param on_error: told of what the host could not do: ``read`` or ``write``, why, and what
        follows: ``report``, ``ignore`` or ``stop``; on any thread, about once a second at most
    :ivar capacity: in sectors of 512 bytes, as the guest knows it
    :ivar block_size: logical block size in bytes
    :ivar writeback: the driver's choice: whether writes may wait for a flush
    :ivar retries: requests (their ``head``) that wait for the guest to go on
    :ivar io_status: ``ok``, or why it was paused: ``nospace`` or ``failed``
    :raises ConfigError: a block size that the disk image cannot do
    """

    virtio_id = 2
    name = "virtio-blk-device"
    batch = BATCH
    waits_for_host = True
    vmstate = Description("virtio-blk", _STATE, subsections=[_RETRIES])

    def __init__(
        self,
        loop: EventLoop,
        file: BlockFile,
        config: BlkConfig,
        on_error: Callable[[str, OSError, str], None] = lambda _operation, _error, _action: None,
    ) -> None:
        super().__init__(loop)
        self.file = file
        self.options = config
        self.queue_sizes = (config.queue_size,)
        self.vmstate = Description("virtio-blk", _STATE, check=self._check, subsections=[_RETRIES])
        self._werror = config.werror or file.config.werror
        self._rerror = config.rerror or file.config.rerror
        self.retries: list[Chain | Record] = []
        self.io_status = "ok"
        self.block_size = config.block_size or file.alignment
        if self.block_size % file.alignment:
            raise ConfigError(
                f"-device {self.name}: logical_block_size={self.block_size}: the image of"
                f" {config.drive} has blocks of {file.alignment}; give a multiple"
            )
        self.capacity = file.size // self.block_size * (self.block_size // SECTOR)
        default = file.config.writeback if config.write_cache is None else config.write_cache
        self._default_writeback = self.writeback = default
        self.features = F_SEG_MAX | F_BLK_SIZE | F_FLUSH | F_TOPOLOGY
        self.features |= config.config_wce and F_CONFIG_WCE
        if file.read_only:
            self.features |= F_RO
        else:
            self.features |= (config.discard and F_DISCARD) | (
                config.write_zeroes and F_WRITE_ZEROES
            )
        self._on_error = on_error
        self._told_at = -ERROR_INTERVAL_S
        self._flush_waits = False
        self._workers = Workers(f"blk {config.drive}", WORKERS)

    def properties(self) -> dict[str, Any]:
        return {
            "drive": self.options.drive,
            "serial": self.options.serial,
            "logical_block_size": self.block_size,
            "write-cache": self.writeback,
            "werror": self._werror,
            "rerror": self._rerror,
            "io-status": self.io_status,
            "capacity": self.capacity * SECTOR,
        }

    @property
    def subject(self) -> str:
        return f"disk {self.options.drive} ({self.file.config.filename!r})"

    # ---- configuration space ---------------------------------------------------------------

    @property
    def is_writeback(self) -> bool:
        """Whether a write counts as done before it is durable; never for a driver that cannot
        flush: it takes what is done for durable."""
        negotiated = self.driver_features
        return self.writeback and (not negotiated or bool(negotiated & F_FLUSH))

    def read_config(self, offset: int, size: int) -> bytes:
        physical = max(self.options.physical_block_size, self.block_size)
        block = self.block_size // SECTOR
        config = _CONFIG.pack(
            self.capacity,
            0,
            self.queue_sizes[0] - 2,
            0,
            self.block_size,
            (physical // self.block_size).bit_length() - 1,
            0,
            0,
            0,
            self.is_writeback,
            1,
            MAX_DISCARD,
            MAX_DISCARD_SEGMENTS,
            block,
            MAX_ZEROES,
            MAX_ZEROES_SEGMENTS,
            self.file.config.unmap,
        )
        return config[offset : offset + size]

    def write_config(self, offset: int, data: bytes) -> None:
        if offset != _WRITEBACK or not self.driver_features & F_CONFIG_WCE:
            return
        before, self.writeback = self.writeback, bool(data[0])
        if before and not self.writeback:
            # The driver will not flush any more what was written until now.
            with self.lock:
                # A flush that has not begun yet will do, however often the driver asks.
                if not self._flush_waits:
                    try:
                        self._submit(self._flush_own, T_FLUSH, None)
                        self._flush_waits = True
                    except OSError as error:
                        self._report(T_FLUSH, error, "report")

    def reset(self) -> None:
        self.writeback = self._default_writeback
        self.retries.clear()

    # ---- requests; with the lock held ------------------------------------------------------

    def serve_natively(self, queue: Queue, most: int) -> int:
        """Do the next requests that :meth:`_read` and :meth:`_write` would do at once; return how
        many."""
        file = self.file
        if not file.writes_to_cache:
            return 0  # all of it waits
        return fastpath.serve(
            queue,
            file.fd,
            file.read_flags,
            writable=self.is_writeback and not file.read_only,
            block=self.block_size,
            longest=INLINE_MAX,
            capacity=self.capacity * SECTOR,
            most=most,
        )

    def handle_chain(self, queue: Queue, chain: Chain) -> None:
        size = chain.writable_size - 1
        if size < 0 or chain.readable_size < _HEADER.size:
            raise GuestError("a block request without header or status")
        kind, sector = _HEADER.unpack(chain.read(_HEADER.size))
        try:
            if kind == T_IN:
                status = self._read(chain, sector, size)
            elif kind == T_OUT:
                status = self._write(chain, sector)
            elif kind == T_FLUSH:
                status = self._flush(chain)
            elif kind == T_GET_ID:
                text = self.options.serial.encode().ljust(ID_SIZE, b"\0")
                chain.write(text[:size])
                status = S_OK
            elif kind in (T_DISCARD, T_WRITE_ZEROES):
                status = self._clear(chain, kind)
            else:
                status = S_UNSUPP
        except OSError as error:
            status = self._fail(kind, _bare(error), chain)
        if status is not None:
            self._finish(queue, chain, status)

    def _fail(self, kind: int, error: OSError, chain: Chain) -> int | None:
        """The host could not do it: return the status for the guest; None if it is tried again."""
        if error.errno == errno.EFAULT:
            # Not the disk's: the host cannot back the guest's buffers.
            self.retries.append(chain)
            self.memory.report(chain.find_lack())
            return None
        action = self._rerror if kind == T_IN else self._werror
        if action == "enospc":
            action = "stop" if error.errno == errno.ENOSPC else "report"
        if kind == T_FLUSH and self.file.lost:
            action = "report"  # the kernel has forgotten it: that never gets better
        if action == "stop":
            self.retries.append(chain)
            self.io_status = "nospace" if error.errno == errno.ENOSPC else "failed"
        self._report(kind, error, action)
        return {"report": S_IOERR, "ignore": S_OK}.get(action)

    def _retry(self) -> None:
        if not self.running:
            return  # the next start sees to it
        waiting, self.retries = self.retries, []
        queue = self.queues[0]
        try:
            while waiting:
                chain = queue.retake(waiting[0].head)
                if chain is not None:
                    self.handle_chain(queue, chain)
                waiting.pop(0)
        except RamError:
            self.retries += waiting
            raise
        self.notify_used(0)

    def _read(self, chain: Chain, sector: int, size: int) -> int | None:
        if not self._is_inside(sector, size):
            return S_IOERR
        buffers = _cut_end(chain.writable_views())
        offset = sector * SECTOR
        if size <= INLINE_MAX and self.file.read_cached(buffers, offset):
            return S_OK
        return self._submit(lambda: self.file.read(buffers, offset), T_IN, chain)

    def _write(self, chain: Chain, sector: int) -> int | None:
        size = chain.readable_size - _HEADER.size
        if self.file.read_only or not self._is_inside(sector, size):
            return S_IOERR
        buffers = _cut_start(chain.readable_views(), _HEADER.size)
        offset = sector * SECTOR
        durable = not self.is_writeback
        if size <= INLINE_MAX and self.file.writes_to_cache and not durable:
            self.file.write(buffers, offset)
            return S_OK

        def write() -> None:
            self.file.write(buffers, offset, durable=durable)

        return self._submit(write, T_OUT, chain)

    def _flush(self, chain: Chain) -> int | None:
        if self.file.is_memory:
            return S_OK
        return self._submit(self.file.flush, T_FLUSH, chain)

    def _clear(self, chain: Chain, kind: int) -> int | None:
        size = chain.readable_size - _HEADER.size
        if self.file.read_only:
            return S_IOERR
        feature, sectors, most = F_WRITE_ZEROES, MAX_ZEROES, MAX_ZEROES_SEGMENTS
        if kind == T_DISCARD:
            feature, sectors, most = F_DISCARD, MAX_DISCARD, MAX_DISCARD_SEGMENTS
        if not self.features & feature:
            return S_UNSUPP
        if not size or size % _SEGMENT.size or size > most * _SEGMENT.size:
            return S_IOERR
        segments = list(_SEGMENT.iter_unpack(chain.read(size, skip=_HEADER.size)))
        for sector, count, flags in segments:
            # What a device does not know it must not guess (5.2.6.2).
            if flags & ~UNMAP or (kind == T_DISCARD and flags):
                return S_UNSUPP
            if count > sectors or not self._is_inside(sector, count * SECTOR):
                return S_IOERR
        file, durable = self.file, not self.is_writeback

        def clear() -> None:
            for sector, count, flags in segments:
                if kind == T_DISCARD:
                    file.discard(sector * SECTOR, count * SECTOR)
                else:
                    file.write_zeroes(sector * SECTOR, count * SECTOR, unmap=bool(flags))
            if durable:
                file.flush()

        return self._submit(clear, kind, chain)

    def _is_inside(self, sector: int, size: int) -> bool:
        aligned = not (sector * SECTOR | size) % self.block_size
        return aligned and sector * SECTOR + size <= self.capacity * SECTOR

    def _finish(self, queue: Queue, chain: Chain, status: int) -> None:
        size = chain.writable_size
        chain.write(bytes((status,)), skip=size - 1)
        # The status is the last byte, so whatever lies before it counts as written.
        queue.push(chain.head, size)

    # ---- work that waits for the host ------------------------------------------------------

    def _flush_own(self) -> None:
        self._flush_waits = False
        self.file.flush()

    def _submit(self, call: Callable[[], None], kind: int, chain: Chain | None) -> int | None:
        """Have a worker make ``call`` and then give the chain back to the driver. Return None:
        there is no status yet."""
        self._workers.submit(lambda: self._work(call, kind, chain))
        return None

    def _work(self, call: Callable[[], None], kind: int, chain: Chain | None) -> None:
        failure: OSError | None = None
        try:
            call()
        except OSError as error:
            failure = _bare(error)
        except Exception as error:
            # The guest waits for an answer all the same.
            report_crash(error)
            failure = OSError(errno.EIO, repr(error))
        if chain is not None:
            self.work(self._return, chain, kind, failure)
        elif failure is not None:
            self._report(kind, failure, "report")

    def _return(self, chain: Chain, kind: int, failure: OSError | None) -> None:
        status = S_OK if failure is None else self._fail(kind, failure, chain)
        if status is not None:
            try:
                self._finish(self.queues[0], chain, status)
            except RamError:
                self.retries.append(chain)
                raise
            self.notify_used(0)

    def _report(self, kind: int, error: OSError, action: str) -> None:
        now = time.monotonic()
        # Of several requests that wait the first one stops the guest.
        if now - self._told_at >= ERROR_INTERVAL_S or (action == "stop" and len(self.retries) == 1):
            self._told_at = now
            self._on_error("read" if kind == T_IN else "write", error, action)

    def start(self) -> None:
        self.io_status = "ok"
        if self.retries:
            self.loop.call_soon(lambda: self.work(self._retry))

    def drain(self, timeout_s: float | None = None) -> None:
        if not self._workers.wait(DRAIN_TIMEOUT_S if timeout_s is None else timeout_s):
            raise HostError(self.busy() or f"{self.subject}: requests ended too late")

    def busy(self) -> str:
        count = self._workers.unfinished
        return f"{self.subject}: unfinished requests: {count}" if count else ""

    def close(self) -> None:
        self._workers.close()

    # ---- state -----------------------------------------------------------------------------

    @property
    def retry_count(self) -> int:
        """Length of ``retries``, for the state."""
        return len(self.retries)

    @property
    def flush_error(self) -> int:
        """Why flushes fail for good, as an error number; 0 if they do not."""
        return self.file.lost

    def load(self, state: Record) -> None:
        self.capacity, self.block_size = state.capacity, state.block_size
        self.writeback, self.file.lost = state.writeback, state.flush_error
        self.retries = getattr(state, "retries", [])
        self.io_status = "failed" if self.retries else "ok"

    def _check(self, state: Record) -> None:
        if state.flush_error > MAX_ERRNO:
            raise ValueError(f"flush_error {state.flush_error} is no error number")
        block = state.block_size
        if block & (block - 1) or not self.file.alignment <= block <= 4096:
            raise ValueError(
                f"block_size {block}: the image has blocks of {self.file.alignment} bytes"
            )
        if state.capacity * SECTOR > self.file.size or state.capacity % (block // SECTOR):
            raise ValueError(
                f"capacity {state.capacity}: the image has {self.file.size // SECTOR} sectors"
            )


def _cut_end(views: list[memoryview]) -> list[memoryview]:
    """Return the buffers without their last byte, the status."""
    last = views.pop()
    return [*views, last[:-1]] if len(last) > 1 else views


def _cut_start(views: list[memoryview], count: int) -> list[memoryview]:
    """Return the buffers without their first ``count`` bytes."""
    while views and count >= len(views[0]):
        count -= len(views.pop(0))
    return [views[0][count:], *views[1:]] if count else views


def _bare(error: OSError) -> OSError:
    """Return the same error without its traceback, whose frames hold views of guest memory."""
    return OSError(error.errno or errno.EIO, error.strerror or str(error))
