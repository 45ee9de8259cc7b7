"""Why KVM_RUN came back: one small class per exit reason that pyvmm knows, decoded once
(KVM API, section 5). An exit is valid until the vCPU's next KVM_RUN, which may make another one of
the same object."""

from __future__ import annotations

import struct

from pyvmm._native import ffi, lib

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


class Interrupted:
    """A signal or ``immediate_exit`` ended KVM_RUN: pending accesses are complete."""

    __slots__ = ()


class Io:
    """IN, OUT, INS or OUTS. For input, ``data`` is what the guest gets on the next KVM_RUN.

    :ivar port: the port; the same for all of ``count`` items
    :ivar size: bytes of an item: 1, 2 or 4
    :ivar data: writable buffer of ``count * size`` bytes in the kvm_run mapping
    """

    __slots__ = ("count", "data", "is_write", "port", "size")

    def __init__(self, is_write: bool, port: int, size: int, count: int, data: memoryview) -> None:
        self.is_write = is_write
        self.port = port
        self.size = size
        self.count = count
        self.data = data


class Mmio:
    """An access to an address without memory; of up to 8 bytes, not across a page.

    :ivar data: writable buffer of the access's size in the kvm_run mapping
    """

    __slots__ = ("data", "gpa", "is_write", "size")

    def __init__(self, is_write: bool, gpa: int, data: memoryview) -> None:
        self.is_write = is_write
        self.gpa = gpa
        self.size = len(data)
        self.data = data


class Shutdown:
    """A triple fault: the processor has shut itself down."""

    __slots__ = ()


class Halt:
    """HLT, where no in-kernel LAPIC waits for the interrupt."""

    __slots__ = ()


class SystemEvent:
    """The guest asked the hypervisor for a reset or shutdown, or reported a crash."""

    __slots__ = ("type",)

    def __init__(self, run: Any) -> None:
        self.type = run.exit.system_event.type


class KvmInternalError:
    """KVM cannot go on, most often because its emulator does not know an instruction.

    :ivar suberror: a KVM_INTERNAL_ERROR number
    :ivar data: what KVM adds to it; for emulation: flags, length and bytes
    """

    __slots__ = ("data", "suberror")

    def __init__(self, run: Any) -> None:
        internal = run.exit.internal
        self.suberror = internal.suberror
        self.data = list(internal.data[0 : min(internal.ndata, 16)])

    def __str__(self) -> str:
        kind = "emulation failure" if self.suberror == lib.KVM_INTERNAL_ERROR_EMULATION else "error"
        words = " ".join(f"{word:#x}" for word in self.data)
        return f"KVM internal error, suberror {self.suberror} ({kind}) {words}".rstrip()


class FailEntry:
    """The processor refused to enter the guest."""

    __slots__ = ("reason",)

    def __init__(self, run: Any) -> None:
        self.reason = run.exit.fail_entry.hardware_entry_failure_reason

    def __str__(self) -> str:
        return f"KVM cannot enter the guest, hardware reason {self.reason:#x}"


class Unknown:
    """An exit reason that pyvmm does not ask for."""

    __slots__ = ("reason",)

    def __init__(self, reason: int) -> None:
        self.reason = reason

    def __str__(self) -> str:
        return f"KVM exit with reason {self.reason}, which pyvmm does not handle"


_EXIT_IO, _EXIT_MMIO, _OUT = lib.KVM_EXIT_IO, lib.KVM_EXIT_MMIO, lib.KVM_EXIT_IO_OUT

INTERRUPTED = Interrupted()
SHUTDOWN = Shutdown()
HALT = Halt()

Exit = (
    Interrupted | Io | Mmio | Shutdown | Halt | SystemEvent | KvmInternalError | FailEntry | Unknown
)


# Of struct kvm_run: where what differs from exit to exit is, and its form for io and mmio.
_UNION_AT = ffi.offsetof("struct pyvmm_run", "exit")
_IO = struct.Struct("<BBHIQ")
_MMIO = struct.Struct("<Q8xIB")
_REASON_AT = ffi.offsetof("struct pyvmm_run", "exit_reason") // 4


class Decoder:
    """Finds out why one vCPU's KVM_RUN came back.

    :param base: its kvm_run mapping, ``char *``
    :param size: bytes of it
    """

    __slots__ = ("_io", "_items", "_mapping", "_mmio", "_mmio_items", "_run", "_words")

    def __init__(self, base: Any, size: int) -> None:
        # All of it made once: with every exit it would take as long as all the rest.
        self._run = run = ffi.cast("struct pyvmm_run *", base)
        self._mapping = mapping = memoryview(ffi.buffer(base, size))
        self._words = mapping.cast("I")
        self._io = Io(False, 0, 1, 1, mapping[:0])
        self._mmio = Mmio(False, 0, mapping[:0])
        # Data of one item: where and how large it is -> its bytes.
        self._items: dict[tuple[int, int], memoryview] = {}
        # MMIO's data is in struct kvm_run itself, and at most 8 bytes: KVM splits longer accesses.
        data = memoryview(ffi.buffer(run.exit.mmio.data))
        self._mmio_items = [data[:length] for length in range(9)]

    def decode(self) -> Exit:
        """Return why KVM_RUN came back; the most frequent reasons are looked at first."""
        reason = self._words[_REASON_AT]
        if reason == _EXIT_IO:
            direction, size, port, count, at = _IO.unpack_from(self._mapping, _UNION_AT)
            io = self._io
            io.is_write, io.port, io.size, io.count = direction == _OUT, port, size, count
            # Behind struct kvm_run. KVM takes input from there at the next KVM_RUN.
            data = self._items.get((at, size)) if count == 1 else None
            if data is None:
                data = self._mapping[at : at + size * count]
                if count == 1:
                    self._items[at, size] = data
            io.data = data
            return io
        if reason == _EXIT_MMIO:
            mmio = self._mmio
            mmio.gpa, size, is_write = _MMIO.unpack_from(self._mapping, _UNION_AT)
            mmio.is_write, mmio.size, mmio.data = bool(is_write), size, self._mmio_items[size]
            return mmio
        run = self._run
        # With the irqchip in the kernel nobody asks for an interrupt window. After either exit no
        # access waits for its completion.
        if reason in (lib.KVM_EXIT_INTR, lib.KVM_EXIT_IRQ_WINDOW_OPEN):
            return INTERRUPTED
        if reason == lib.KVM_EXIT_SHUTDOWN:
            return SHUTDOWN
        if reason == lib.KVM_EXIT_HLT:
            return HALT
        if reason == lib.KVM_EXIT_SYSTEM_EVENT:
            return SystemEvent(run)
        if reason == lib.KVM_EXIT_INTERNAL_ERROR:
            return KvmInternalError(run)
        if reason == lib.KVM_EXIT_FAIL_ENTRY:
            return FailEntry(run)
        return Unknown(reason)
