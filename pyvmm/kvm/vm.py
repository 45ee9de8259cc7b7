"""A VM: memory slots, the in-kernel interrupt controllers and timer, its clock, its vCPUs
(KVM API, sections 4 and 5).

KVM ties a VM to the address space that created it: after an execve every ioctl on its
descriptor fails with EIO, so it is never preserved, always rebuilt.
"""

from __future__ import annotations

import os

from pyvmm._native import ffi, ioctl, ioctl_value, lib
from pyvmm.errors import KvmError
from pyvmm.kvm.vcpu import Vcpu

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Protocol

    from pyvmm.kvm.system import System

    class Region(Protocol):
        """What a slot needs to know (``memory.guest``)."""

        name: str
        gpa: int
        readonly: bool

        @property
        def view(self) -> memoryview: ...


#: Without the first KVM reports a pending exception as one that is being delivered; without the
#: second it does not report a pending triple fault.
EVENTS = {
    "KVM_CAP_EXCEPTION_PAYLOAD": "KVM_VCPUEVENT_VALID_PAYLOAD",
    "KVM_CAP_X86_TRIPLE_FAULT_EVENT": "KVM_VCPUEVENT_VALID_TRIPLE_FAULT",
}
IRQCHIPS = ("KVM_IRQCHIP_PIC_MASTER", "KVM_IRQCHIP_PIC_SLAVE", "KVM_IRQCHIP_IOAPIC")


class Vm:
    """The VM descriptor.

    :param fd: from KVM_CREATE_VM, owned from now on
    :param system: where it came from
    """

    def __init__(self, fd: int, system: System) -> None:
        self.fd = fd
        self.system = system
        # KVM holds the address of each slot's memory: the views keep it mapped.
        self._memory: dict[int, Any] = {}
        #: Flags of kvm_vcpu_events: what KVM_GET_VCPU_EVENTS and its counterpart carry of
        #: :data:`EVENTS`.
        self.event_flags = 0
        for capability, flag in EVENTS.items():
            if self.enable_cap(capability):
                self.event_flags |= getattr(lib, flag)

    @classmethod
    def create(cls, system: System) -> Vm:
        """KVM_CREATE_VM: return a VM without memory or CPUs, tied to this address space."""
        return cls(ioctl_value(system.fd, "KVM_CREATE_VM"), system)

    def enable_cap(self, name: str) -> bool:
        """KVM_ENABLE_CAP: return whether this host has the capability, which now is on."""
        request = ffi.new("struct kvm_enable_cap *")
        request.cap = getattr(lib, name)
        request.args[0] = 1
        try:
            ioctl(self.fd, "KVM_ENABLE_CAP", request, name)
        except KvmError:
            return False
        return True

    def set_user_memory_region(
        self, slot: int, gpa: int, memory: Any, *, read_only: bool = False
    ) -> None:
        """KVM_SET_USER_MEMORY_REGION: let the guest see ``memory`` at ``gpa``. Any thread.

        :param memory: a writable buffer (mmap or memoryview), page aligned; kept alive
        :param read_only: guest writes become MMIO exits
        """
        view = ffi.from_buffer("char[]", memory, require_writable=True)
        region = ffi.new("struct kvm_userspace_memory_region *")
        region.slot = slot
        region.flags = lib.KVM_MEM_READONLY if read_only else 0
        region.guest_phys_addr = gpa
        region.memory_size = len(view)
        # From here on KVM reads and writes what is at this address, also when something else is
        # mapped there one day.
        region.userspace_addr = int(ffi.cast("uintptr_t", view))
        ioctl(self.fd, "KVM_SET_USER_MEMORY_REGION", region, f"slot {slot} at {gpa:#x}")
        self._memory[slot] = view

    def delete_memory_region(self, slot: int) -> None:
        """KVM_SET_USER_MEMORY_REGION with a size of 0: take a slot away. Any thread; KVM waits
        until no vCPU uses it, so nothing of the guest's reaches the memory after this."""
        region = ffi.new("struct kvm_userspace_memory_region *")
        region.slot = slot
        ioctl(self.fd, "KVM_SET_USER_MEMORY_REGION", region, f"slot {slot}, to delete it")
        del self._memory[slot]

    def set_tss_addr(self, gpa: int) -> None:
        """KVM_SET_TSS_ADDR: give Intel hosts three pages, which they need for real mode, at an
        address below 4 GiB where no slot is."""
        ioctl_value(self.fd, "KVM_SET_TSS_ADDR", gpa)

    def set_identity_map_addr(self, gpa: int) -> None:
        """KVM_SET_IDENTITY_MAP_ADDR: give Intel hosts one more page, likewise; before any vCPU."""
        ioctl(self.fd, "KVM_SET_IDENTITY_MAP_ADDR", ffi.new("uint64_t *", gpa))

    def create_irqchip(self) -> None:
        """KVM_CREATE_IRQCHIP: PICs, IOAPIC and a LAPIC in each vCPU; before any vCPU."""
        ioctl_value(self.fd, "KVM_CREATE_IRQCHIP")

    def create_pit2(self) -> None:
        """KVM_CREATE_PIT2: the i8254, with the speaker port answered by the kernel; after the
        irqchip, which takes its interrupts."""
        config = ffi.new("struct kvm_pit_config *")
        # Port 0x61, too: it has the gate and the output of channel 2, which are the PIT's.
        config.flags = lib.KVM_PIT_SPEAKER_DUMMY
        ioctl(self.fd, "KVM_CREATE_PIT2", config)

    def set_pit_reinjection(self, on: bool) -> None:
        """KVM_REINJECT_CONTROL: say whether ticks of the PIT that the guest could not take in time
        are delivered later, or dropped; on in a new VM."""
        control = ffi.new("struct kvm_reinject_control *")
        control.pit_reinject = on
        ioctl(self.fd, "KVM_REINJECT_CONTROL", control)

    def create_vcpu(self, index: int) -> Vcpu:
        """KVM_CREATE_VCPU: return the vCPU with APIC id ``index``; 0 is the bootstrap processor."""
        # The vCPU's descriptor keeps the VM, whose own one may be closed before it.
        fd = ioctl_value(self.fd, "KVM_CREATE_VCPU", index, f"vCPU {index}")
        return Vcpu(fd, index, self.system, self.event_flags)

    def irq_line(self, gsi: int, level: bool) -> None:
        """KVM_IRQ_LINE: drive an input of PIC and IOAPIC."""
        # One request per call: several vCPU threads may be in here.
        request = ffi.new("struct kvm_irq_level *")
        request.irq = gsi
        request.level = level
        ioctl(self.fd, "KVM_IRQ_LINE", request)

    def ioeventfd(
        self,
        gpa: int,
        fd: int,
        value: int | None,
        size: int = 4,
        *,
        is_port: bool = False,
        assign: bool = True,
    ) -> None:
        """KVM_IOEVENTFD: signal an eventfd, instead of an exit, when the guest writes ``value``,
        of ``size`` bytes, to ``gpa``. Any thread.

        :param value: None: any value
        :param is_port: ``gpa`` is an I/O port
        :param assign: False to have the exits again, with the same values
        """
        request = ffi.new("struct kvm_ioeventfd *")
        request.addr = gpa
        # An access of another width, or of another value, exits as before.
        request.len = size
        request.fd = fd
        if value is not None:
            request.datamatch = value
            request.flags = lib.KVM_IOEVENTFD_FLAG_DATAMATCH
        if is_port:
            request.flags |= lib.KVM_IOEVENTFD_FLAG_PIO
        if not assign:
            request.flags |= lib.KVM_IOEVENTFD_FLAG_DEASSIGN
        ioctl(self.fd, "KVM_IOEVENTFD", request, f"value {value} at {gpa:#x}")

    def signal_msi(self, address: int, data: int) -> None:
        """KVM_SIGNAL_MSI: deliver a message to the local APICs that its address names; it is
        delivered when this returns. Any thread.

        :raises KvmError: none of them takes it
        """
        request = ffi.new("struct kvm_msi *")
        request.address_lo = address & 0xFFFFFFFF
        request.address_hi = address >> 32
        request.data = data
        ioctl(self.fd, "KVM_SIGNAL_MSI", request)

    def irqfd(self, gsi: int, fd: int, *, assign: bool = True) -> None:
        """KVM_IRQFD: raise an interrupt whenever an eventfd is signalled, and at once if it is.

        :param assign: False to take it back, with the same values
        :raises KvmError: EBUSY if it is one already, of this VM or of another that still lives
        """
        request = ffi.new("struct kvm_irqfd *")
        request.fd = fd
        request.gsi = gsi
        request.flags = 0 if assign else lib.KVM_IRQFD_FLAG_DEASSIGN
        ioctl(self.fd, "KVM_IRQFD", request, f"GSI {gsi}")

    def set_gsi_routing(self, pins: int, messages: dict[int, tuple[int, int]]) -> None:
        """KVM_SET_GSI_ROUTING: replace the whole table.

        :param pins: GSIs from 0 on that are inputs of the IOAPIC, the first 16 of the PICs, too, as
            KVM_CREATE_IRQCHIP has them
        :param messages: GSI -> address and data
        """
        entries: list[tuple[int, str, int]] = []
        for pin in range(pins):
            if pin < 16:
                chip = "KVM_IRQCHIP_PIC_MASTER" if pin < 8 else "KVM_IRQCHIP_PIC_SLAVE"
                entries.append((pin, chip, pin % 8))
            entries.append((pin, "KVM_IRQCHIP_IOAPIC", pin))
        table = ffi.new("struct kvm_irq_routing *", {"entries": len(entries) + len(messages)})
        table.nr = len(entries) + len(messages)
        for entry, (gsi, chip, pin) in zip(table.entries, entries, strict=False):
            entry.gsi, entry.type = gsi, lib.KVM_IRQ_ROUTING_IRQCHIP
            entry.u.irqchip.irqchip, entry.u.irqchip.pin = getattr(lib, chip), pin
        for number, (gsi, (address, data)) in enumerate(messages.items(), len(entries)):
            entry = table.entries[number]
            entry.gsi, entry.type = gsi, lib.KVM_IRQ_ROUTING_MSI
            entry.u.msi.address_lo = address & 0xFFFFFFFF
            entry.u.msi.address_hi = address >> 32
            entry.u.msi.data = data
        ioctl(self.fd, "KVM_SET_GSI_ROUTING", table, f"{table.nr} entries")

    def get_irqchip(self, chip: str) -> Any:
        """KVM_GET_IRQCHIP: return the ``struct pyvmm_irqchip`` of one of :data:`IRQCHIPS`."""
        state = ffi.new("struct pyvmm_irqchip *")
        state.chip_id = getattr(lib, chip)
        ioctl(self.fd, "KVM_GET_IRQCHIP", state, chip)
        return state

    def set_irqchip(self, state: Any) -> None:
        """KVM_SET_IRQCHIP. An IOAPIC sends what is pending in its state to the LAPICs at once, so
        the vCPUs are set before it."""
        ioctl(self.fd, "KVM_SET_IRQCHIP", state)

    def get_pit2(self) -> Any:
        """KVM_GET_PIT2: return a ``struct kvm_pit_state2``."""
        state = ffi.new("struct kvm_pit_state2 *")
        ioctl(self.fd, "KVM_GET_PIT2", state)
        return state

    def set_pit2(self, state: Any) -> None:
        """KVM_SET_PIT2; the running counts start anew."""
        ioctl(self.fd, "KVM_SET_PIT2", state)

    def get_clock(self) -> int:
        """KVM_GET_CLOCK: return the guest's kvmclock, in ns."""
        data = ffi.new("struct kvm_clock_data *")
        ioctl(self.fd, "KVM_GET_CLOCK", data)
        return int(data.clock)

    def set_clock(self, clock_ns: int) -> None:
        """KVM_SET_CLOCK. Only the clock goes in: handing back the flags that KVM_GET_CLOCK
        fills in since Linux 5.16 would make the guest's time jump."""
        data = ffi.new("struct kvm_clock_data *")
        data.clock = clock_ns
        ioctl(self.fd, "KVM_SET_CLOCK", data)

    def close(self) -> None:
        """Close the descriptor; the VM goes when its vCPUs are closed too."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
        self._memory.clear()


class MemorySlots:
    """Gives each region of guest memory a slot of the VM: an observer of ``memory.guest``."""

    def __init__(self, vm: Vm) -> None:
        self._vm = vm
        self._slots: dict[Region, int] = {}

    def map(self, region: Region) -> None:
        """Let the guest see a region.

        :raises KvmError: KVM has no slot left, or no memory
        """
        taken = set(self._slots.values())
        slot = next(slot for slot in range(len(taken) + 1) if slot not in taken)
        self._vm.set_user_memory_region(slot, region.gpa, region.view, read_only=region.readonly)
        self._slots[region] = slot

    def unmap(self, region: Region) -> None:
        """Take a region from the guest: its accesses there become MMIO exits.

        :raises KvmError: KVM has no memory for the change
        """
        self._vm.delete_memory_region(self._slots[region])
        del self._slots[region]
