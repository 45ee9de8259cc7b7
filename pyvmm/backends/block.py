"""Disk images: raw regular files and block devices, read and written in place.

Main loop thread: opening, closing. Any thread: reads, writes and the like, which block for as
long as the host takes, and raise OSError. The buffers are views of guest memory: the kernel
copies (or, with O_DIRECT, transfers) straight between them and the disk image. Left out: resizing,
and formats that are more than the disk's own bytes.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import stat
import struct

from pyvmm._native import copy, lib
from pyvmm.backends import locking
from pyvmm.backends.block_config import SECTOR
from pyvmm.cpr.handover import BLOCK
from pyvmm.errors import ConfigError, HostError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from pyvmm.backends.block_config import BlockConfig
    from pyvmm.cpr.handover import Handover

    Buffers = list[memoryview]
    Call = Callable[[Buffers, int], int]

MAX_BLOCK = 4096
_IOV_MAX = 1024  # limits.h; more buffers in one call are EINVAL
_BOUNCE = 1 << 20
_ZEROES = bytes(1 << 20)
_TMPFS = 0x01021994  # linux/magic.h
# linux/fs.h
_BLKDISCARD = 0x1277
_BLKSSZGET = 0x1268

#: First bytes of disk images that are not raw.
_MAGICS = {
    b"QFI\xfb": "qcow2",
    b"KDMV": "vmdk",
    b"vhdxfile": "vhdx",
    b"conectix": "vpc",
    b"<<< ": "vdi",
    b"QED\0": "qed",
}


class BlockFile:
    """One open disk image.

    :ivar size: bytes, a multiple of 512: the last sector of a file may lie beyond its end
    :ivar alignment: bytes; offsets and lengths of requests must be multiples
    :ivar is_device: whether it is a block device
    :ivar lost: the error of an fdatasync that failed: flushes fail from then on, since the
        kernel tells only once that it lost something; 0 if none did
    :ivar is_memory: whether nothing on it ever waits (tmpfs)
    """

    def __init__(self, config: BlockConfig, handover: Handover) -> None:
        """Open the disk image, or take it over from the image before; lock it.

        :raises ConfigError: it cannot be opened, is in use, or is not what the options say
        :raises HostError: what was inherited is not this disk image
        :raises MigrationError: the image before did not hand it over: by now the path may be of
            another file, or somebody else may use it
        """
        self.config = config
        self.read_only = config.read_only
        self._parcel = handover.parcel(BLOCK, config.id)
        self.lost = 0
        inherited = self._parcel.require(f"disk image of {config.id}")
        self.fd = _open(config) if inherited is None else inherited
        try:
            was_direct = inherited is not None and self._check_adopted()
            self._set_up(fresh=inherited is None, probed=was_direct)
        except BaseException:
            self._parcel.close(self.fd)
            raise
        self._parcel.keep(self.fd)

    def close(self) -> None:
        """Close the disk image; the locks go with its descriptor."""
        self._parcel.close(self.fd)

    # ---- requests --------------------------------------------------------------------------

    def read(self, buffers: Buffers, offset: int) -> None:
        """Fill the buffers from ``offset``; what the last sector lacks in the file is zeroes."""

        def call(part: Buffers, at: int) -> int:
            return os.preadv(self.fd, part, at)

        done = self._transfer(call, buffers, offset, reading=True)
        total = sum(map(len, buffers))
        if done == total:
            return
        if offset + done < self._end:
            raise OSError(errno.EIO, "the image has become shorter")
        for buffer in _slice(buffers, done, total):
            buffer[:] = bytes(len(buffer))

    def read_cached(self, buffers: Buffers, offset: int) -> bool:
        """Do as :meth:`read` if that takes no waiting; return whether it was done."""
        if self.is_memory:
            self.read(buffers, offset)
            return True
        if not self._can_try or len(buffers) > _IOV_MAX:
            return False
        try:
            return os.preadv(self.fd, buffers, offset, os.RWF_NOWAIT) == sum(map(len, buffers))
        except BlockingIOError:
            return False

    @property
    def read_flags(self) -> int:
        """Flags of a preadv2 that does not wait; -1 if there are none."""
        if self.is_memory:
            return 0
        return os.RWF_NOWAIT if self._can_try else -1

    @property
    def writes_to_cache(self) -> bool:
        """Whether a write only copies to the host's page cache."""
        return not self.config.direct

    def write(self, buffers: Buffers, offset: int, *, durable: bool = False) -> None:
        """Write the buffers to ``offset``.

        :param durable: to the disk itself, not only to the cache
        """
        flags = os.RWF_DSYNC if durable and not self.config.no_flush else 0
        if len(buffers) == 1 and not self.config.direct:
            # Nearly always this is all; if it was cut short, it is begun anew.
            done = os.pwritev(self.fd, buffers, offset, flags)
            if done == len(buffers[0]):
                return

        def call(part: Buffers, at: int) -> int:
            return os.pwritev(self.fd, part, at, flags)

        if self._transfer(call, buffers, offset, reading=False) != sum(map(len, buffers)):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def flush(self) -> None:
        """Make durable what was written."""
        if self.config.no_flush or self.read_only:
            return
        if self.lost:
            raise OSError(self.lost, os.strerror(self.lost))
        try:
            os.fdatasync(self.fd)
        except OSError as error:
            if not self.config.direct:
                self.lost = error.errno or errno.EIO
            raise

    def discard(self, offset: int, length: int) -> None:
        """Let the host free the range, whose contents the guest needs no longer."""
        if not self.config.unmap or not length:
            return
        try:
            if self.is_device:
                fcntl.ioctl(self.fd, _BLKDISCARD, struct.pack("QQ", offset, length))
            else:
                self._fallocate(lib.FALLOC_FL_PUNCH_HOLE, offset, length)
        except OSError as error:
            # A hint: an image that cannot free that space keeps it.
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
                raise

    def write_zeroes(self, offset: int, length: int, *, unmap: bool) -> None:
        """Make the range read as zeroes.

        :param unmap: its space may be freed
        """
        if not length:
            return
        hole = unmap and self.config.unmap
        try:
            # Block devices know these, too, since Linux 4.9.
            self._fallocate(
                lib.FALLOC_FL_PUNCH_HOLE if hole else lib.FALLOC_FL_ZERO_RANGE, offset, length
            )
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
                raise
            whole = memoryview(_ZEROES)
            for at in range(0, length, len(_ZEROES)):
                self.write([whole[: length - at]], offset + at)

    # ---- opening ---------------------------------------------------------------------------

    def _set_up(self, *, fresh: bool, probed: bool) -> None:
        config = self.config
        status = os.fstat(self.fd)
        self.is_device = stat.S_ISBLK(status.st_mode)
        if not self.is_device and not stat.S_ISREG(status.st_mode):
            raise _error(config, "it is neither a regular file nor a block device; name one")
        if config.driver and (config.driver == "host_device") != self.is_device:
            other = "host_device" if self.is_device else "file"
            raise _error(config, f"driver={config.driver} is not for it; give driver={other}")
        self._lock(inherited=not fresh)
        if not config.stated and fresh:
            self._refuse_other_formats()
        self._end = os.lseek(self.fd, 0, os.SEEK_END)
        self.size = self._end + -self._end % SECTOR
        fs_type = lib.pyvmm_fs_type(self.fd)
        self.is_memory = fs_type == _TMPFS and not self.is_device and not config.direct
        self._can_try = not config.direct and self._probe_nowait()
        # An update does not probe again: probing reads from the disk, and the guest stands
        # meanwhile. The first probe has judged the guest's block size, which the state carries.
        self.alignment = (
            self._probe_alignment() if config.direct and (self.is_device or not probed) else SECTOR
        )

    def _check_adopted(self) -> bool:
        """Refuse what is not this disk image; set O_DIRECT as the options say now.

        :returns: whether it had that before
        """
        mode = os.O_RDONLY if self.read_only else os.O_RDWR
        flags = fcntl.fcntl(self.fd, fcntl.F_GETFL)
        if flags & os.O_ACCMODE != mode:
            raise HostError(f"inherited disk image {self.config.id} has another access mode")
        wanted = flags | os.O_DIRECT if self.config.direct else flags & ~os.O_DIRECT
        try:
            fcntl.fcntl(self.fd, fcntl.F_SETFL, wanted)
        except OSError as error:
            raise _error(self.config, _mend(error, self.config)) from error
        return bool(flags & os.O_DIRECT)

    def _lock(self, *, inherited: bool) -> None:
        config = self.config
        if config.locking == "off":
            return
        try:
            locking.lock(
                self.fd,
                writing=not config.read_only,
                share_rw=config.share_rw,
                inherited=inherited,
            )
        except locking.InUseError as error:
            if config.read_only:
                mend = "end what writes it, or give share-rw=on to the device"
            elif error.writing:
                mend = "end what writes it"
            else:
                mend = "end what reads it, or give readonly=on"
            raise _error(config, f"{error.strerror}; {mend}") from None
        except OSError as error:
            if error.errno not in locking.UNSUPPORTED:
                raise _error(config, f"{error.strerror} (locking)") from error
            if config.locking == "on":
                raise _error(
                    config, "its file system knows no such locks; give locking=auto or off"
                ) from None

    def _refuse_other_formats(self) -> None:
        page = mmap.mmap(-1, MAX_BLOCK)
        try:
            os.preadv(self.fd, [page], 0)
        except OSError as error:
            raise _error(self.config, _mend(error, self.config)) from error
        for magic, name in _MAGICS.items():
            if page[: len(magic)] == magic:
                raise _error(
                    self.config,
                    f"it looks like {name}, and only raw images are possible; convert it with"
                    " qemu-img convert -O raw (or give format=raw if the guest shall see it so)",
                )

    def _probe_nowait(self) -> bool:
        try:
            os.preadv(self.fd, [bytearray(1)], 0, os.RWF_NOWAIT)
        except BlockingIOError:
            return True
        except OSError:
            return False
        return True

    def _probe_alignment(self) -> int:
        # O_DIRECT takes whole blocks of whatever lies below; what it takes tells their size.
        if self.is_device:
            (size,) = struct.unpack("i", fcntl.ioctl(self.fd, _BLKSSZGET, bytes(4)))
            return int(size)
        page = mmap.mmap(-1, MAX_BLOCK)
        size = SECTOR
        while size < MAX_BLOCK:
            try:
                os.preadv(self.fd, [memoryview(page)[:size]], 0)
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise _error(self.config, _mend(error, self.config)) from error
                size *= 2
            else:
                break
        return size

    # ---- transfers -------------------------------------------------------------------------

    def _transfer(self, call: Call, buffers: Buffers, offset: int, *, reading: bool) -> int:
        """Repeat ``call`` until everything is done or nothing more comes; return the bytes done."""
        total, done = sum(map(len, buffers)), 0
        part = buffers
        while done < total:
            try:
                count = call(part if len(part) <= _IOV_MAX else part[:_IOV_MAX], offset + done)
            except OSError as error:
                if error.errno != errno.EINVAL or not self.config.direct:
                    raise
                # O_DIRECT wants aligned memory, too, which guests need not have.
                count = self._bounce(call, part, offset + done, reading)
            if not count:
                break
            done += count
            if done < total:
                part = _slice(buffers, done, total)
        return done

    def _bounce(self, call: Call, buffers: Buffers, offset: int, reading: bool) -> int:
        """Make one ``call`` on aligned memory, for as much of the buffers as that holds; return the
        bytes done."""
        block = memoryview(mmap.mmap(-1, min(sum(map(len, buffers)), _BOUNCE)))
        theirs = _slice(buffers, 0, len(block))
        if not reading:
            _copy(theirs, block, to_block=True)
        count = call([block], offset)
        if reading:
            _copy(_slice(theirs, 0, count), block, to_block=False)
        return count

    def _fallocate(self, mode: int, offset: int, length: int) -> None:
        result = lib.pyvmm_fallocate(self.fd, mode | lib.FALLOC_FL_KEEP_SIZE, offset, length)
        if result < 0:
            raise OSError(-result, os.strerror(-result))


def _copy(buffers: Buffers, block: memoryview, *, to_block: bool) -> None:
    at = 0
    for buffer in buffers:
        part = block[at : at + len(buffer)]
        if to_block:
            copy(part, buffer)
        else:
            copy(buffer, part)
        at += len(buffer)


def _slice(buffers: Buffers, start: int, end: int) -> Buffers:
    """Return the parts of the buffers that hold bytes ``start`` to ``end`` of the whole."""
    found = []
    at = 0
    for buffer in buffers:
        part = buffer[max(start - at, 0) : max(end - at, 0)]
        if len(part):
            found.append(part)
        at += len(buffer)
    return found


def _open(config: BlockConfig) -> int:
    flags = os.O_RDONLY if config.read_only else os.O_RDWR
    if config.direct:
        flags |= os.O_DIRECT
    try:
        # Without O_NONBLOCK a FIFO or tape would make this wait for ever.
        return os.open(config.filename, flags | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    except OSError as error:
        raise _error(config, _mend(error, config)) from error


def _mend(error: OSError, config: BlockConfig) -> str:
    text = error.strerror or str(error)
    if error.errno in (errno.EACCES, errno.EROFS, errno.EPERM) and not config.read_only:
        return f"{text}; give readonly=on, or the right to write it"
    if error.errno == errno.EINVAL and config.direct:
        return f"{text}; its file system has no O_DIRECT: give cache=writeback"
    return f"{text}; name an image that can be read"


def _error(config: BlockConfig, problem: str) -> ConfigError:
    return ConfigError(f"{config.where}: {config.filename!r}: {problem}")
