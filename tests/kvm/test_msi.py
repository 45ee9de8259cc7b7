"""Messages to local APICs: sent at once, and by eventfds with a route of their own."""

import os

import pytest
from harness import wait_until
from harness.kvm_machine import Machine

from pyvmm.errors import KvmError
from pyvmm.kvm.irq import PINS, IrqRouting

APIC = 0xFEE00000
SVR, IRR = 0xF0, 0x200
GSI = 5


class Receiver(Machine):
    """A vCPU that does not run: what it is sent stays in its local APIC."""

    def __init__(self):
        super().__init__()
        self.irqs = IrqRouting(self.vm)
        lapic = bytearray(self.vcpu.get_lapic())
        lapic[SVR + 1] |= 1  # enabled
        self.vcpu.set_lapic(bytes(lapic))
        self.fds = []

    def eventfd(self):
        self.fds.append(os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK))
        return self.fds[-1]

    def requests(self):
        """The vectors that wait in the local APIC."""
        regs = self.vcpu.get_lapic()
        words = [int.from_bytes(regs[IRR + 16 * n : IRR + 16 * n + 4], "little") for n in range(8)]
        return {
            32 * n + bit for n, word in enumerate(words) for bit in range(32) if word >> bit & 1
        }

    def close(self):
        super().close()
        for fd in self.fds:
            os.close(fd)


@pytest.fixture
def receiver():
    receiver = Receiver()
    yield receiver
    receiver.close()


def test_message_is_there_when_the_call_returns(receiver):
    receiver.irqs.send_msi(APIC, 0x41)
    assert receiver.requests() == {0x41}


@pytest.mark.parametrize(
    ("address", "data"),
    [(0, 0), (APIC | 0x77 << 12, 0x41), (0x1000, 0x41), (1 << 63, 0xFFFFFFFF), (APIC, 0x4100)],
)
def test_message_that_nobody_takes_is_lost(receiver, address, data):
    receiver.irqs.send_msi(address, data)
    receiver.irqs.send_msi(APIC, 0x42)
    assert 0x42 in receiver.requests()


def test_eventfd_sends_its_message(receiver):
    first, second = (receiver.irqs.msi_route(receiver.eventfd(), name) for name in ("a", "b"))
    assert (first.gsi, second.gsi) == (PINS, PINS + 1)
    first.set((APIC, 0x51))
    second.set((APIC, 0x52))
    os.eventfd_write(second.fd, 1)
    wait_until(lambda: receiver.requests() == {0x52}, "the message")
    os.eventfd_write(first.fd, 1)
    wait_until(lambda: receiver.requests() == {0x51, 0x52}, "the message")
    first.set((APIC, 0x61))  # the guest has moved it
    os.eventfd_write(first.fd, 1)
    wait_until(lambda: receiver.requests() == {0x51, 0x52, 0x61}, "the message")


def test_what_is_signalled_while_it_is_masked_comes_then(receiver):
    route = receiver.irqs.msi_route(receiver.eventfd(), "a")
    os.eventfd_write(route.fd, 1)
    route.set((APIC, 0x51))
    wait_until(lambda: receiver.requests() == {0x51}, "the message")
    route.set(None)
    assert receiver.irqs.irqfds == []
    assert not route.is_signalled
    os.eventfd_write(route.fd, 1)
    assert route.is_signalled
    route.set((APIC, 0x52))
    wait_until(lambda: receiver.requests() == {0x51, 0x52}, "the message")
    assert not route.is_signalled
    route.set(None)
    assert not route.is_signalled


def test_lines_are_as_before_beside_messages(receiver):
    receiver.irqs.msi_route(receiver.eventfd(), "a").set((APIC, 0x51))
    line = receiver.irqs.line(GSI, "line")
    line.set_level(True)
    pic = receiver.vm.get_irqchip("KVM_IRQCHIP_PIC_MASTER").chip.pic
    assert pic.irr & 1 << GSI
    ioapic = receiver.vm.get_irqchip("KVM_IRQCHIP_IOAPIC").chip.ioapic
    assert ioapic.irr & 1 << GSI
    line.set_level(False)


def test_eventfd_of_another_vm_is_refused_until_that_gives_it_back(receiver):
    route = receiver.irqs.msi_route(receiver.eventfd(), "a")
    route.set((APIC, 0x51))
    other = Receiver()
    try:
        second = other.irqs.msi_route(route.fd, "a")
        with pytest.raises(KvmError, match="GSI 24"):
            second.set((APIC, 0x51))
        receiver.irqs.deassign()
        os.eventfd_write(route.fd, 1)
        second.set((APIC, 0x51))
        wait_until(lambda: other.requests() == {0x51}, "the message")
        assert receiver.requests() == set()
        assert other.irqs.irqfds == [(PINS, route.fd)]
    finally:
        other.close()
