"""A vCPU: its registers and KVM_RUN (KVM API, sections 4 and 5).

KVM serialises a vCPU's ioctls with KVM_RUN, so while the guest runs a call from another
thread blocks until the next exit: whoever wants the state stops the vCPU first.
"""

from __future__ import annotations

import errno
import os

from pyvmm._native import ffi, ioctl, ioctl_value, lib
from pyvmm.errors import KvmError
from pyvmm.kvm import exits

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from typing import Any

    from pyvmm.kvm.system import System

#: KVM_X86_REG_KVM(KVM_REG_GUEST_SSP): the shadow stack pointer (Linux 6.18).
REG_GUEST_SSP = 0x2030_0003_0000_0000

MAX_MSRS_PER_CALL = 255  # KVM refuses MAX_IO_MSRS, which is 256


class MsrBlock:
    """Registers that are read of one vCPU after the other: KVM's requests for them, made once.

    :param indices: which; each vCPU should have all of them
    """

    __slots__ = ("indices", "requests")

    def __init__(self, indices: list[int]) -> None:
        self.indices = indices
        self.requests = []
        for at in range(0, len(indices), MAX_MSRS_PER_CALL):
            chunk = indices[at : at + MAX_MSRS_PER_CALL]
            self.requests.append(bytes(ffi.buffer(_msr_buffer(chunk, [0] * len(chunk)))))


class Vcpu:
    """The vCPU descriptor and its kvm_run mapping.

    :param fd: from KVM_CREATE_VCPU, owned from now on
    :param index: its number and APIC id
    :param event_flags: as the VM's ``event_flags``
    :ivar xsave_size: bytes of an XSAVE area on this host
    :ivar has_xsave2: whether KVM_GET_XSAVE2 reads it
    :ivar cpuid: the entries of the CPUID that was set, as the kernel lays them out
    :ivar listed_msrs: what KVM lists as a vCPU's state
    :ivar state_msrs: what was found to be the state of this one; None until somebody looked
    """

    def __init__(self, fd: int, index: int, system: System, event_flags: int = 0) -> None:
        self.fd = fd
        self.index = index
        self.event_flags = event_flags
        # KVM shares it with this process: struct kvm_run, and behind it the page that the data of
        # port accesses goes through.
        self._size = system.get_vcpu_mmap_size()
        self._base = ffi.cast("char *", lib.pyvmm_map(fd, self._size))
        if self._base == ffi.NULL:
            raise KvmError("mmap of kvm_run", errno.ENOMEM, f"vCPU {index}")
        self._run = ffi.cast("struct pyvmm_run *", self._base)
        self._exits = exits.Decoder(self._base, self._size)
        #: What its thread finds between two KVM_RUNs (``struct pyvmm_gate``).
        self.gate = ffi.new("struct pyvmm_gate *", {"run": self._run})
        # What it did elsewhere, and no device has seen yet, and who tells of that.
        self._brought: list[exits.Exit] = []
        self._ask_brought: Callable[[], list[exits.Exit]] = list
        # KVM_SET_XSAVE takes no size: KVM reads as much as its own area has. That is a page, or
        # what KVM_CAP_XSAVE2 tells (since Linux 5.17): more only with AMX.
        self.xsave_size = max(system.check_extension("KVM_CAP_XSAVE2"), 4096)
        self.has_xsave2 = bool(system.check_extension("KVM_CAP_XSAVE2"))
        self.listed_msrs = system.msr_indices
        self.cpuid = b""
        self.state_msrs: MsrBlock | None = None

    def run(self) -> exits.Exit:
        """KVM_RUN: enter the guest until something wants attention that native code cannot give
        it (``answers``); return what that is. Never retried here.

        An access (Io, Mmio) is only completed by the next KVM_RUN, which takes what a read is
        answered with: before that the registers are not those of a whole instruction, and no
        state may be saved (section 5).

        :raises KvmError: if KVM refuses
        """
        if self._brought:
            return self._brought.pop(0)
        result = lib.pyvmm_run(self.fd, self.gate)
        # Only now the mapping tells why: after EINTR it may hold the reason of an earlier exit.
        if result == 0:
            return self._exits.decode()
        if result > 0:
            self.arrive()
            return self.run()
        # EAGAIN: a vCPU that waited for its start-up message was woken.
        if result in (-errno.EINTR, -errno.EAGAIN):
            return exits.INTERRUPTED
        raise KvmError("KVM_RUN", -result, f"vCPU {self.index}")

    def await_at(self, slot: Any, ask: Callable[[], list[exits.Exit]]) -> None:
        """Have :meth:`run` wait until the vCPU gets here, from elsewhere.

        :param slot: its ``struct pyvmm_slot``, where that is told
        :param ask: returns what it did there that no device has seen yet: what :meth:`run` returns
            first
        """
        self._ask_brought = ask
        self.gate.slot = slot

    def arrive(self) -> None:
        """The vCPU is here: take what it brings, once."""
        self.gate.slot = ffi.NULL
        self._brought += self._ask_brought()
        self._ask_brought = list

    @property
    def brings(self) -> bool:
        """Whether there is something of that left."""
        return bool(self._brought)

    @property
    def mapping(self) -> Any:
        """The kvm_run mapping, ``struct pyvmm_run *``."""
        return self._run

    def set_immediate_exit(self, value: bool) -> None:
        """Set or clear immediate_exit: while it is set, KVM_RUN completes a pending access and
        comes back with EINTR without entering the guest."""
        self._run.immediate_exit = value

    def get_regs(self) -> Any:
        """KVM_GET_REGS: return a ``struct kvm_regs``."""
        return self._get("KVM_GET_REGS", "struct kvm_regs *")

    def set_regs(self, regs: Any) -> None:
        """KVM_SET_REGS; drops pending exceptions, so the events are set after it."""
        ioctl(self.fd, "KVM_SET_REGS", regs)

    def get_sregs(self) -> Any:
        """KVM_GET_SREGS: return a ``struct kvm_sregs``."""
        return self._get("KVM_GET_SREGS", "struct kvm_sregs *")

    def set_sregs(self, sregs: Any) -> None:
        """KVM_SET_SREGS; carries APIC_BASE, which selects xAPIC or x2APIC, so the LAPIC is set
        after it."""
        ioctl(self.fd, "KVM_SET_SREGS", sregs)

    def get_pdptrs(self) -> list[int] | None:
        """KVM_GET_SREGS2: return what KVM_GET_SREGS lacks, the page-directory-pointer registers;
        None unless PAE paging is on (or if the host's Linux is older than 5.14)."""
        sregs = ffi.new("struct kvm_sregs2 *")
        try:
            ioctl(self.fd, "KVM_GET_SREGS2", sregs)
        except KvmError:
            return None
        return list(sregs.pdptrs) if sregs.flags & lib.KVM_SREGS2_FLAGS_PDPTRS_VALID else None

    def set_sregs_and_pdptrs(self, sregs: Any, pdptrs: list[int]) -> None:
        """KVM_SET_SREGS2. KVM_SET_SREGS would read the four pointers from guest memory, which by
        now may hold others than the CPU has loaded."""
        both = ffi.new("struct kvm_sregs2 *")
        # The two begin alike. What follows differs: SREGS2 lacks the bitmap of the interrupt that
        # is being injected, which KVM_SET_VCPU_EVENTS gives.
        ffi.memmove(both, sregs, ffi.offsetof("struct kvm_sregs2", "flags"))
        both.flags = lib.KVM_SREGS2_FLAGS_PDPTRS_VALID
        both.pdptrs = pdptrs
        ioctl(self.fd, "KVM_SET_SREGS2", both)

    def get_one_reg(self, id: int) -> int:
        """KVM_GET_ONE_REG: return a register of 64 bits.

        :raises KvmError: EINVAL if the vCPU has no such register
        """
        value = ffi.new("uint64_t *")
        ioctl(self.fd, "KVM_GET_ONE_REG", _one_reg(id, value), f"register {id:#x}")
        return int(value[0])

    def set_one_reg(self, id: int, value: int) -> None:
        """KVM_SET_ONE_REG."""
        new = ffi.new("uint64_t *", value)
        ioctl(self.fd, "KVM_SET_ONE_REG", _one_reg(id, new), f"register {id:#x}")

    def get_debugregs(self) -> Any:
        """KVM_GET_DEBUGREGS: return a ``struct kvm_debugregs``."""
        return self._get("KVM_GET_DEBUGREGS", "struct kvm_debugregs *")

    def set_debugregs(self, debugregs: Any) -> None:
        """KVM_SET_DEBUGREGS."""
        ioctl(self.fd, "KVM_SET_DEBUGREGS", debugregs)

    def get_xcrs(self) -> Any:
        """KVM_GET_XCRS: return a ``struct kvm_xcrs``."""
        return self._get("KVM_GET_XCRS", "struct kvm_xcrs *")

    def set_xcrs(self, xcrs: Any) -> None:
        """KVM_SET_XCRS."""
        ioctl(self.fd, "KVM_SET_XCRS", xcrs)

    def get_lapic(self) -> bytes:
        """KVM_GET_LAPIC: return the 1 KiB register page."""
        return bytes(ffi.buffer(self._get("KVM_GET_LAPIC", "struct kvm_lapic_state *")))

    def set_lapic(self, page: bytes) -> None:
        """KVM_SET_LAPIC."""
        state = ffi.new("struct kvm_lapic_state *")
        ffi.buffer(state)[:] = page
        ioctl(self.fd, "KVM_SET_LAPIC", state)

    def get_mp_state(self) -> int:
        """KVM_GET_MP_STATE: return a KVM_MP_STATE number. Delivers a pending INIT or SIPI, which
        may change registers, so it is read before them."""
        return int(self._get("KVM_GET_MP_STATE", "struct kvm_mp_state *").mp_state)

    def set_mp_state(self, mp_state: int) -> None:
        """KVM_SET_MP_STATE."""
        ioctl(self.fd, "KVM_SET_MP_STATE", ffi.new("struct kvm_mp_state *", [mp_state]))

    def get_vcpu_events(self) -> Any:
        """KVM_GET_VCPU_EVENTS: return a ``struct kvm_vcpu_events``."""
        return self._get("KVM_GET_VCPU_EVENTS", "struct kvm_vcpu_events *")

    def set_vcpu_events(self, events: Any) -> None:
        """KVM_SET_VCPU_EVENTS."""
        ioctl(self.fd, "KVM_SET_VCPU_EVENTS", events)

    def get_xsave(self) -> bytes:
        """KVM_GET_XSAVE2 (or KVM_GET_XSAVE): return FPU, SSE, AVX, PKRU, ... in XSAVE layout."""
        area = ffi.new("char[]", self.xsave_size)
        ioctl(self.fd, "KVM_GET_XSAVE2" if self.has_xsave2 else "KVM_GET_XSAVE", area)
        return bytes(ffi.buffer(area))

    def set_xsave(self, area: bytes) -> None:
        """KVM_SET_XSAVE.

        :raises KvmError: EINVAL if the size is another than this host's, since KVM would
            read beyond the buffer
        """
        if len(area) != self.xsave_size:
            raise KvmError("KVM_SET_XSAVE", errno.EINVAL, f"{len(area)} bytes")
        buffer = ffi.new("char[]", area)
        ioctl(self.fd, "KVM_SET_XSAVE", buffer)

    def get_msrs(self, indices: Iterable[int] | None = None) -> dict[int, int]:
        """KVM_GET_MSRS: return values by index, without those that KVM cannot read.

        :param indices: which; by default all that KVM lists as vCPU state
        """
        wanted = list(self.listed_msrs if indices is None else indices)
        values: dict[int, int] = {}
        while wanted:
            chunk = wanted[:MAX_MSRS_PER_CALL]
            buffer = _msr_buffer(chunk, [0] * len(chunk))
            # KVM stops at a register that the vCPU lacks: the result is how many came before it.
            done = ioctl(self.fd, "KVM_GET_MSRS", buffer)
            words = ffi.unpack(buffer, 1 + 2 * done)
            values.update(zip(words[1::2], words[2::2], strict=True))
            wanted = wanted[done:] if done == len(chunk) else wanted[done + 1 :]
        return values

    def get_msr_block(self, block: MsrBlock) -> Iterable[tuple[int, int]]:
        """KVM_GET_MSRS of a block: return index and value of each, without those that KVM cannot
        read."""
        values: list[int] = []
        for request in block.requests:
            buffer = bytearray(request)
            done = ioctl(self.fd, "KVM_GET_MSRS", ffi.from_buffer(buffer))
            words = memoryview(buffer).cast("Q").tolist()
            if done < words[0]:
                return self.get_msrs(block.indices).items()
            values += words[2::2]
        return zip(block.indices, values, strict=True)

    def set_msrs(self, values: dict[int, int]) -> list[int]:
        """KVM_SET_MSRS: return the indices that KVM refused. It drops some writes in silence, so
        the caller reads back what matters."""
        refused = []
        todo = list(values)
        while todo:
            chunk = todo[:MAX_MSRS_PER_CALL]
            buffer = _msr_buffer(chunk, [values[index] for index in chunk])
            # Likewise: those before the first refused one are set, those behind it are not.
            done = ioctl(self.fd, "KVM_SET_MSRS", buffer)
            if done < len(chunk):
                refused.append(chunk[done])
                done += 1
            todo = todo[done:]
        return refused

    def get_cpuid2(self) -> Any:
        """KVM_GET_CPUID2: return the ``struct kvm_cpuid2`` that was set."""
        cpuid = ffi.new("struct kvm_cpuid2 *", {"entries": 256})
        cpuid.nent = 256
        ioctl(self.fd, "KVM_GET_CPUID2", cpuid)
        return cpuid

    def set_cpuid2(self, cpuid: Any) -> None:
        """KVM_SET_CPUID2; once, before the first KVM_RUN, and before MSRs and XSAVE, whose
        legal bits it decides."""
        ioctl(self.fd, "KVM_SET_CPUID2", cpuid)
        entries = ffi.buffer(cpuid.entries, cpuid.nent * ffi.sizeof("struct kvm_cpuid_entry2"))
        self.cpuid = bytes(entries)

    def get_tsc_khz(self) -> int:
        """KVM_GET_TSC_KHZ: return the frequency of the guest's TSC, in kHz."""
        return ioctl_value(self.fd, "KVM_GET_TSC_KHZ")

    def set_tsc_khz(self, khz: int) -> None:
        """KVM_SET_TSC_KHZ; before the TSC is set."""
        ioctl_value(self.fd, "KVM_SET_TSC_KHZ", khz)

    def get_tsc_offset(self) -> int | None:
        """Return the attribute KVM_VCPU_TSC_OFFSET: guest TSC minus host TSC, modulo 2^64.

        :returns: None where the host has no such attribute (before Linux 5.16)
        """
        value = ffi.new("uint64_t *")
        try:
            ioctl(self.fd, "KVM_GET_DEVICE_ATTR", _tsc_offset_attr(value))
        except KvmError:
            return None
        return int(value[0])

    def set_tsc_offset(self, offset: int) -> None:
        """Set KVM_VCPU_TSC_OFFSET: the TSC goes on as if it had never been another vCPU."""
        value = ffi.new("uint64_t *", offset)
        ioctl(self.fd, "KVM_SET_DEVICE_ATTR", _tsc_offset_attr(value), "TSC offset")

    def kvmclock_ctrl(self) -> None:
        """KVM_KVMCLOCK_CTRL: tell the guest's watchdogs that it stood still; EINVAL (the
        guest uses no kvmclock) is no error."""
        try:
            ioctl_value(self.fd, "KVM_KVMCLOCK_CTRL")
        except KvmError as error:
            if error.errno != errno.EINVAL:
                raise

    def nmi(self) -> None:
        """KVM_NMI: have the guest get a non-maskable interrupt."""
        ioctl_value(self.fd, "KVM_NMI")

    def translate(self, gva: int) -> int | None:
        """KVM_TRANSLATE: return the guest-physical address, None where nothing is mapped."""
        found = ffi.new("struct kvm_translation *")
        found.linear_address = gva
        ioctl(self.fd, "KVM_TRANSLATE", found)
        return int(found.physical_address) if found.valid else None

    def close(self) -> None:
        """Unmap kvm_run and close the descriptor."""
        if self.fd >= 0:
            lib.pyvmm_unmap(self._base, self._size)
            os.close(self.fd)
            self.fd = -1

    def _get(self, name: str, type_name: str) -> Any:
        state = ffi.new(type_name)
        ioctl(self.fd, name, state)
        return state


def _msr_buffer(indices: list[int], values: list[int]) -> Any:
    # struct kvm_msrs and its entries as words of 64 bits: the number of entries, then of each
    # the index, whose upper half is reserved, and the value. A vCPU has hundreds.
    words = [len(indices)] * (1 + 2 * len(indices))
    words[1::2] = indices
    words[2::2] = values
    return ffi.new("uint64_t[]", words)


def _one_reg(id: int, value: Any) -> Any:
    # The caller keeps the value alive.
    return ffi.new("struct kvm_one_reg *", [id, int(ffi.cast("uintptr_t", value))])


def _tsc_offset_attr(value: Any) -> Any:
    attr = ffi.new("struct kvm_device_attr *")
    attr.group = lib.KVM_VCPU_TSC_CTRL
    attr.attr = lib.KVM_VCPU_TSC_OFFSET
    attr.addr = int(ffi.cast("uintptr_t", value))
    return attr
