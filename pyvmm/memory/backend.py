"""Host memory behind guest RAM and ROM: QEMU's memory-backend-memfd, -file and -ram objects.

A backend is one mapping, with a descriptor when it is shared, so that a live update can hand the
same pages to the next process. Left out: NUMA policy, read-only and persistent-memory files, the
shm kind. Created and closed by the main thread; the mapping is used from all of them.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import stat

from pyvmm._native import ffi, lib, poke, touch
from pyvmm._util.sizes import format_size
from pyvmm.errors import ConfigError, HostError, InternalError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pyvmm.memory.config import RamConfig

_PAGE = 4096
HUGE_PAGE = 2 << 20
"""What one entry of x86's second-lowest page tables maps."""
_PROT_NONE, _MAP_NORESERVE = 0, 0x4000  # mmap(2); not in every supported Python's mmap module
_MADV_POPULATE_WRITE = 23  # Linux 5.14; not in the mmap module
_TMPFS, _HUGETLBFS = 0x01021994, 0x958458F6  # statfs(2)
_SEALS = fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL


class RamBackend:
    """One block of host memory, mapped.

    ``name`` is what it is called in states and in what an exec hands over: the object's id, unless
    the machine itself has something of that name.

    ``view`` is the mapping (a writable buffer; KVM gets its address through the buffer protocol),
    which only system calls and ``_native`` may touch: the host may be unable to back a page, which
    they survive; ``address`` where it is, of one huge page or more a multiple of its size, so that
    the host's and KVM's tables can map it by such pages, whose guest addresses have the same
    remainder (``x86.layout``);
    ``fd`` the descriptor to preserve over a live update, None for private anonymous memory;
    ``is_shared`` whether the pages are the descriptor's, so that they outlive this process.
    """

    __slots__ = ("_created", "_mapping", "_start", "address", "config", "fd", "name", "view")

    def __init__(self, config: RamConfig, fd: int | None = None, name: str = "") -> None:
        """Allocate, or with *fd* adopt a descriptor that the process before left.

        An adopted descriptor is never resized: its pages are the guest. :meth:`close` closes it;
        one that is refused stays open, since it may be anything.

        :raises ConfigError: the option's value is refused by the host (path, size, huge pages)
        :raises HostError: no memory, or an adopted descriptor is not this RAM
        """
        self.config = config
        self.name = name or config.id
        self.fd: int | None = None
        self._created = ""
        try:
            if fd is not None:
                self._check_adopted(fd)
                self._map(fd)
            else:
                if config.kind == "memory-backend-file":
                    self._open_file()
                elif config.kind == "memory-backend-memfd" or config.share:
                    self._create_memfd()
                self._map(self.fd)
            self._advise()
            if config.prealloc and fd is None:
                self._populate()
        except OSError as error:
            try:
                raise self._explain(error) from error
            finally:
                self._undo()
        except BaseException:
            self._undo()
            raise
        if fd is not None:
            self.fd = fd

    @property
    def id(self) -> str:
        """The object's id."""
        return self.config.id

    @property
    def size(self) -> int:
        """Bytes."""
        return self.config.size

    @property
    def is_shared(self) -> bool:
        """Whether a live update can keep the pages."""
        return self.config.share and self.fd is not None

    @property
    def is_hugetlb(self) -> bool:
        """Whether it is made of huge pages that the host has reserved."""
        return self.fd is not None and lib.pyvmm_fs_type(self.fd) == _HUGETLBFS

    def write(self, offset: int, data: bytes) -> None:
        """Store *data*, which fits.

        :raises HostError: the host cannot back it
        """
        try:
            poke(self.address + offset, data)
        except OSError:
            raise HostError(self.explain(offset)) from None

    def explain(self, offset: int | None = None, where: str = "") -> str:
        """Return a message: a page could not be had, why, as far as can be told, and what mends it.

        :param offset: of the page, if it is known
        :param where: what is said of it beside the object's name
        """
        config = self.config
        path = f" ({config.mem_path!r})" if config.mem_path else ""
        return f"memory {config.id}{path}{where}: the host cannot back it: {self._shortage(offset)}"

    def _shortage(self, offset: int | None) -> str:
        if self.fd is None:
            return "it has no memory left; free some"
        try:
            size, free = os.fstat(self.fd).st_size, os.fstatvfs(self.fd)
        except OSError as error:
            return f"{error.strerror}; look into its kernel log"
        if size <= (self.size - 1 if offset is None else offset):
            return (
                f"its file has been cut to {format_size(size)}; give it {format_size(self.size)}"
                " again (truncate -s)"
            )
        if self.is_hugetlb:
            return "no huge page is left; reserve more in /proc/sys/vm/nr_hugepages"
        # Without blocks it has no limit: a memfd.
        if free.f_blocks and free.f_bfree * free.f_frsize < _PAGE:
            return "no space left in its file system; free space there"
        return "it reports an error; look into its kernel log"

    @property
    def is_limited(self) -> bool:
        """Whether the host may ever be unable to back a page, short of having no memory at all."""
        return self.fd is not None and (bool(self.config.mem_path) or self.config.hugetlb)

    def may_lack(self) -> bool:
        """Return whether the host may be unable to back a page now."""
        if self.fd is None or not self.is_limited:
            return False
        try:
            status, free = os.fstat(self.fd), os.fstatvfs(self.fd)
        except OSError:
            return True
        if status.st_size < self.size or lib.pyvmm_fs_type(self.fd) != _TMPFS:
            return True  # a disk may have errors
        is_whole = status.st_blocks * 512 >= self.size
        return bool(free.f_blocks) and not free.f_bfree and not is_whole

    def close(self) -> None:
        """Unmap and close. Nobody may hold a view of the memory any longer."""
        try:
            self.view.release()
            self._mapping.close()
        except BufferError as error:
            raise InternalError(f"memory {self.id} is closed while in use") from error
        if self.fd is not None:
            os.close(self.fd)
            self.fd = None

    def _create_memfd(self) -> None:
        config = self.config
        flags = os.MFD_CLOEXEC
        if config.seal:
            flags |= os.MFD_ALLOW_SEALING
        if config.hugetlb:
            flags |= os.MFD_HUGETLB
            if config.hugetlbsize:
                flags |= (config.hugetlbsize.bit_length() - 1) << os.MFD_HUGE_SHIFT
        self.fd = fd = os.memfd_create(config.id, flags)
        os.ftruncate(fd, config.size)
        # A size that can change turns a guest access into SIGBUS here.
        if config.seal:
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)

    def _open_file(self) -> None:
        """Open or create the backing file; QEMU's rules for its size.

        An empty file takes the size; a larger one is used up to it; a smaller one is refused,
        since it is likely something else. In a directory the file has no name from the start.
        """
        config = self.config
        path = config.mem_path
        where = f"-object {config.kind},id={config.id}"
        if os.path.isdir(path):
            self.fd = fd = os.open(path, os.O_RDWR | os.O_TMPFILE | os.O_CLOEXEC, 0o600)
        else:
            # Without O_NONBLOCK the open of a device or FIFO could wait for ever.
            flags = os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK
            try:
                self.fd = fd = os.open(path, flags)
            except FileNotFoundError:
                self.fd = fd = os.open(path, flags | os.O_CREAT | os.O_EXCL, 0o600)
                self._created = path
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise ConfigError(
                f"{where}: {path!r} is neither a regular file nor a directory;"
                " name one on tmpfs or hugetlbfs"
            )
        if status.st_size == 0:
            os.ftruncate(fd, config.size)
        elif status.st_size < config.size:
            raise ConfigError(
                f"{where}: {path!r} has {format_size(status.st_size)}, less than"
                f" size={format_size(config.size)}; give its size, or remove the file"
            )

    def _check_adopted(self, fd: int) -> None:
        """Refuse a descriptor that is not this RAM before mapping it: later it would be SIGBUS."""
        name = f"inherited memory {self.id} (descriptor {fd})"
        try:
            status = os.fstat(fd)
            writable = fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDWR
        except (OSError, OverflowError) as error:
            raise HostError(f"{name} is not open") from error
        if not stat.S_ISREG(status.st_mode) or not writable:
            raise HostError(f"{name} is not a writable memory file")
        exact = self.config.kind != "memory-backend-file"
        if status.st_size < self.config.size or (exact and status.st_size != self.config.size):
            raise HostError(
                f"{name} has {format_size(status.st_size)} where size={format_size(self.size)};"
                " give the size that the guest was started with"
            )
        if exact and self.config.seal:
            held = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
            if held & _SEALS != _SEALS:
                raise HostError(f"{name} is not sealed against resizing")

    def _map(self, fd: int | None) -> None:
        """Map the descriptor, or private memory, where it is aligned: the kernel does that by
        itself only for files that get huge pages without being asked."""
        align = mmap.PAGESIZE if self.size < HUGE_PAGE else HUGE_PAGE
        if fd is not None:
            if os.fstat(fd).st_size < self.size:
                raise HostError(f"memory {self.id}: the file shrank while it was mapped")
            if lib.pyvmm_fs_type(fd) == _HUGETLBFS:
                align = max(align, os.fstatvfs(fd).f_bsize)  # its page
        # Addresses alone, which cost no memory; what is left over at both ends stays so.
        room = (self.size + align - 1) // align * align + align - mmap.PAGESIZE
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
        self._mapping = mmap.mmap(-1, room, flags, _PROT_NONE)
        self._start = -_address(self._mapping) % align
        place = memoryview(self._mapping)[self._start : self._start + self.size]
        memory = ffi.from_buffer("char[]", place)
        result = lib.pyvmm_map_over(memory, self.size, -1 if fd is None else fd, self.config.share)
        if result < 0:
            raise OSError(-result, os.strerror(-result))
        # It can be written to, which its place could not. It keeps the place from being closed.
        self.view = memoryview(ffi.buffer(memory))
        self.address = _address(self.view)

    def _advise(self) -> None:
        config = self.config
        # A helper that is forked must not share the guest, nor copy its page tables.
        self._madvise(mmap.MADV_DONTFORK)
        optional = [] if config.hugetlb else [mmap.MADV_HUGEPAGE]
        # Huge pages keep page tables small; tearing those down is part of a live update's pause.
        if config.merge:
            optional.append(mmap.MADV_MERGEABLE)
        if not config.dump:
            optional.append(mmap.MADV_DONTDUMP)
        for advice in optional:
            try:
                self._madvise(advice)
            except OSError as error:
                if error.errno != errno.EINVAL:  # a kernel without THP or KSM
                    raise

    def _populate(self) -> None:
        # Blocks first: writing to a page of a full tmpfs is SIGBUS, this is ENOSPC.
        if self.fd is not None and self.config.share:
            os.posix_fallocate(self.fd, 0, self.size)
        try:
            self._madvise(_MADV_POPULATE_WRITE)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            touch(self.address, self.size)

    def _madvise(self, advice: int) -> None:
        self._mapping.madvise(advice, self._start, self.size)

    def _undo(self) -> None:
        if self.fd is not None:
            os.close(self.fd)
            self.fd = None
        if self._created:
            os.unlink(self._created)

    def _explain(self, error: OSError) -> ConfigError | HostError:
        config = self.config
        what = f"-object {config.kind},id={config.id},size={format_size(config.size)}"
        reason = os.strerror(error.errno or 0)
        if error.errno == errno.EFAULT and self.fd is not None and not config.hugetlb:
            return ConfigError(self.explain())
        if config.hugetlb:
            return ConfigError(
                f"{what}: {reason}; reserve huge pages of that size in /proc/sys/vm/nr_hugepages,"
                " or give hugetlb=off"
            )
        if config.kind == "memory-backend-file" and error.errno not in (errno.ENOMEM, errno.EMFILE):
            mend = "free space there" if error.errno == errno.ENOSPC else "name another mem-path"
            return ConfigError(f"{what}: {config.mem_path!r}: {reason}; {mend}")
        if error.errno in (errno.ENOMEM, errno.ENOSPC, errno.EFAULT):
            return HostError(f"{what}: the host has not that much memory; give a smaller size")
        return HostError(f"{what}: {reason}")


def _address(buffer: mmap.mmap | memoryview) -> int:
    return int(ffi.cast("uintptr_t", ffi.from_buffer(buffer)))
