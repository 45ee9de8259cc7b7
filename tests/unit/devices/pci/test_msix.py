"""MSI-X: which messages are sent, which wait, and what of it a state has."""

import errno
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyvmm.core.bus import Bus
from pyvmm.devices.pci import msix
from pyvmm.devices.pci.function import COMMAND, COMMAND_MEMORY, Function
from pyvmm.devices.pci.msix import ENABLE, MASK_ALL, Msix
from pyvmm.errors import KvmError
from pyvmm.testing.virtio_pci_driver import LOW, FakeBus
from pyvmm.vmstate.cursor import Cursor
from pyvmm.vmstate.fields import Record

COUNT = 3
APIC = 0xFEE01000


class Card:
    """A function with three vectors."""

    def __init__(self):
        self.sent = []
        self.mmio = Bus("memory", 1 << 64)
        self.bus = FakeBus(self.mmio)
        self.function = Function("card", vendor=1, device=2, class_code=0)
        self.msix = Msix(self.function, 1, COUNT, lambda *message: self.sent.append(message))
        self.function.on_change = lambda *_: self.msix.update()
        self.bus.host.add(self.function, (1, 0))
        self.bus.write(1, COMMAND, 2, COMMAND_MEMORY)

    def control(self, value):
        self.bus.write(1, 0x42, 2, value)

    def set(self, vector, address=APIC, data=None, control=0):
        at = LOW[0] + 16 * vector
        for offset, value in ((0, address), (4, 0), (8, vector if data is None else data)):
            self.mmio.write(at + offset, 4, value)
        self.mmio.write(at + 12, 4, control)

    def pending(self):
        return self.mmio.read(LOW[0] + msix.PENDING, 8)


@pytest.fixture
def card():
    return Card()


def test_capability(card):
    read = card.bus.read
    assert read(1, 0x34, 1) == 0x40
    assert read(1, 0x40, 1) == msix.CAPABILITY
    assert read(1, 0x42, 2) == COUNT - 1
    assert (read(1, 0x44, 4), read(1, 0x48, 4)) == (1, msix.PENDING | 1)
    card.control(0xFFFF)
    assert read(1, 0x42, 2) == ENABLE | MASK_ALL | COUNT - 1


def test_message_is_sent(card):
    card.control(ENABLE)
    card.set(1, data=0x4123)
    card.msix.notify(1)
    assert card.sent == [(APIC, 0x4123)]
    assert card.pending() == 0


def test_message_waits_while_it_is_masked(card):
    card.control(ENABLE)
    card.set(0)
    card.set(1, control=1)
    card.msix.notify(1)
    card.msix.notify(1)
    card.msix.notify(2)  # masked since power-on
    assert card.sent == []
    assert card.pending() == 0b110
    card.mmio.write(LOW[0] + 16 + 12, 4, 0)
    assert card.sent == [(APIC, 1)]
    assert card.pending() == 0b100


def test_message_waits_while_all_are_masked(card):
    for vector in range(COUNT):
        card.set(vector)
    card.control(ENABLE | MASK_ALL)
    card.msix.notify(2)
    card.msix.notify(0)
    assert card.pending() == 0b101
    card.control(ENABLE)
    assert card.sent == [(APIC, 0), (APIC, 2)]


@pytest.mark.parametrize("address", [0, 0xFEC00000, 0x1000, 0xFED00000])
def test_message_to_anywhere_else_is_not_sent(card, address):
    card.control(ENABLE)
    card.set(0, address=address)
    card.msix.notify(0)
    assert card.sent == []


def test_address_above_4_gib_is_none_of_the_apics(card):
    card.control(ENABLE)
    card.set(0)
    card.mmio.write(LOW[0] + 4, 4, 1)
    card.msix.notify(0)
    assert card.sent == []


def test_only_whole_words_are_written(card):
    card.set(0)
    for offset in range(16):
        card.mmio.write(LOW[0] + offset, 1, 0xFF)
    for offset in range(0, 16, 2):
        card.mmio.write(LOW[0] + offset, 2, 0xFFFF)
    assert card.mmio.read(LOW[0], 8) == APIC
    assert card.mmio.read(LOW[0] + 8, 8) == 0
    card.mmio.write(LOW[0] + 8, 8, 0x1_0000_0042)
    assert card.mmio.read(LOW[0] + 8, 8) == 0x1_0000_0042


def test_state(card):
    card.control(ENABLE)
    card.set(0, data=7, control=1)
    card.msix.notify(0)
    out = bytearray()
    msix.STATE.save(out, card.msix)
    state = msix.STATE.load(Cursor(bytes(out)), 1)
    other = Card()
    other.msix.check(state)
    other.msix.load(state)
    assert other.pending() == 1
    other.control(ENABLE)
    other.mmio.write(LOW[0] + 12, 4, 0)
    assert other.sent == [(APIC, 7)]
    state.count = 2
    with pytest.raises(ValueError, match="2 MSI-X vectors, the device has 3"):
        other.msix.check(state)
    with pytest.raises(ValueError, match="vector control 0x2"):
        msix.STATE.check(SimpleNamespace(vectors=[SimpleNamespace(control=2)]))


@given(
    st.lists(
        st.tuples(
            st.integers(0, msix.SIZE - 1),
            st.sampled_from([1, 2, 4, 8]),
            st.integers(0, (1 << 64) - 1),
        ),
        max_size=50,
    )
)
def test_any_accesses(accesses):
    card = Card()
    card.control(ENABLE)
    for offset, size, value in accesses:
        card.mmio.write(LOW[0] + offset, size, value & (1 << 8 * size) - 1)
        card.mmio.read(LOW[0] + offset, size)
        card.msix.notify(value % COUNT)
    assert all(address >> 20 == 0xFEE for address, _ in card.sent)
    card.msix.reset()
    assert card.pending() == 0
    card.set(1)
    card.sent.clear()
    card.msix.notify(1)
    assert card.sent == [(APIC, 1)]


def test_function_that_sends_messages_has_no_line(card):
    card.function.set_interrupt(True)
    levels = [level for _, level in card.bus.levels]
    assert levels == [True]
    card.control(ENABLE)
    card.control(0)
    card.control(ENABLE | MASK_ALL)
    assert [level for _, level in card.bus.levels] == [True, False, True, False]


class FakeRoute:
    """Notes the messages that an eventfd would send, and may be signalled or out of room."""

    def __init__(self):
        self.messages = []
        self.is_signalled = self.is_full = False

    def set(self, message):
        if self.is_full:
            raise KvmError("KVM_IRQFD", errno.ENOMEM)
        if [message] != self.messages[-1:]:
            self.messages.append(message)


def test_eventfd_sends_what_the_table_says(card):
    route = FakeRoute()
    card.msix.connect(1, route)
    card.set(1, data=0x41)
    assert route.messages == [None]
    card.control(ENABLE)
    assert route.messages[1:] == [(APIC, 0x41)]
    card.mmio.write(LOW[0] + 16 + 8, 4, 0x42)
    assert route.messages[2:] == [(APIC, 0x42)]
    card.control(ENABLE | MASK_ALL)
    route.is_signalled = True
    assert card.pending() == 0b010
    card.control(ENABLE)
    card.mmio.write(LOW[0] + 16 + 12, 4, 1)
    card.mmio.write(LOW[0] + 16 + 12, 4, 0)
    assert route.messages[3:] == [None, (APIC, 0x42), None, (APIC, 0x42)]
    card.mmio.write(LOW[0] + 16, 4, 0x1000)  # not to an APIC
    card.msix.reset()
    assert route.messages[7:] == [None]
    assert card.sent == []


def test_eventfd_sends_nothing_before_the_other_vm_has_given_it_back(card):
    card.control(ENABLE)
    card.set(0, data=7)
    out = bytearray()
    msix.STATE.save(out, card.msix)
    other = Card()
    route = FakeRoute()
    other.msix.connect(0, route)
    other.function.load(Record(space=card.function.space), asserts=False)
    other.msix.load(msix.STATE.load(Cursor(bytes(out)), 1))
    assert route.messages == [None]
    other.msix.update()
    assert route.messages == [None, (APIC, 7)]


def test_host_that_has_no_room_for_a_route_ends_no_vcpu(card):
    route = FakeRoute()
    card.msix.connect(0, route)
    route.is_full = True
    card.control(ENABLE)
    card.set(0)
    route.is_full = False
    card.mmio.write(LOW[0] + 12, 4, 0)
    assert route.messages == [None, (APIC, 0)]
