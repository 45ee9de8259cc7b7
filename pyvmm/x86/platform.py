"""The KVM side of the machine: VM, interrupt controllers, timer, vCPUs, and their state."""

from __future__ import annotations

from pyvmm.errors import HostError
from pyvmm.kvm.irq import IrqRouting
from pyvmm.kvm.vm import MemorySlots, Vm
from pyvmm.vmstate.section import Section
from pyvmm.x86 import cpuid, irqchip, layout, msrs, vcpu_state

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

    from pyvmm.kvm.carrier import Control
    from pyvmm.kvm.system import System
    from pyvmm.kvm.vcpu import Vcpu
    from pyvmm.memory.guest import GuestMemory
    from pyvmm.vmstate.fields import Record


class Platform:
    """A VM with memory, irqchip, PIT and vCPUs, in the state after power-on.

    :param memory: what the guest sees of it follows its changes
    :param cpu_changes: features by QEMU's names that ``-cpu`` wants or does not want
    :param pit_reinjects: whether ticks of the PIT that the guest missed come later
    :ivar irqs: gives devices their interrupts
    :raises ConfigError: KVM does not offer one that is wanted
    :raises KvmError: naming the ioctl that failed
    """

    def __init__(
        self,
        system: System,
        memory: GuestMemory,
        topology: cpuid.Topology,
        cpu_changes: Mapping[str, bool],
        pit_reinjects: bool = True,
    ) -> None:
        count = topology.count
        most = system.check_extension("KVM_CAP_MAX_VCPUS")
        if count > most:
            raise HostError(f"-smp {count}: KVM on this host allows {most} vCPUs")
        self.system = system
        self.vm = Vm.create(system)
        self.irqs = IrqRouting(self.vm)
        self._memory = memory
        self._slots = MemorySlots(self.vm)
        self._control: Control | None = None
        self.vcpus: list[Vcpu] = []
        try:
            self._set_up(topology, cpu_changes)
            if not pit_reinjects:
                self.vm.set_pit_reinjection(False)
        except BaseException:
            # Nobody owns it yet, and the memory's owner can only close what is not in use.
            self.close()
            raise
        states = vcpu_state.power_on(self.vcpus)
        self._power_on = list(zip(self.vcpus, states, strict=True))
        self._chips_on = [(section, section.save()) for section in self.chip_sections()]

    def _set_up(self, topology: cpuid.Topology, cpu_changes: Mapping[str, bool]) -> None:
        # First: the irqchip puts itself on KVM's I/O buses, and a memory slot that comes after
        # waits for the grace period of that, some milliseconds of an update's pause.
        self._memory.observe(self._slots)
        # Both before any vCPU: a vCPU gets its LAPIC when it is made, and only if there is an
        # irqchip; Intel hosts read the page addresses then.
        self.vm.set_identity_map_addr(layout.IDENTITY_MAP)
        self.vm.set_tss_addr(layout.TSS)
        self.vm.create_irqchip()
        self.vm.create_pit2()
        self.irqs.claim(irqchip.PIT_GSI, "the PIT (in KVM)")
        for index in range(topology.count):
            self.vcpus.append(self.vm.create_vcpu(index))
        tsc_khz = self.vcpus[0].get_tsc_khz()
        offered = cpuid.host_cpuid(self.system, topology, cpu_changes, tsc_khz)
        set_identity = cpuid.identity(offered, topology)
        for vcpu in self.vcpus:
            set_identity(vcpu.index)
            vcpu.set_cpuid2(offered)
        self._has_tsc_offset = self.vcpus[0].get_tsc_offset() is not None
        # What follows from CPUID is the same for all of them: the first is asked.
        values, present = msrs.at_power_on(self.vcpus[0]), msrs.present(self.vcpus[0])
        for vcpu in self.vcpus:
            vcpu.set_msrs(values)
            vcpu.state_msrs = present

    def reset(self) -> None:
        """Put vCPUs, interrupt controllers and PIT back to power-on. The vCPUs are stopped.

        The TSCs and the clock go on, as they do on a board whose reset line is pulled.
        """
        for vcpu, state in self._power_on:
            vcpu_state.reset(vcpu, state)
        for section, state in self._chips_on:
            section.load(state)

    def carried_msrs(self) -> tuple[list[int], list[int]]:
        """Return :func:`vcpu_state.carried_msrs` of the vCPUs, which may be running."""
        return vcpu_state.carried_msrs(self.vcpus[0], self._has_tsc_offset)

    def keep_control(self, control: Control) -> None:
        """Keep the control pages of an update mapped, which the vCPUs' threads look at even if it
        fails, until those of the next, by when they have all come by."""
        former, self._control = self._control, control
        if former is not None:
            former.close()

    def cpu_sections(self) -> list[Section]:
        """Return the sections of the vCPUs' state."""
        return [
            Section(
                vcpu_state.VCPU.name,
                vcpu.index,
                vcpu_state.VCPU,
                lambda vcpu=vcpu: vcpu_state.read(vcpu),  # type: ignore[misc]
                lambda state, vcpu=vcpu: vcpu_state.write(vcpu, state),  # type: ignore[misc]
            )
            for vcpu in self.vcpus
        ]

    def chip_sections(self) -> list[Section]:
        """Return the sections of PICs, IOAPIC and PIT. They are loaded after the LAPICs, to which a
        pending input of the IOAPIC is delivered at once."""
        vm = self.vm
        pics = [
            Section(
                irqchip.I8259.name,
                instance,
                irqchip.I8259,
                lambda chip=chip: irqchip.save_pic(vm, chip),  # type: ignore[misc]
                lambda state, chip=chip: irqchip.load_pic(vm, chip, state),  # type: ignore[misc]
            )
            for instance, chip in enumerate(irqchip.ELCR_MASK)
        ]
        return [
            *pics,
            Section(
                irqchip.IOAPIC.name,
                0,
                irqchip.IOAPIC,
                lambda: irqchip.save_ioapic(vm),
                lambda state: irqchip.load_ioapic(vm, state),
            ),
            Section(
                irqchip.I8254.name,
                0,
                irqchip.I8254,
                lambda: irqchip.save_pit(vm),
                lambda state: irqchip.load_pit(vm, state),
            ),
        ]

    def clock_section(self) -> Section:
        """Return the section of kvmclock. It is loaded last of all, right before the vCPUs run."""
        vm = self.vm
        return Section(
            irqchip.KVMCLOCK.name,
            0,
            irqchip.KVMCLOCK,
            lambda: irqchip.save_clock(vm),
            lambda state: irqchip.load_clock(vm, state),
        )

    def boottime(self, records: Mapping[tuple[str, int], Record]) -> int:
        """Return what the host's boot clock said when a state was written, in ns; 0 if it does not
        tell."""
        clock = records.get((irqchip.KVMCLOCK.name, 0))
        return getattr(clock, "boottime", 0)

    def is_ahead(self, records: Mapping[tuple[str, int], Record]) -> bool:
        """Return whether a state's time is one that this boot of the host has not reached."""
        clock = records.get((irqchip.KVMCLOCK.name, 0))
        return clock is not None and irqchip.is_ahead(clock)

    def forget_host_clocks(self, records: Mapping[tuple[str, int], Record]) -> None:
        """Change a state that was read, and is not loaded yet, so that kvmclock and the TSCs go
        on from what they showed; the TSCs with the distances that they had to each other.

        :raises MigrationError: the TSC is another here, and cannot be scaled
        """
        wanted = [(irqchip.KVMCLOCK.name, 0)]
        wanted += [(vcpu_state.VCPU.name, vcpu.index) for vcpu in self.vcpus]
        if any(key not in records for key in wanted):
            return  # it will be refused
        clock, *states = (records[key] for key in wanted)
        irqchip.forget_boottime(clock)
        can_scale = bool(self.system.check_extension("KVM_CAP_TSC_CONTROL"))
        for vcpu, state in zip(self.vcpus, states, strict=True):
            vcpu_state.set_tsc_frequency(vcpu, state, can_scale)
        vcpu_state.move_tsc_offsets(self.vcpus[0], states)

    def close(self) -> None:
        """Give VM and vCPUs back. No thread is in one of them, or may kick it, any more."""
        for vcpu in self.vcpus:
            vcpu.close()
        self._memory.forget(self._slots)
        self.vm.close()
