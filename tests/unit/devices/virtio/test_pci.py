"""virtio over PCI: what its registers do that those of virtio-mmio do not."""

import struct

import pytest
from harness.virtio_echo import MAC, Echo, ask
from hypothesis import given
from hypothesis import strategies as st

from pyvmm.core.eventloop import EventLoop
from pyvmm.devices.pci import function, msix
from pyvmm.devices.virtio import pci, transport
from pyvmm.errors import VmStateError
from pyvmm.testing.virtio_pci_driver import LOW, REGISTERS, SLOT, VirtioPciDriver


@pytest.fixture
def plug(loop):
    """Puts a driver over an echo device."""
    made = []

    def plug(**options):
        made.append(VirtioPciDriver(Echo(loop), **options))
        return made[-1]

    yield plug
    for driver in made:
        driver.close()


@pytest.fixture
def echo(plug):
    """A driver that has started, with a message for each queue."""
    driver = plug()
    driver.enable_msix()
    driver.start()
    driver.interrupts()
    driver.messages.clear()
    return driver


def test_what_a_driver_finds(plug):
    driver = plug()
    read = driver.pci.read
    assert read(SLOT, 0, 4) == 0x1040 + 42 << 16 | 0x1AF4
    assert read(SLOT, 8, 1) == 1
    found = {}
    for nth in range(5):
        at = driver.capability(pci.VENDOR_CAPABILITY, nth)
        size, kind, bar = (read(SLOT, at + offset, 1) for offset in (2, 3, 4))
        found[kind] = size, bar, read(SLOT, at + 8, 4), read(SLOT, at + 12, 4)
    assert found == {
        pci.CFG_COMMON: (16, 4, pci.COMMON, pci.COMMON_SIZE),
        pci.CFG_ISR: (16, 4, pci.ISR, 1),
        pci.CFG_DEVICE: (16, 4, pci.CONFIG, transport.CONFIG_SIZE),
        pci.CFG_NOTIFY: (20, 4, pci.NOTIFY, 8),
        pci.CFG_PCI: (20, 0, 0, 0),
    }
    assert driver.config(0, 6) == MAC
    assert driver.read(pci.NUM_QUEUES, 2) == 2


def test_each_queue_has_its_message(echo):
    assert ask(echo, b"hello") == b"hello"
    assert ask(echo, b"second", 1) == b"second"
    assert echo.messages == [(0xFEE00000, 1), (0xFEE00000, 2)]
    echo.device.change_config(lambda: None)
    assert len(echo.messages) == 2  # nobody asked for that
    echo.write(pci.CONFIG_MSIX_VECTOR, 0, 2)
    echo.device.change_config(lambda: None)
    assert echo.messages[2:] == [(0xFEE00000, 0)]
    assert echo.read(pci.ISR, 1) == 0


def test_vector_that_there_is_not_is_none(echo):
    for register in (pci.CONFIG_MSIX_VECTOR, pci.QUEUE_MSIX_VECTOR):
        for value in (3, 100, 0xFFFE, 0xFFFF):
            echo.write(register, value, 2)
            assert echo.read(register, 2) == pci.NO_VECTOR
        echo.write(register, 2, 2)
        assert echo.read(register, 2) == 2


def test_line_without_messages(plug):
    driver = plug()
    driver.start()
    assert ask(driver, b"hello") == b"hello"
    assert driver.pci.levels == [(7, True)]
    assert driver.read(pci.ISR, 1) == pci.ISR_QUEUE
    assert driver.pci.levels[1:] == [(7, False)]
    assert driver.read(pci.ISR, 1) == 0
    driver.device.change_config(lambda: None)
    assert driver.pci.levels[2:] == [(7, True)]
    driver.set_status(0)
    assert driver.pci.levels[3:] == [(7, False)]


def test_registers_of_a_queue_are_read_back(echo):
    echo.write(pci.QUEUE_SELECT, 1, 2)
    queue = echo.queues[1]
    assert echo.read(pci.QUEUE_SIZE, 2) == 4
    assert echo.read(pci.QUEUE_ENABLE, 2) == 1
    assert echo.read(pci.QUEUE_NOTIFY_OFF, 2) == 1
    for register, address in (
        (pci.QUEUE_DESC, queue.desc),
        (pci.QUEUE_DRIVER, queue.avail),
        (pci.QUEUE_DEVICE, queue.used),
    ):
        assert echo.read(register) == address
        assert echo.read(register + 4) == 0
    echo.write(pci.QUEUE_ENABLE, 0, 2)  # it cannot be taken back so
    assert echo.read(pci.QUEUE_ENABLE, 2) == 1
    echo.write(pci.QUEUE_SELECT, 2, 2)
    for register in (pci.QUEUE_SIZE, pci.QUEUE_ENABLE, pci.QUEUE_NOTIFY_OFF):
        assert echo.read(register, 2) == 0


def test_kicks_of_any_size(echo):
    queue = echo.queues[1]
    for size in (1, 2, 4):
        queue.add([b"x"], [64])
        echo.write(pci.NOTIFY + pci.NOTIFY_STEP, 1, size)
        echo.run()
        assert len(queue.reap()) == 1
    for offset in (8, 0x100, 0xFFC):
        echo.write(pci.NOTIFY + offset, 0)
    echo.run()
    assert echo.status & transport.S_DRIVER_OK


def test_kicks_follow_the_registers(echo):
    fds = echo.transport.kick_fds
    step = pci.NOTIFY_STEP
    assert echo.pci.kicks.assigned == {
        REGISTERS + pci.NOTIFY + index * step: (fd, 2) for index, fd in enumerate(fds)
    }
    at = function.BAR0 + 4 * pci.REGISTERS_BAR
    echo.pci.write(SLOT, at + 4, 4, 0)
    echo.pci.write(SLOT, at, 4, LOW[0] + 0x10000)
    assert list(echo.pci.kicks.assigned) == [
        LOW[0] + 0x10000 + pci.NOTIFY + index * step for index in range(2)
    ]


def test_window(echo):
    at = echo.capability(pci.VENDOR_CAPABILITY, 4)

    def window(offset, length, bar=pci.REGISTERS_BAR):
        echo.pci.write(SLOT, at + pci.WINDOW_BAR, 1, bar)
        echo.pci.write(SLOT, at + pci.WINDOW_OFFSET, 4, offset)
        echo.pci.write(SLOT, at + pci.WINDOW_LENGTH, 4, length)

    data = at + pci.WINDOW_DATA
    window(pci.DEVICE_STATUS, 1)
    assert echo.pci.read(SLOT, data, 1) == 15
    window(pci.QUEUE_SELECT, 2)
    echo.pci.write(SLOT, data, 2, 1)
    assert echo.read(pci.QUEUE_SELECT, 2) == 1
    window(pci.CONFIG, 4)
    assert echo.pci.read(SLOT, data, 4) == int.from_bytes(MAC[:4], "little")
    # What is none: another BAR, another length, beyond the registers, across them.
    for arguments in ((0, 4, 1), (0, 3), (0, 0), (pci.SIZE, 4), (pci.SIZE - 2, 4), (1, 2)):
        window(*arguments)
        echo.pci.write(SLOT, data, 4, 0)
        assert echo.pci.read(SLOT, data, 4) == 0
    assert echo.read(pci.QUEUE_SELECT, 2) == 1
    window(pci.DEVICE_STATUS, 1)
    echo.pci.write(SLOT, data, 1, 0)
    assert echo.status == 0


# ---- state ---------------------------------------------------------------------------------


def test_update_carries_everything(echo, loop):
    ask(echo, b"before")
    echo.write(pci.CONFIG_MSIX_VECTOR, 2, 2)
    echo.write(pci.QUEUE_SELECT, 1, 2)
    registers = range(0, pci.COMMON_SIZE, 2)
    before = [echo.read(register, 2) for register in registers]
    space = echo.face.function.space
    table = [echo.bus.read(LOW[0] + at, 4) for at in range(0, 48, 4)]
    echo.update(Echo(loop))
    assert [echo.read(register, 2) for register in registers] == before
    assert echo.face.function.space == space
    assert [echo.bus.read(LOW[0] + at, 4) for at in range(0, 48, 4)] == table
    echo.messages.clear()
    assert ask(echo, b"after", 1) == b"after"
    assert echo.messages == [(0xFEE00000, 2)]


def test_line_and_what_it_was_for_go_on(plug, loop):
    driver = plug()
    driver.start()
    ask(driver, b"hello")
    driver.update(Echo(loop))
    line = driver.pci.host.line_of(driver.face.function)
    assert line.level
    assert driver.pci.levels == []  # the irqchip has it
    assert driver.read(pci.ISR, 1) == pci.ISR_QUEUE
    assert driver.pci.levels == [(7, False)]


def test_message_that_waits_goes_on_waiting(echo, loop):
    echo.pci.write(SLOT, echo.capability(msix.CAPABILITY) + 2, 2, msix.ENABLE | msix.MASK_ALL)
    ask(echo, b"hello")
    assert echo.messages == []
    echo.update(Echo(loop))
    assert echo.messages == []
    echo.pci.write(SLOT, echo.capability(msix.CAPABILITY) + 2, 2, msix.ENABLE)
    assert echo.messages == [(0xFEE00000, 1)]


@given(st.data())
def test_state_that_cannot_be_is_refused_or_works(data):
    loop = EventLoop()
    driver = VirtioPciDriver(Echo(loop), ram_size=1 << 20)
    try:
        driver.enable_msix()
        driver.start()
        state = bytearray(driver.encode())
        for _ in range(data.draw(st.integers(1, 4))):
            state[data.draw(st.integers(0, len(state) - 1))] = data.draw(st.integers(0, 255))
        try:
            driver.decode(bytes(state))
        except VmStateError:
            pass
        driver.transport.start()
        driver.pci.write(SLOT, function.COMMAND, 2, 0)
        driver.transport.reset()
        driver.command(function.COMMAND_MEMORY)
        driver.start()
        assert ask(driver, b"still there") == b"still there"
    finally:
        driver.close()
        loop.close()


def test_vector_of_a_state_exists(echo):
    state = bytearray(echo.encode())
    # The last of it: the vector of the second queue, and what the device has.
    at = len(state) - 4 - 2
    assert struct.unpack_from(">H", state, at) == (2,)
    struct.pack_into(">H", state, at, 3)
    with pytest.raises(VmStateError, match="vector 3 is none of 3"):
        echo.decode(bytes(state))


REGISTER = st.one_of(
    st.sampled_from([pci.DEVICE_STATUS, pci.QUEUE_SELECT, pci.QUEUE_SIZE, pci.QUEUE_ENABLE]),
    st.integers(0, pci.COMMON_SIZE),
    st.sampled_from([pci.ISR, pci.NOTIFY, pci.NOTIFY + 4, pci.CONFIG]),
    st.integers(0, pci.SIZE - 1),
)
VALUE = st.one_of(
    st.sampled_from([0, 1, 2, 3, 4, 8, 11, 15, 0x1000, 0x2000, 0x4000, 0x100000]),
    st.integers(0, (1 << 64) - 1),
)


@given(st.lists(st.tuples(REGISTER, st.sampled_from([1, 2, 4, 8]), VALUE), max_size=40))
def test_any_accesses_leave_a_device_that_works_after_a_reset(accesses):
    loop = EventLoop()
    driver = VirtioPciDriver(Echo(loop), ram_size=1 << 20)
    try:
        for register, size, value in accesses:
            driver.write(register, value & (1 << 8 * size) - 1, size)
            driver.read(register, size)
            loop.run_once(0)
            assert driver.status & ~(transport.S_DRIVERS | transport.S_NEEDS_RESET) == 0
        driver.start()
        assert ask(driver, b"still there") == b"still there"
    finally:
        driver.close()
        loop.close()
