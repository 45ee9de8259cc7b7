"""The one owner of what carries events between a VM's guest and its devices past Python: which
device has which GSI, and which descriptors KVM holds (KVM API, sections 4.25, 4.52, 4.59, 4.75).

===========================  ==================================  ===============================
what                         today                               what comes
===========================  ==================================  ===============================
device to guest              lines, pulses: KVM_IRQ_LINE on a    eventfds of devices that others
                             GSI that is an input of PIC and     serve
                             IOAPIC, as the irqchip's default
                             routes have it; KVM_IRQFD;
                             messages: KVM_SIGNAL_MSI, of
                             eventfds: a GSI from 24 on, with a
                             route of KVM_SET_GSI_ROUTING
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

import select

from pyvmm._native import ffi, ioctl
from pyvmm.core.irq import IrqLine
from pyvmm.core.threads import Lock
from pyvmm.errors import InternalError, KvmError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Collection

    from pyvmm.kvm.vm import Vm


PINS = 24
"""GSIs of the IOAPIC's inputs; those of messages follow."""
MOST_GSIS = 4096  # KVM_MAX_IRQ_ROUTES of every kernel that we run on


class MsiRoute:
    """An eventfd that sends a message whenever it is signalled (``IrqRouting.msi_route``). What is
    signalled while there is none to send stays in the eventfd, and is sent with the next."""

    def __init__(self, routing: IrqRouting, gsi: int, fd: int) -> None:
        self._routing = routing
        self.gsi = gsi
        self.fd = fd

    @property
    def is_signalled(self) -> bool:
        """Whether it has been signalled and nothing has been sent for that."""
        if self.gsi in self._routing.connected:
            return False  # KVM sends, but reads what it found only when it gives the eventfd back
        poll = select.poll()
        poll.register(self.fd, select.POLLIN)
        return bool(poll.poll(0))

    def set(self, message: tuple[int, int] | None) -> None:
        """Send this, by address and data, from now on; None: nothing. Any thread.

        :raises KvmError: KVM has no room, or another VM has the eventfd (EBUSY)
        """
        self._routing.set_message(self, message)


class IrqRouting:
    """The owner, for one VM. Called on the main loop thread; what it returns, on any.

    :param vm: with its irqchip, by the time that anything is delivered
    """

    def __init__(self, vm: Vm) -> None:
        self._vm = vm
        self._users: dict[int, str] = {}
        # (gpa, value, is_port) -> eventfd, whose it is, and the size of the write.
        self._kicks: dict[tuple[int, int | None, bool], tuple[int, str, int]] = {}
        self._irqfds: dict[int, tuple[int, str]] = {}  # by GSI, likewise
        self._messages: dict[int, tuple[int, int]] = {}  # by GSI: address and data
        self._routes_lock = Lock()

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

    def msi_route(self, fd: int, user: str) -> MsiRoute:
        """Return a route for an eventfd, which sends nothing yet. Main loop.

        :raises InternalError: there are too many
        """
        gsi = next((gsi for gsi in range(PINS, MOST_GSIS) if gsi not in self._users), None)
        if gsi is None:
            raise InternalError(f"{user}: no GSI is left")
        self.claim(gsi, user)
        return MsiRoute(self, gsi, fd)

    def set_message(self, route: MsiRoute, message: tuple[int, int] | None) -> None:
        """Do what :meth:`MsiRoute.set` says."""
        gsi = route.gsi
        with self._routes_lock:
            if message is not None and message != self._messages.get(gsi):
                messages = {**self._messages, gsi: message}
                self._vm.set_gsi_routing(PINS, messages)
                self._messages = messages
            if (message is not None) != (gsi in self._irqfds):
                self._vm.irqfd(gsi, route.fd, assign=message is not None)
                if message is None:
                    del self._irqfds[gsi]
                else:
                    self._irqfds[gsi] = route.fd, self._users[gsi]

    @property
    def connected(self) -> Collection[int]:
        """The GSIs that have an irqfd."""
        return self._irqfds.keys()

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

    def kick(
        self,
        gpa: int,
        value: int | None,
        fd: int,
        user: str,
        size: int = 4,
        *,
        is_port: bool = False,
    ) -> None:
        """Have the guest's writes of ``value``, of ``size`` bytes, to ``gpa`` signal an eventfd.
        Any thread.

        :param value: None: any value
        :param is_port: ``gpa`` is an I/O port
        :raises KvmError: another kick has this address and value (EEXIST), or KVM has no room
        """
        self._vm.ioeventfd(gpa, fd, value, size, is_port=is_port)
        self._kicks[gpa, value, is_port] = fd, user, size

    def unkick(self, gpa: int, value: int | None, *, is_port: bool = False) -> None:
        """Take a kick back, if it is there: such a write is an exit again. Any thread."""
        key = gpa, value, is_port
        if key in self._kicks:
            fd, _, size = self._kicks[key]
            self._vm.ioeventfd(gpa, fd, value, size, is_port=is_port, assign=False)
            del self._kicks[key]

    @property
    def assigned(self) -> list[str]:
        """What KVM holds a descriptor for, one line each."""
        return [
            f"ioeventfd {fd} of {user}: {value} at {gpa:#x}"
            for (gpa, value, _), (fd, user, _) in self._kicks.items()
        ] + [f"irqfd {fd} of {user}: GSI {gsi}" for gsi, (fd, user) in self._irqfds.items()]

    def deassign(self) -> None:
        """Take all of :attr:`assigned` from KVM: the guest's kicks are MMIO exits again, which the
        bus leads to the same device.

        :raises KvmError: what is left is still assigned
        """
        for gpa, value, is_port in list(self._kicks):
            self.unkick(gpa, value, is_port=is_port)
        for gsi, (fd, _) in list(self._irqfds.items()):
            self._vm.irqfd(gsi, fd, assign=False)
            del self._irqfds[gsi]
