"""A machine made by hand of the KVM bindings alone."""

import mmap

from pyvmm.core.threads import Event
from pyvmm.kvm.system import System
from pyvmm.kvm.vm import MemorySlots, Vm
from pyvmm.machine.cpu import CpuEvents
from pyvmm.x86 import cpuid

RAM = 4 << 20


#: What counts on by itself: TSC, its deadline and adjustment, kvmclock, Hyper-V's run time and
#: reference counter.
TSC_AND_TIMER = {0x10, 0x6E0, 0x4B564D00, 0x4B564D01, 0x11, 0x12, 0x3B, 0x40000010, 0x40000020}


# Long mode in ring 3, as the guest kernel runs: page tables at 0x10000, code at 0x8000.
PML4, PDPT, PD, GDT, CODE3 = 0x10000, 0x11000, 0x12000, 0x13000, 0x8000


class Machine:
    """A VM with RAM at 0 (so many bytes, or a mapping) or memory that it observes, an irqchip and
    vCPUs."""

    def __init__(self, cpus=1, ram=RAM, memory=None):
        self.system = System.open()
        self.vm = Vm.create(self.system)
        self.vm.set_identity_map_addr(0xFEFFC000)
        self.vm.set_tss_addr(0xFEFFD000)
        self.ram = mmap.mmap(-1, ram) if isinstance(ram, int) else ram
        if memory is None:
            self.vm.set_user_memory_region(0, 0, self.ram)
        else:
            memory.observe(MemorySlots(self.vm))
        self.vm.create_irqchip()
        self.vm.create_pit2()
        self.vcpus = [self.vm.create_vcpu(index) for index in range(cpus)]
        topology = cpuid.Topology(1, cpus, 1)
        offered = cpuid.host_cpuid(self.system, topology, {})
        set_identity = cpuid.identity(offered, topology)
        for vcpu in self.vcpus:
            set_identity(vcpu.index)
            vcpu.set_cpuid2(offered)

    @property
    def vcpu(self):
        return self.vcpus[0]

    def load(self, code, start=0x1000):
        """Put 16-bit code into RAM and point the first vCPU there, flat in real mode."""
        self.ram[start : start + len(code)] = code
        sregs = self.vcpu.get_sregs()
        sregs.cs.selector, sregs.cs.base = 0, 0
        self.vcpu.set_sregs(sregs)
        regs = self.vcpu.get_regs()
        regs.rip, regs.rflags = start, 2
        self.vcpu.set_regs(regs)

    def spin_in_ring_3(self):
        """Let the first vCPU count in rax, in ring 3 of long mode."""
        self.ram[CODE3 : CODE3 + 5] = b"\x48\xff\xc0\xeb\xfb"  # 1: inc %rax; jmp 1b
        for table, entry in ((PML4, PDPT | 7), (PDPT, PD | 7), (PD, 0x87)):
            self.ram[table : table + 8] = entry.to_bytes(8, "little")
        sregs = self.vcpu.get_sregs()
        for segment, kind, selector in ((sregs.cs, 11, 0x1B), (sregs.ss, 3, 0x23)):
            segment.base, segment.limit, segment.selector = 0, 0xFFFFFFFF, selector
            segment.type, segment.present, segment.dpl, segment.s = kind, 1, 3, 1
            segment.g = 1
        sregs.cs.l, sregs.cs.db, sregs.ss.l, sregs.ss.db = 1, 0, 0, 1
        sregs.cr0, sregs.cr3, sregs.cr4, sregs.efer = 0x80050033, PML4, 0x620, 0xD00
        self.vcpu.set_sregs(sregs)
        regs = self.vcpu.get_regs()
        regs.rip, regs.rflags, regs.rsp, regs.rax = CODE3, 0x202, 0x9000, 0
        self.vcpu.set_regs(regs)

    def close(self):
        for vcpu in self.vcpus:
            vcpu.close()
        self.vm.close()
        self.system.close()
        self.ram.close()


class Events(CpuEvents):
    def __init__(self):
        self.errors = []
        self.lacks = []
        self.happened = Event()

    def on_shutdown_exit(self, index):
        self.happened.set()

    def on_cpu_error(self, index, error):
        self.errors.append(error)
        self.happened.set()

    def on_ram_error(self, error):
        self.lacks.append(error)
        self.happened.set()


def same(left, right):
    from pyvmm._native import ffi

    return bytes(ffi.buffer(left)) == bytes(ffi.buffer(right))
