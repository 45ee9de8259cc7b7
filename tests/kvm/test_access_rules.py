"""What the kernel makes of an access that a device has to see, between its exit and the next
KVM_RUN.

The carrier rests on it (docs/carrier.md): a vCPU that waits with an exit that nobody has answered
goes on in another VM as if nothing had happened.
"""

import mmap

import pytest
from harness.assembler import assemble
from harness.kvm_machine import CODE3, Machine

from pyvmm._native import lib
from pyvmm.kvm import exits

RAM = 0xA0000
CODE = 0x1000
DATA = 0x4000  # what strings are written from and read to
END = 0x99  # a port
RF = 1 << 16
#: Instructions by name: what each begins with, how it is prepared, and it itself. In real mode %fs
#: is 0xB000, so that 0xFFE there is two bytes before the end of a page without memory.
IN_REAL_MODE = {
    "in byte": ("read", "", "in %dx, %al"),
    "in word": ("read", "", "in %dx, %ax"),
    "in long": ("read", "", "in %dx, %eax"),
    "in, behind sti": ("read", "sti", "in %dx, %al"),
    "out byte": ("write", "", "out %al, %dx"),
    "out long": ("write", "", "out %eax, %dx"),
    # KVM tells of this one when it is past, on any host (KVM_X86_QUIRK_OUT_7E_INC_RIP).
    "out to 0x7e": ("write", "", "out %al, $0x7e"),
    "rep insb": ("read", "mov $0x4000, %di; mov $100, %cx", "rep insb"),
    "rep insb, backwards": ("read", "mov $0x4100, %di; mov $100, %cx; std", "rep insb"),
    "rep insw, of pages": ("read", "mov $0x4000, %di; mov $3000, %cx", "rep insw"),
    "rep insl, of a page": ("read", "mov $0x4000, %di; mov $1024, %cx", "rep insl"),
    "rep outsb": ("write", "mov $0x4000, %si; mov $20, %cx", "rep outsb"),
    "rep outsl": ("write", "mov $0x4000, %si; mov $20, %cx", "rep outsl"),
    "read": ("read", "", "mov %fs:0x100, %ax"),
    "split read": ("read", "", "mov %fs:0xffe, %eax"),
    "read of 16 bytes": ("read", "", "movups %fs:0x100, %xmm1; movups %xmm1, 0x5000"),
    "split read of 16 bytes": ("read", "", "movups %fs:0xff3, %xmm1; movups %xmm1, 0x5000"),
    "split read, half in memory": ("read", "mov $0x9fff, %cx; mov %cx, %es", "mov %es:0xe, %eax"),
    "write": ("write", "", "mov %ax, %fs:0x100"),
    "split write": ("write", "", "mov %eax, %fs:0xffd"),
    "write of 16 bytes": ("write", "", "movups %xmm0, %fs:0x100"),
    "split write of 16 bytes": ("write", "", "movups %xmm0, %fs:0xff3"),
    "split write, half in memory": ("write", "mov $0x9fff, %cx; mov %cx, %es", "mov %eax, %es:0xe"),
    "read, modify, write": ("read", "", "or %ax, %fs:0x100"),
    "split read, modify, write": ("read", "", "add %eax, %fs:0xffe"),
    "exchange and add": ("read", "", "lock; xadd %eax, %fs:0x100"),
    "exchange": ("read", "", "xchg %ax, %fs:0x100"),
    "compare and exchange": ("read", "", "lock; cmpxchg %bx, %fs:0x100"),
    "test and set": ("read", "", "bts %ax, %fs:0x100"),
    "far pointer": ("read", "", "les %fs:0x100, %bx"),
    "lods": ("read", "mov $0x100, %si", "lodsw %fs:(%si)"),
    "scas": ("read", "mov $0xb000, %cx; mov %cx, %es; mov $0x100, %di", "scasw %es:(%di)"),
    "push": ("read", "", "pushw %fs:0x100"),
    "pop": ("write", "push %ax", "popw %fs:0x100"),
    "rep movs from there": (
        "read",
        "mov $0x100, %si; mov $0x4000, %di; mov $5, %cx",
        "rep movsw %fs:(%si), %es:(%di)",
    ),
    "rep movs to there": (
        "write",
        "mov $0xb000, %cx; mov %cx, %es; mov $0x4000, %si; mov $0xffd, %di; mov $5, %cx",
        "rep movsl",
    ),
    "rep movs from there to there": (
        "read",
        "mov $0xb000, %cx; mov %cx, %es; mov $0x200, %si; mov $0x100, %di; mov $3, %cx",
        "rep movsw %fs:(%si), %es:(%di)",
    ),
    "rep cmps": (
        "read",
        "mov $0xb000, %cx; mov %cx, %es; mov $0x200, %si; mov $0x100, %di; mov $3, %cx",
        "repne cmpsw %es:(%di), %fs:(%si)",
    ),
    "rep stos": (
        "write",
        "mov $0xb000, %cx; mov %cx, %es; mov $0xffd, %di; mov $4, %cx",
        "rep stosl",
    ),
}
BEFORE_REAL = """
    cld
    mov $0xb000, %cx
    mov %cx, %fs
    mov $0x7000, %sp
    mov $0x89abcdef, %eax
    mov $0x1234, %dx
"""
#: Of kvm_pvm's guests only what is in ring 3 runs on the processor itself.
IN_RING_3 = {
    "in": ("read", "", "in %dx, %eax"),
    "out": ("write", "", "out %eax, %dx"),
    "rep insb": ("read", "mov $0x4000, %edi; mov $100, %ecx", "rep insb"),
    "rep outsb": ("write", "mov $0x4000, %esi; mov $10, %ecx", "rep outsb"),
    "read": ("read", "", "mov 0x100(%rbx), %rax"),
    "split read": ("read", "", "mov 0xffb(%rbx), %rax"),
    "split read of 16 bytes": ("read", "", "movups 0xff3(%rbx), %xmm1; movups %xmm1, 0x5000"),
    "write": ("write", "", "mov %rax, 0x100(%rbx)"),
    "split write": ("write", "", "mov %rax, 0xffb(%rbx)"),
    "split write of 16 bytes": ("write", "", "movups %xmm0, 0xff3(%rbx)"),
    "read, modify, write": ("read", "", "lock; orq %rax, 0x100(%rbx)"),
    "compare and exchange of 8 bytes": ("read", "", "cmpxchg8b 0x100(%rbx)"),
    "rep movs to there": (
        "write",
        "mov $0x4000, %esi; lea 0xffa(%rbx), %rdi; mov $3, %ecx",
        "rep movsq",
    ),
}
BEFORE_RING_3 = "cld; mov $0xb0000, %ebx; movabs $0x0123456789abcdef, %rax; mov $0x1234, %edx"
BEHIND = "mov %eax, 0x3000; out %al, $0x99"
CASES = [
    pytest.param(in_ring_3, *case, id=f"{'ring 3' if in_ring_3 else 'real mode'}-{name}")
    for in_ring_3, cases in ((False, IN_REAL_MODE), (True, IN_RING_3))
    for name, case in cases.items()
]
each_case = pytest.mark.parametrize(("in_ring_3", "kind", "before", "instruction"), CASES)


class Devices:
    """Answers each read with something else than the one before, and keeps a log."""

    def __init__(self):
        self.log = []

    def serve(self, exit):
        """Do what an exit asks for; whether it was a read."""
        place = ("port", exit.port) if isinstance(exit, exits.Io) else ("memory", exit.gpa)
        if exit.is_write:
            self.log.append(("write", *place, bytes(exit.data)))
        else:
            first = sum(len(data) for kind, *_, data in self.log if kind == "read")
            exit.data[:] = bytes((0x40 + first + i) % 251 for i in range(len(exit.data)))
            self.log.append(("read", *place, bytes(exit.data)))
        return not exit.is_write


class Guest:
    """A guest with one such instruction, up to now in one VM; and further VMs of its memory."""

    def __init__(self, in_ring_3, before, instruction):
        self._case = in_ring_3, before, instruction
        self.ram = mmap.mmap(-1, RAM)
        self.ram[DATA : DATA + 256] = bytes(range(256))
        self.machines = [Machine(ram=self.ram)]
        self.devices = Devices()
        begin = self._begin_in_ring_3 if in_ring_3 else self._begin_in_real_mode
        begin(f"{BEFORE_RING_3 if in_ring_3 else BEFORE_REAL}; {before}", instruction)
        xsave = bytearray(self.vcpu.get_xsave())
        xsave[160:176] = bytes(range(0x80, 0x90))  # XMM0
        xsave[512] |= 3  # it is in use
        self.vcpu.set_xsave(bytes(xsave))

    def _begin_in_real_mode(self, before, instruction):
        self.machine.load(assemble(f"{before}; {instruction}; {BEHIND}"), CODE)
        self.instruction_at = CODE + len(assemble(before))
        sregs = self.vcpu.get_sregs()
        sregs.cr4 |= 0x200  # OSFXSR
        self.vcpu.set_sregs(sregs)

    def _begin_in_ring_3(self, before, instruction):
        self.machine.spin_in_ring_3()
        code = assemble(f"{before}; {instruction}; {BEHIND}", 64)
        self.ram[CODE3 : CODE3 + len(code)] = code
        self.instruction_at = CODE3 + len(assemble(before, 64))
        regs = self.vcpu.get_regs()
        regs.rflags |= 3 << 12  # it may use ports
        self.vcpu.set_regs(regs)

    @property
    def machine(self):
        return self.machines[-1]

    @property
    def vcpu(self):
        return self.machine.vcpu

    def run(self):
        """KVM_RUN, up to an exit."""
        while isinstance(exit := self.vcpu.run(), exits.Interrupted):
            pass
        assert isinstance(exit, exits.Io | exits.Mmio), exit
        return exit

    def finish(self):
        """Run on with nothing half done, until KVM says so; the exits on the way."""
        self.vcpu.set_immediate_exit(True)
        on_the_way = []
        while not isinstance(exit := self.vcpu.run(), exits.Interrupted):
            on_the_way.append("read" if self.devices.serve(exit) else "write")
        self.vcpu.set_immediate_exit(False)
        return on_the_way

    def is_end(self, exit):
        return isinstance(exit, exits.Io) and exit.port == END

    def accesses(self):
        """Go on access by access, with nothing half done in between: each one's exit."""
        while not self.is_end(exit := self.run()):
            yield exit

    def move(self):
        """Go on in a VM of its own."""
        state = State(self.vcpu)
        self.machines.append(Machine(ram=self.ram))
        state.write(self.vcpu)

    def accesses_made_whole(self):
        """Go on, all is done; each access's first exit."""
        for exit in self.accesses():
            yield exit
            self.devices.serve(exit)
            self.finish()

    def beginning(self):
        """The registers with which the instruction begins, by a guest that ends there."""
        other = Guest(*self._case)
        try:
            at = other.instruction_at
            other.ram[at : at + 2] = b"\xe6\x99"  # out %al, $0x99
            assert other.is_end(other.run())
            return State(other.vcpu).regs | {"rip": at}
        finally:
            other.close()

    def end(self):
        """What has come of it: the devices' log, registers, memory."""
        regs = State(self.vcpu).regs
        return self.devices.log, regs, self.ram[:]

    def close(self):
        for machine in self.machines:
            for vcpu in machine.vcpus:
                vcpu.close()
            machine.vm.close()
            machine.system.close()


class State:
    """All that an update carries of a vCPU, read with each of the calls that it takes."""

    def __init__(self, vcpu):
        self.mp_state = vcpu.get_mp_state()
        self._regs = vcpu.get_regs()
        self.sregs = vcpu.get_sregs()
        self.xsave = vcpu.get_xsave()
        self.xcrs = vcpu.get_xcrs()
        self.debugregs = vcpu.get_debugregs()
        self.lapic = vcpu.get_lapic()
        self.msrs = vcpu.get_msrs()
        self.events = vcpu.get_vcpu_events()
        vcpu.get_tsc_offset()

    @property
    def regs(self):
        names = "rax rbx rcx rdx rsi rdi rsp rbp r8 r9 r10 r11 r12 r13 r14 r15 rip rflags"
        return {name: getattr(self._regs, name) for name in names.split()}

    def write(self, vcpu):
        vcpu.set_regs(self._regs)
        vcpu.set_sregs(self.sregs)
        vcpu.set_xcrs(self.xcrs)
        vcpu.set_xsave(self.xsave)
        vcpu.set_debugregs(self.debugregs)
        vcpu.set_lapic(self.lapic)
        vcpu.set_mp_state(self.mp_state)
        vcpu.set_vcpu_events(self.events)


@pytest.fixture
def guest():
    made = []

    def make(*case):
        made.append(Guest(*case))
        return made[-1]

    yield make
    for each in made:
        each.close()


def undisturbed(guest):
    for exit in guest.accesses():
        guest.devices.serve(exit)
    return guest.end()


def place(exit):
    if isinstance(exit, exits.Io):
        return "port", exit.is_write, exit.port, exit.size, exit.count
    return "memory", exit.is_write, exit.gpa, exit.size


READS = [case for case in CASES if case.values[1] == "read"]


@pytest.mark.parametrize(("in_ring_3", "kind", "before", "instruction"), READS)
def test_a_read_leaves_the_registers_at_the_beginning(guest, in_ring_3, kind, before, instruction):
    one = guest(in_ring_3, before, instruction)
    assert not one.run().is_write
    regs = State(one.vcpu).regs
    assert regs["rip"] == one.instruction_at
    # A fault sets RF for its handler, so that an instruction is not stopped at a second time.
    regs["rflags"] &= ~RF
    assert regs == one.beginning()


@each_case
def test_a_look_changes_nothing(guest, in_ring_3, kind, before, instruction):
    """At each exit, also between the parts of an access, all is read that an update carries."""
    expected = undisturbed(guest(in_ring_3, before, instruction))
    one = guest(in_ring_3, before, instruction)
    for exit in one.accesses():
        State(one.vcpu)
        one.devices.serve(exit)
        State(one.vcpu)
    assert one.end() == expected
    assert expected[0][0][0] == kind


@each_case
@pytest.mark.parametrize("moves", ["at each", "at the last"])
def test_a_guest_goes_on_in_another_vm(guest, in_ring_3, kind, before, instruction, moves):
    """A write is done to its end, a read is not answered: it happens there."""
    case = in_ring_3, before, instruction
    expected = undisturbed(guest(*case))
    last = sum(1 for _ in guest(*case).accesses_made_whole())
    one = guest(*case)
    for number, exit in enumerate(one.accesses(), 1):
        moved = moves == "at each" or number == last
        if moved and not exit.is_write:
            found = place(exit)
            one.move()
            exit = one.run()
            assert place(exit) == found
        one.devices.serve(exit)
        is_write = exit.is_write
        kinds = one.finish()
        if is_write:
            assert "read" not in kinds
            assert len(kinds) < lib.PYVMM_MAX_WRITES
            if moved:
                one.move()
    assert one.end() == expected


STORES = {1: "mov %al,", 2: "mov %ax,", 4: "mov %eax,", 8: "mov %rax,", 16: "movups %xmm0,"}


@pytest.mark.parametrize("size", STORES)
def test_a_write_has_at_most_three_parts(guest, size):
    """Wherever it lies. KVM has room for two pages, and tells of 8 bytes at a time; the carrier has
    room for more."""
    most = 0
    for at in range(0x1000 - size - 1, 0x1002):
        one = guest(True, "", f"{STORES[size]} {at}(%rbx)")
        exit = one.run()
        one.devices.serve(exit)
        kinds = one.finish()
        assert {"write", *kinds} == {"write"}
        assert sum(len(data) for *_, data in one.devices.log) == size
        most = max(most, 1 + len(kinds))
    assert most == {1: 1, 16: 3}.get(size, 2)


@pytest.mark.parametrize("name", ["rep insb", "rep insw, of pages", "rep insl, of a page"])
def test_the_carrier_has_room_for_the_data_of_a_port(guest, name):
    one = guest(False, *IN_REAL_MODE[name][1:])
    sizes = []
    for exit in one.accesses():
        one.devices.serve(exit)
        sizes.append(len(exit.data))
    assert max(sizes) <= lib.PYVMM_MAX_PORT_DATA


def test_a_read_that_was_answered_in_part_is_asked_again(guest):
    """Why nobody answers a read in the carrier: KVM keeps the answers to the parts that it has told
    of where no call reads them, and the registers are those of the beginning until the last."""
    one = guest(False, *IN_REAL_MODE["split read"][1:])
    one.devices.serve(one.run())
    exit = one.run()
    assert (exit.is_write, exit.gpa) == (False, 0xB1000)
    assert State(one.vcpu).regs["rip"] == one.instruction_at
    one.move()
    assert one.run().gpa == 0xB0FFE
