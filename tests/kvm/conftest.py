import pytest
from harness.kvm_machine import Events, Machine

from pyvmm.core.bus import Bus
from pyvmm.machine.cpu import Cpu


@pytest.fixture
def machine():
    machine = Machine()
    yield machine
    machine.close()


@pytest.fixture
def threaded(machine):
    """The first vCPU in its thread, with buses around it."""
    ports, mmio = Bus("I/O", 1 << 16), Bus("memory", 1 << 64)
    events = Events()
    cpu = Cpu(machine.vcpu, ports, mmio, events)
    cpu.start()
    machine.cpu, machine.events = cpu, events
    yield machine
    cpu.close()
    assert events.errors == []
