"""Whether the host backs the memory that a vCPU touches: what KVM does not say by itself.

Where the processor runs the guest, a page that the host cannot back makes KVM_RUN fail with
EFAULT; where KVM's emulator does, the access is an exit as if there was no memory (see ``cpu``).
What looks like something else is looked into here, on the vCPU's thread between two KVM_RUNs.
"""

from __future__ import annotations

from pyvmm._native import lib
from pyvmm.errors import GuestError, KvmError, RamError
from pyvmm.kvm import exits

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pyvmm.kvm.vcpu import Vcpu
    from pyvmm.memory.guest import GuestMemory

_EFER_LMA = 1 << 10
_RFLAGS_TF, _RFLAGS_IF = 1 << 8, 1 << 9
_TSS64_STACKS = (4, 12, 20, *range(36, 92, 8))  # SDM volume 3, 8.7: RSP0 to 2, IST1 to 7
_TSS64_SIZE = 104
_FRAME_SIZE = 48  # what an exception pushes at most


class Backing:
    """The host's memory under one vCPU."""

    def __init__(self, vcpu: Vcpu, memory: GuestMemory) -> None:
        self._vcpu = vcpu
        self._memory = memory
        self._rip = -1
        self._is_shown = False

    def explain(self, exit: exits.Exit | None) -> RamError | None:
        """Return the host's error behind an exit (None: KVM_RUN failed with EFAULT), or None.

        Code that cannot be fetched is an emulation failure, a stack that an exception cannot be
        pushed to a triple fault; both leave the vCPU as it was.
        """
        if exit is None:
            return self._find() or self._memory.fault()
        if isinstance(exit, exits.Shutdown) or (
            isinstance(exit, exits.KvmInternalError)
            and exit.suberror == lib.KVM_INTERNAL_ERROR_EMULATION
        ):
            return self._find()
        return None

    def probe(self) -> None:
        """Have a fault show that KVM hides: now and then, while the host may be unable to back
        some page.

        With interrupts on, KVM has a worker fetch the page, halts the vCPU meanwhile, and goes on
        so for ever (kvm_arch_setup_async_pf). It does not for an instruction that no interrupt may
        follow, which is what this makes of the one where the vCPU was the last time, too.
        """
        vcpu = self._vcpu
        regs = vcpu.get_regs()
        stands, self._rip = regs.rip == self._rip, regs.rip
        if not stands or regs.rflags & (_RFLAGS_TF | _RFLAGS_IF) != _RFLAGS_IF:
            return
        events = vcpu.get_vcpu_events()
        # An event that is being delivered is not waited with; and hardware takes no shadow then.
        delivering = events.interrupt.injected or events.nmi.injected or events.exception.injected
        if not delivering and vcpu.get_mp_state() == lib.KVM_MP_STATE_RUNNABLE:
            self._set_shadow(lib.KVM_X86_SHADOW_INT_MOV_SS)
            self._is_shown = True

    def retract(self, exit: exits.Exit) -> bool:
        """Return whether an exit comes of :meth:`probe` alone, and undo the probe then: where KVM
        has the instruction emulated, the emulator need not know it."""
        if not self._is_shown or not isinstance(exit, exits.KvmInternalError):
            return False
        self._is_shown = False
        self._set_shadow(0)
        return True

    def _set_shadow(self, shadow: int) -> None:
        events = self._vcpu.get_vcpu_events()
        events.interrupt.shadow = shadow
        events.flags = lib.KVM_VCPUEVENT_VALID_SHADOW
        self._vcpu.set_vcpu_events(events)

    def _find(self) -> RamError | None:
        """Return what is missing of all that the processor touches by itself: the code, the stacks
        and the tables that lead to a handler."""
        memory = self._memory
        try:
            regs, sregs = self._vcpu.get_regs(), self._vcpu.get_sregs()
            code = sregs.cs.base + regs.rip
            stack = sregs.ss.base + regs.rsp
            read = [code, code + 14, sregs.gdt.base, sregs.idt.base, sregs.tr.base]
            written = [stack - 1, stack - _FRAME_SIZE]
            if sregs.efer & _EFER_LMA and (tss := self._physical(sregs.tr.base)) is not None:
                data = memory.read(tss, _TSS64_SIZE)
                tops = [int.from_bytes(data[at : at + 8], "little") for at in _TSS64_STACKS]
                written += [top - 1 for top in tops if top]
            for address in read + written:
                gpa = self._physical(address)
                if gpa is not None:
                    writable = address in written and memory.contains(gpa, 1)
                    memory.touch(gpa, 1, writable=writable)
        except RamError as error:
            return error
        except (GuestError, KvmError):
            pass  # a TSS at the end of memory, or a KVM that is at its own end
        return None

    def _physical(self, address: int) -> int | None:
        """Return where in memory a linear address is; None if it is in none."""
        gpa = self._vcpu.translate(address & (1 << 64) - 1)
        if gpa is None or not self._memory.contains(gpa, 1, writable=False):
            return None
        return gpa
