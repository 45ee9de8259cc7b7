"""The one owner of what carries events between a VM's guest and its devices past Python: which
device has which GSI, and which descriptors KVM holds (KVM API, sections 4.25, 4.52, 4.59, 4.75).

===========================  ==================================  ===============================
what                         today                               what comes
===========================  ==================================  ===============================
device to guest              lines, pulses: KVM_IRQ_LINE on a    messages that a descriptor
                             GSI that is an input of PIC and     sends: a GSI from 24 on, with a
                             IOAPIC, as the irqchip's default    route of KVM_SET_GSI_ROUTING
                             routes have it; KVM_IRQFD;
                             messages: KVM_SIGNAL_MSI
guest to device              kicks: KVM_IOEVENTFD, also in BARs
                             that move
===========================  ==================================  ===============================

A GSI has one user. The routing table is one table for the VM, set as a whole, which is why MSI
routes have no other place than this either.

Before an exec: KVM drops all of it with the VM, whose address space ends. Where the old VM
outlives the exec, the carrier takes the irqfds back when the new image takes the guest over, since
KVM refuses an eventfd as irqfd of a second VM (EBUSY).
"""

from __future__ import annotations

from pyvmm._native import ffi, ioctl
from pyvmm.core.irq import IrqLine
from pyvmm.errors import InternalError, KvmError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from pyvmm.kvm.vm import Vm


class IrqRouting:
    """The owner, for one VM. Called on the main loop thread; what it returns, on any.

    :param vm: with its irqchip, by the time that anything is delivered
    """

    def __init__(self, vm: Vm) -> None:
        self._vm = vm
        self._users: dict[int, str] = {}
        # (gpa, value) -> eventfd, whose it is, and the size of the write.
        self._kicks: dict[tuple[int, int | None], tuple[int, str, int]] = {}
        self._irqfds: dict[int, tuple[int, str]] = {}  # by GSI, likewise

    def claim(self, gsi: int, user: str) -> None:
        """Give a GSI to one user for good.

        :raises InternalError: another has it
        """
        if gsi in self._users:
            raise InternalError(f"GSI {gsi} of {user} is that of {self._users[gsi]}")
        self._users[gsi] = user

    def line(self, gsi: int, user: str) -> IrqLine:
        """Return a line whose level the device sets; any thread.

        :raises InternalError: another has the GSI
        """
        self.claim(gsi, user)
        return IrqLine(gsi, self._vm.irq_line, self._vm.fd)

    def pulse(self, gsi: int, user: str) -> Callable[[], None]:
        """Return what pulses an input of the IOAPIC, which the guest must have set to edge: any
        thread, one call at a time. The interrupt is delivered when it returns; that of an irqfd
        would be by a kernel thread, which on a busy host comes late.

        :raises InternalError: another has the GSI
        """
        self.claim(gsi, user)
        vm = self._vm
        # Up and down again: of an edge-triggered input that is up KVM drops a second rise.
        ends = ffi.new("struct kvm_irq_level[2]")
        ends[0].irq = ends[1].irq = gsi
        ends[0].level = True

        def pulse() -> None:
            ioctl(vm.fd, "KVM_IRQ_LINE", ends)
            ioctl(vm.fd, "KVM_IRQ_LINE", ends + 1)

        return pulse

    def irqfd(self, gsi: int, fd: int, user: str) -> None:
        """Have an eventfd pulse a GSI whenever whoever has it signals it.

        :raises InternalError: another has the GSI
        :raises KvmError: it is an irqfd already (EBUSY)
        """
        self.claim(gsi, user)
        self._vm.irqfd(gsi, fd)
        self._irqfds[gsi] = fd, user

    @property
    def irqfds(self) -> list[tuple[int, int]]:
        """GSI and eventfd of each irqfd."""
        return [(gsi, fd) for gsi, (fd, _) in self._irqfds.items()]

    def send_msi(self, address: int, data: int) -> None:
        """Deliver a message to local APICs; one that none of them takes is lost, as on a board.
        Any thread."""
        try:
            self._vm.signal_msi(address, data)
        except KvmError:
            pass

    def kick(self, gpa: int, value: int | None, fd: int, user: str, size: int = 4) -> None:
        """Have the guest's writes of ``value``, of ``size`` bytes, to ``gpa`` signal an eventfd.
        Any thread.

        :param value: None: any value
        :raises KvmError: another kick has this address and value (EEXIST), or KVM has no room
        """
        self._vm.ioeventfd(gpa, fd, value, size)
        self._kicks[gpa, value] = fd, user, size

    def unkick(self, gpa: int, value: int | None) -> None:
        """Take a kick back, if it is there: such a write is an exit again. Any thread."""
        if (gpa, value) in self._kicks:
            fd, _, size = self._kicks[gpa, value]
            self._vm.ioeventfd(gpa, fd, value, size, assign=False)
            del self._kicks[gpa, value]

    @property
    def assigned(self) -> list[str]:
        """What KVM holds a descriptor for, one line each."""
        return [
            f"ioeventfd {fd} of {user}: {value} at {gpa:#x}"
            for (gpa, value), (fd, user, _) in self._kicks.items()
        ] + [f"irqfd {fd} of {user}: GSI {gsi}" for gsi, (fd, user) in self._irqfds.items()]

    def deassign(self) -> None:
        """Take all of :attr:`assigned` from KVM: the guest's kicks are MMIO exits again, which the
        bus leads to the same device.

        :raises KvmError: what is left is still assigned
        """
        for gpa, value in list(self._kicks):
            self.unkick(gpa, value)
        for gsi, (fd, _) in list(self._irqfds.items()):
            self._vm.irqfd(gsi, fd, assign=False)
            del self._irqfds[gsi]
