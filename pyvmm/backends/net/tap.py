"""``-netdev tap``: an interface of the host, by /dev/net/tun (Linux, networking/tuntap.rst).

Each read and write is one frame with its header, so offloads are the kernel's: what it does
not understand in a header it refuses, and the frame is dropped. A descriptor of a tap can be
handed over by whoever starts pyvmm (``fd=``), who then is the one that needs privileges.
Left out: vhost, several queues, interface scripts.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import struct

from pyvmm._util import log
from pyvmm.backends.net.base import HEADER, MAX_FRAME, NetBackend, skip
from pyvmm.core.eventloop import HANGUP, READABLE, WRITABLE
from pyvmm.errors import ConfigError, VmStateError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from pyvmm.core.eventloop import EventLoop
    from pyvmm.cpr.handover import Handover

TUN_DEVICE = "/dev/net/tun"

# linux/if_tun.h
TUNSETIFF = 0x400454CA
TUNSETOFFLOAD = 0x400454D0
TUNGETIFF = 0x800454D2
TUNSETVNETHDRSZ = 0x400454D8
IFF_TAP = 0x0002
IFF_NO_PI = 0x1000
IFF_VNET_HDR = 0x4000
TUN_F_CSUM = 0x01
TUN_F_TSO4 = 0x02
TUN_F_TSO6 = 0x04
TUN_F_TSO_ECN = 0x08

_IFREQ = struct.Struct("16sH22x")  # struct ifreq: name and flags
LONGEST_NAME = 15
_RECOVER_S = 1.0


class TapBackend(NetBackend):
    """A tap.

    :param ifname: the interface, made if there is none; empty lets the kernel name one
    :param fd: descriptor of a tap that the starter opened; -1 for none
    :param vnet_hdr: whether frames may have offloads
    :param option: the option that asks for it, for errors
    :raises ConfigError: if there can be no such tap
    :raises VmStateError: if the inherited descriptor is no tap
    """

    kind = "tap"

    def __init__(
        self,
        id: str,
        loop: EventLoop,
        handover: Handover,
        *,
        ifname: str = "",
        fd: int = -1,
        vnet_hdr: bool = True,
        option: str = "-netdev tap",
    ) -> None:
        super().__init__(id, loop, handover)
        self._option = option
        self._given = fd
        self._buffer = memoryview(bytearray(HEADER + MAX_FRAME))
        self._held: memoryview | None = None  # a frame that was read and not consumed
        self._wanted = self._full = False
        self._header = 0  # bytes that the interface has before a frame
        inherited = self.parcel.take()
        self.ifname = ifname
        self.fd = fd if inherited is None else inherited
        try:
            if inherited is None and fd >= 0 and self.parcel.is_incoming:
                raise ConfigError(f"{option}: fd={fd}: the interface was deleted; open another")
            if self.fd < 0:
                self.fd = self._open(ifname, vnet_hdr)
        except ConfigError as error:
            if not self.parcel.is_incoming:
                raise
            # It was deleted before the update, which the guest must survive. What the number
            # fd= stands for by now is another's; what the guest was offered stays.
            self.fd = -1
            self.link_up = False
            self.has_offloads = vnet_hdr
            log.say(str(error))
            return
        try:
            flags = self._examine()
            # tap%d lets the kernel choose the number.
            chosen = not ifname or "%" in ifname
            if inherited is not None and not chosen and ifname != self.ifname:
                raise VmStateError(self.parcel.name, f"it is {self.ifname}, not ifname={ifname}")
        except VmStateError as error:
            if inherited is None:
                raise ConfigError(f"{option}: fd={fd}: {error.problem}; give a tap's") from None
            self.parcel.close(inherited)
            raise
        self.has_offloads = bool(flags & IFF_VNET_HDR) and vnet_hdr
        # Without IFF_VNET_HDR nothing stands before a frame; with it 10 bytes, unless the kernel
        # is told another size.
        if flags & IFF_VNET_HDR:
            self._header = HEADER
            fcntl.ioctl(self.fd, TUNSETVNETHDRSZ, struct.pack("i", HEADER))
        os.set_blocking(self.fd, False)
        os.set_inheritable(self.fd, False)
        self.parcel.keep(self.fd)

    @property
    def info(self) -> dict[str, Any]:
        if self._given >= 0:
            return {"ifname": self.ifname, "fd": self._given}
        return {"ifname": self.ifname, "script": "no", "downscript": "no"}

    def peek(self) -> memoryview | None:
        if self._held is None and self.fd >= 0:
            start = HEADER - self._header
            try:
                size = os.readv(self.fd, [self._buffer[start:]])
            except BlockingIOError:
                return None
            except OSError:  # EBADFD: the interface was deleted
                self._lose()
                return None
            self._held = self._buffer[: start + size]
            if start:
                self._held[:HEADER] = bytes(HEADER)
        return self._held

    def consume(self) -> None:
        self._held = None

    def pull(self, receive: Callable[[int, memoryview], tuple[int, int]]) -> int:
        if self._held is not None or self.fd < 0 or not self._header:
            return 0
        result, size = receive(self.fd, self._buffer)
        if size:
            self._held = self._buffer[:size]
        return result

    @property
    def frame_fd(self) -> int:
        return self.fd if self._header else -1

    def send(self, parts: list[memoryview]) -> bool:
        try:
            os.writev(self.fd, parts if self._header else skip(parts, HEADER))
        except BlockingIOError:
            self._full = True
            self._poll()
            return False
        except OSError as error:
            if error.errno == errno.EFAULT:
                raise
            # EINVAL: a header that makes no sense; EIO: the interface is down
        return True

    def start(self) -> None:
        """Nothing to do: what was left to send waits in the guest's memory."""

    def watch(self, wanted: bool) -> None:
        if wanted != self._wanted:
            self._wanted = wanted
            self._poll()

    def set_offloads(self, *, csum: bool, tso4: bool, tso6: bool, ecn: bool) -> None:
        if self._header and self.fd >= 0:
            # The kernel refuses segmentation without checksums, and ECN without segmentation.
            flags = TUN_F_TSO4 * tso4 | TUN_F_TSO6 * tso6
            flags |= TUN_F_TSO_ECN if ecn and flags else 0
            try:
                fcntl.ioctl(self.fd, TUNSETOFFLOAD, (flags | TUN_F_CSUM) if csum else 0)
            except OSError:  # EBADFD: it was deleted, which the loop hears of by itself
                pass

    def save_state(self) -> bytes:
        return b"" if self._held is None else bytes(self._held)

    def load_state(self, state: bytes) -> None:
        if not state:
            return
        if not HEADER <= len(state) <= len(self._buffer):
            raise VmStateError(self.parcel.name, f"a frame of {len(state)} bytes is not possible")
        self._held = self._buffer[: len(state)]
        self._held[:] = state

    def close(self) -> None:
        if self.fd >= 0:
            self.loop.remove(self.fd)
            self.parcel.close(self.fd)
            self.fd = -1

    def _open(self, ifname: str, vnet_hdr: bool) -> int:
        try:
            fd = os.open(TUN_DEVICE, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as error:
            raise ConfigError(
                f"{self._option}: cannot open {TUN_DEVICE}: {error.strerror};"
                " load the module tun, or use -netdev passt"
            ) from error
        flags = IFF_TAP | IFF_NO_PI | (IFF_VNET_HDR if vnet_hdr else 0)
        try:
            fcntl.ioctl(fd, TUNSETIFF, _IFREQ.pack(os.fsencode(ifname), flags))
        except OSError as error:
            os.close(fd)
            name = ifname or "NAME"
            raise ConfigError(
                f"{self._option}: ifname={ifname!r}: {error.strerror}; as root: ip tuntap add"
                f" {name} mode tap user USER (one VM at a time can use it)"
            ) from error
        return fd

    def _examine(self) -> int:
        """Return the flags of the interface behind the descriptor, and set its name."""
        try:
            if not stat.S_ISCHR(os.fstat(self.fd).st_mode):
                raise VmStateError(self.parcel.name, "the descriptor is of no tap")
            name, flags = _IFREQ.unpack(fcntl.ioctl(self.fd, TUNGETIFF, bytes(_IFREQ.size)))
        except OSError:
            raise VmStateError(self.parcel.name, "the descriptor is of no tap") from None
        if not flags & IFF_TAP or not flags & IFF_NO_PI:
            raise VmStateError(
                self.parcel.name, "the interface is no tap without packet information"
            )
        self.ifname = os.fsdecode(name.rstrip(b"\0"))
        return int(flags)

    def _poll(self) -> None:
        events = (READABLE if self._wanted else 0) | (WRITABLE if self._full else 0)
        if self.fd >= 0 and events:
            self.loop.add(self.fd, events, self._handle_ready)
        else:  # an interface that is deleted could not be masked
            self.loop.remove(self.fd)

    def _handle_ready(self, revents: int) -> None:
        if revents & WRITABLE and self._full:
            self._full = False
            self._poll()
            if self.frontend is not None:
                self.frontend.handle_writable()
        if revents & READABLE and self._wanted and self.frontend is not None:
            self.frontend.handle_frames()
        elif revents & HANGUP:
            self._lose()

    def recover(self) -> None:
        self._held = None  # perhaps the frame is to blame
        self.loop.call_later(_RECOVER_S, self._poll)

    def _lose(self) -> None:
        """The interface was deleted. The next image makes it anew."""
        self.close()
        if self.link_up:
            self.link_up = False
            if self.frontend is not None:
                self.frontend.handle_link(False)
