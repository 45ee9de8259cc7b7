"""The exits of a vCPU that need finishing, and its thread: kicks must not get lost."""

import signal
import sys
import threading

import pytest
from harness import DEADLINE_S, guests, wait_until
from harness.kvm_machine import (
    CODE3,
    Events,
    Machine,
)

from pyvmm.core.bus import Bus
from pyvmm.errors import HostError, InternalError
from pyvmm.kvm import exits
from pyvmm.machine import cpu as cpu_module
from pyvmm.machine.config import MachineConfig
from pyvmm.machine.cpu import Cpu
from pyvmm.machine.machine import Machine as WholeMachine
from pyvmm.testing.fake_parts import make_parts

# ---- exits and their completion --------------------------------------------------------------


def finish(vcpu):
    """Run until nothing is half done; what came on the way."""
    vcpu.set_immediate_exit(True)
    on_the_way = []
    while not isinstance(exit := vcpu.run(), exits.Interrupted):
        on_the_way.append(exit)
        if not exit.is_write:
            exit.data[:] = b"\xbb" * len(exit.data)
    vcpu.set_immediate_exit(False)
    return on_the_way


def test_input_is_completed_by_immediate_exit(machine):
    machine.load(b"\xba\x34\x12\xec")  # mov $0x1234, %dx; in %dx, %al
    exit = machine.vcpu.run()
    assert (exit.port, exit.size, exit.count, exit.is_write) == (0x1234, 1, 1, False)
    assert machine.vcpu.get_regs().rip == 0x1003
    exit.data[0] = 0x5A
    assert finish(machine.vcpu) == []
    regs = machine.vcpu.get_regs()
    assert (regs.rip, regs.rax & 0xFF) == (0x1004, 0x5A)


def test_output(machine):
    machine.load(b"\xba\x34\x12\xb8\xcd\xab\xef")  # mov $0x1234, %dx; mov $0xabcd, %ax; out %ax
    exit = machine.vcpu.run()
    assert (exit.port, exit.size, exit.is_write) == (0x1234, 2, True)
    assert exit.data[:] == b"\xcd\xab"
    assert finish(machine.vcpu) == []
    assert machine.vcpu.get_regs().rip == 0x1007


def test_string_output_comes_in_pieces(machine):
    machine.ram[0x2000:0x2064] = bytes(range(100))
    # mov $0x1234, %dx; mov $0x2000, %si; mov $100, %cx; cld; rep outsb; out %al (the end)
    machine.load(b"\xba\x34\x12\xbe\x00\x20\xb9\x64\x00\xfc\xf3\x6e\xba\x35\x12\xee")
    data = b""
    while (exit := machine.vcpu.run()).port == 0x1234:
        data += exit.data[:]
    assert data == bytes(range(100))


# Into what is no memory in a machine of 640 KiB.
PAGE_CROSSING = [
    ("read", b"\xb8\x00\xb0\x8e\xd8\x66\xa1\xfe\x0f", False),  # mov %ds:0xffe, %eax; ds 0xb000
    ("write", b"\xb8\x00\xb0\x8e\xd8\x66\xa3\xfe\x0f", True),
]


@pytest.mark.parametrize(("way", "code", "is_write"), PAGE_CROSSING)
def test_access_across_a_page_is_completed(way, code, is_write):
    machine = Machine(ram=0xA0000)
    try:
        machine.load(code)
        exit = machine.vcpu.run()
        assert isinstance(exit, exits.Mmio)
        assert (exit.gpa, exit.size, exit.is_write) == (0xB0FFE, 2, is_write)
        if not is_write:
            exit.data[:] = b"\xaa\xaa"
        (rest,) = finish(machine.vcpu)
        assert (rest.gpa, rest.size, rest.is_write) == (0xB1000, 2, is_write)
        regs = machine.vcpu.get_regs()
        assert regs.rip == 0x1000 + len(code)
        if not is_write:
            assert regs.rax & 0xFFFFFFFF == 0xBBBBAAAA
    finally:
        machine.close()


def test_triple_fault(machine):
    machine.spin_in_ring_3()
    machine.ram[CODE3 : CODE3 + 2] = b"\x0f\x0b"  # ud2, and no handler for that or what follows
    sregs = machine.vcpu.get_sregs()
    sregs.idt.base = sregs.idt.limit = 0
    machine.vcpu.set_sregs(sregs)
    assert isinstance(machine.vcpu.run(), exits.Shutdown)


def test_code_where_there_is_no_memory():
    machine = Machine(ram=0xA0000)
    machine.load(guests.TO_UNMAPPED)
    exit = machine.vcpu.run()
    assert isinstance(exit, exits.KvmInternalError)
    assert "emulation failure" in str(exit)
    machine.close()


# ---- the thread ------------------------------------------------------------------------------


def count(cpu):
    return cpu.call(lambda vcpu: vcpu.get_regs().rax)


def test_no_kick_is_lost(threaded):
    """A spinning ring-3 guest is stopped and resumed 2000 times; one lost kick would hang."""
    threaded.spin_in_ring_3()
    for _ in range(2000):
        threaded.cpu.resume()
        threaded.cpu.request_stop()
        assert threaded.cpu.wait_stopped()
    before = count(threaded.cpu)
    threaded.cpu.resume()
    wait_until(lambda: count(threaded.cpu) > before, "a higher count")


def test_call_while_it_runs(threaded):
    threaded.spin_in_ring_3()
    threaded.cpu.resume()
    values = [count(threaded.cpu) for _ in range(200)]
    assert values == sorted(values)
    wait_until(lambda: count(threaded.cpu) > values[-1], "a higher count")
    with pytest.raises(ZeroDivisionError):
        threaded.cpu.call(lambda vcpu: 1 // 0)
    threaded.cpu.request_stop()
    assert threaded.cpu.wait_stopped()
    assert count(threaded.cpu) == count(threaded.cpu)


def test_calls_and_stops_from_many_threads(threaded):
    threaded.spin_in_ring_3()
    threaded.cpu.resume()
    results = []

    def work():
        results.extend(count(threaded.cpu) for _ in range(50))

    workers = [threading.Thread(target=work) for _ in range(4)]
    for worker in workers:
        worker.start()
    for _ in range(50):
        threaded.cpu.request_stop()
        assert threaded.cpu.wait_stopped()
        threaded.cpu.resume()
    for worker in workers:
        worker.join(DEADLINE_S)
        assert not worker.is_alive()
    assert len(results) == 200


def watched(vcpu):
    """An event that is set while the vCPU is in KVM_RUN."""
    real, inside = vcpu.run, threading.Event()

    def run():
        inside.set()
        try:
            return real()
        finally:
            inside.clear()

    vcpu.run = run
    return inside


def test_resumed_before_its_thread_got_to_wait(machine):
    """As a new image may do it on a loaded host. The next stop would not kick it, and reading
    its registers would wait for ever."""
    late = threading.Event()

    class Late(Cpu):
        def _wait(self):
            assert late.wait(DEADLINE_S)
            super()._wait()

    machine.spin_in_ring_3()
    inside = watched(machine.vcpu)
    cpu = Late(machine.vcpu, Bus("I/O", 1 << 16), Bus("memory", 1 << 64), Events())
    cpu.start()
    cpu.resume()
    late.set()
    assert inside.wait(DEADLINE_S)
    cpu.request_stop()
    assert cpu.wait_stopped()
    assert not inside.is_set()
    cpu.close()


def pause_in(cpu, name):
    """Have the vCPU's thread wait on its way into the method ``name``; two events: that it is
    there, and to let it go on."""
    there, go_on = threading.Event(), threading.Event()

    def trace(frame, event, _argument):
        if frame.f_code.co_name == name:
            sys.settrace(None)
            there.set()
            assert go_on.wait(DEADLINE_S)

    cpu.call(lambda vcpu: sys.settrace(trace))
    return there, go_on


def test_resumed_on_the_way_to_the_waiting_place(threaded):
    """A vCPU in the guest is never taken for stopped: its state would be read while it runs."""
    cpu, vcpu = threaded.cpu, threaded.vcpu
    threaded.spin_in_ring_3()
    inside = watched(vcpu)
    assert cpu.wait_stopped()
    there, go_on = pause_in(cpu, "_wait")
    assert there.wait(DEADLINE_S)
    cpu.resume()
    go_on.set()
    assert inside.wait(DEADLINE_S)
    cpu.request_stop()
    assert cpu.wait_stopped()
    assert not inside.is_set()


def test_kick_that_comes_after_its_work_was_done(threaded):
    """The flag that it leaves must not keep the vCPU out of the guest for good."""
    cpu, vcpu = threaded.cpu, threaded.vcpu
    threaded.spin_in_ring_3()
    cpu.resume()
    count(cpu)
    kick = cpu._kick

    def late():
        signal.pthread_kill(cpu._ident, signal.SIGURG)
        wait_until(lambda: not cpu._work, "the work")
        kick()

    cpu._kick = late
    count(cpu)
    cpu._kick = kick
    wait_until(lambda: not vcpu._run.immediate_exit, "the vCPU in the guest")


def test_stop_while_it_is_halted(threaded):
    threaded.load(guests.HALT)
    for _ in range(100):
        threaded.cpu.resume()
        threaded.cpu.request_stop()
        assert threaded.cpu.wait_stopped()


def test_interrupts_are_looked_for_between_two_entries(threaded, monkeypatch):
    """On the vCPU's thread, which alone may set what it has read."""
    cpu, vcpu = threaded.cpu, threaded.vcpu
    threads = []
    set_mp_state = vcpu.set_mp_state

    def watched_set(state):
        set_mp_state(state)
        threads.append(threading.get_ident())

    monkeypatch.setattr(vcpu, "set_mp_state", watched_set)
    threaded.spin_in_ring_3()
    cpu.resume()
    counted = count(cpu)
    for times in (1, 2, 3):
        cpu.recheck_interrupts()
        wait_until(lambda times=times: len(threads) == times, "KVM looks")
    wait_until(lambda: not vcpu._run.immediate_exit, "the vCPU in the guest")
    assert set(threads) == {cpu._ident}
    assert count(cpu) > counted
    cpu.request_stop()
    assert cpu.wait_stopped()
    # A stopped one goes on as if nobody had asked.
    cpu.recheck_interrupts()
    cpu.resume()
    counted = count(cpu)
    wait_until(lambda: count(cpu) > counted, "the vCPU in the guest")


def test_device_that_fails_stops_the_vcpu_with_a_verdict(machine):
    class Broken(Bus):
        def write(self, address, size, value):
            raise RuntimeError("a bug")

    events = Events()
    cpu = Cpu(machine.vcpu, Broken("I/O", 1 << 16), Bus("memory", 1 << 64), events)
    cpu.start()
    machine.load(b"\xba\x34\x12\xee")
    cpu.resume()
    assert events.happened.wait(DEADLINE_S)
    assert "a bug" in events.errors[0]
    assert cpu.wait_stopped()
    # Its registers can be looked at, and after a reset it runs again.
    assert cpu.call(lambda vcpu: vcpu.get_regs().rdx) == 0x1234
    machine.load(guests.HALT)
    cpu.resume()
    cpu.request_stop()
    assert cpu.wait_stopped()
    cpu.close()
    assert len(events.errors) == 1


def test_guest_runs_on_if_one_vcpu_cannot_be_stopped(monkeypatch):
    monkeypatch.setattr(cpu_module, "STOP_TIMEOUT_S", 0.05)
    machine = Machine(cpus=2)
    whole = WholeMachine(make_parts(MachineConfig(), machine), MachineConfig())
    hanging, go_on = threading.Event(), threading.Event()

    class Hanging(Bus):
        def write(self, address, size, value):
            hanging.set()
            assert go_on.wait(DEADLINE_S)

    ports = Hanging("I/O", 1 << 16)
    second, first = (Cpu(vcpu, ports, ports, whole.end) for vcpu in machine.vcpus)
    whole.cpus = [first, second]
    machine.load(b"\xba\x34\x12\xee\xeb\xfd")  # mov $0x1234, %dx; 1: out %al, %dx; jmp 1b
    for cpu in whole.cpus:
        cpu.start()
    whole.resume_cpus()
    assert hanging.wait(DEADLINE_S)
    with pytest.raises(InternalError, match="does not leave KVM_RUN"):
        whole.pause_cpus()
    assert not first._stop
    with pytest.raises(InternalError, match="vCPU 0 does not leave"):
        count(second)
    go_on.set()
    hanging.clear()
    assert hanging.wait(DEADLINE_S)
    monkeypatch.undo()
    whole.pause_cpus()
    whole.close()
    machine.close()


def test_all_vcpus_are_in_the_guest_when_they_are_let_go():
    """Each needs the interpreter to get there, which whoever lets them go has."""
    machine = Machine(cpus=3)
    whole = WholeMachine(make_parts(MachineConfig(), machine), MachineConfig())
    bus = Bus("I/O", 1 << 16)
    whole.cpus = [Cpu(vcpu, bus, bus, Events()) for vcpu in machine.vcpus]
    machine.spin_in_ring_3()
    inside = [watched(vcpu) for vcpu in machine.vcpus]
    for cpu in whole.cpus:
        cpu.start()
    for cpu in whole.cpus:
        cpu.wait_started()
    interval = sys.getswitchinterval()
    for _ in range(3):
        # Nobody gets the interpreter from a thread that does not wait.
        sys.setswitchinterval(DEADLINE_S)
        try:
            whole.resume_cpus()
            there = [flag.is_set() for flag in inside]
        finally:
            sys.setswitchinterval(interval)
        assert there == [True] * 3
        whole.pause_cpus()
    whole.close()
    machine.close()


@pytest.mark.parametrize("fault", ["never runs", "dies"])
def test_thread_that_does_not_begin_is_told(machine, monkeypatch, fault):
    def spawn(target, on_crash):
        if fault == "dies":
            on_crash(MemoryError())

    monkeypatch.setattr(cpu_module, "spawn", spawn)
    monkeypatch.setattr(cpu_module, "START_TIMEOUT_S", 0.05)
    events = Events()
    cpu = Cpu(machine.vcpu, Bus("I/O", 1 << 16), Bus("memory", 1 << 64), events)
    cpu.start()
    with pytest.raises(HostError, match="thread vcpu-0 does not begin; free memory"):
        cpu.wait_started()
    assert len(events.errors) == (fault == "dies")


def test_no_vcpu_goes_while_another_may_still_kick_it():
    """The guest may ask for its end on one vCPU while the machine is closed."""
    machine = Machine(cpus=2)
    whole = WholeMachine(make_parts(MachineConfig(), machine), MachineConfig())
    gone, reached = [], threading.Event()

    class Exit(Bus):
        def write(self, address, size, value):
            reached.set()
            wait_until(lambda: second._quit or first.vcpu.fd < 0, "the end")
            gone.append(first.vcpu.fd < 0)

    ports = Exit("I/O", 1 << 16)
    first, second = (Cpu(vcpu, ports, ports, whole.end) for vcpu in reversed(machine.vcpus))
    whole.cpus = [first, second]
    for cpu in whole.cpus:
        cpu.start()
    machine.load(b"\xba\x34\x12\xee\xf4")  # mov $0x1234, %dx; out %al, %dx; hlt
    second.resume()
    assert reached.wait(DEADLINE_S)
    whole.close()
    assert gone == [False]
    assert [vcpu.fd for vcpu in machine.vcpus] == [-1, -1]
    machine.close()
