"""Whether this host's /dev/kvm can run an unmodified Linux, found out by trying."""

import functools
import mmap

from pyvmm.errors import PyvmmError
from pyvmm.kvm import exits
from pyvmm.kvm.system import System
from pyvmm.kvm.vm import Vm

START = 0x1000
#: fninit; fwait; out %al, $0x80. Linux initializes the FPU so. A KVM without the processor's help
#: interprets what runs in ring 0, and its interpreter does not know these two.
CODE = b"\xdb\xe3\x9b\xe6\x80"


@functools.cache
def boots_linux():
    """Whether there is a KVM here on which a guest's kernel may use any instruction."""
    try:
        system = System.open()
    except PyvmmError:
        return False
    vm = vcpu = None
    try:
        vm = Vm.create(system)
        vm.set_identity_map_addr(0xFEFFC000)
        vm.set_tss_addr(0xFEFFD000)
        ram = mmap.mmap(-1, 1 << 16)
        ram[START : START + len(CODE)] = CODE
        vm.set_user_memory_region(0, 0, ram)
        vcpu = vm.create_vcpu(0)
        sregs, regs = vcpu.get_sregs(), vcpu.get_regs()
        sregs.cs.selector = sregs.cs.base = 0
        regs.rip, regs.rflags = START, 2
        vcpu.set_sregs(sregs)
        vcpu.set_regs(regs)
        exit = vcpu.run()
        return isinstance(exit, exits.Io) and exit.port == 0x80
    except PyvmmError:
        return False
    finally:
        for owner in (vcpu, vm, system):
            if owner is not None:
                owner.close()
