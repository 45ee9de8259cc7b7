"""The state of a device behind virtio-mmio: what an update carries, and what is refused."""

import pytest
from harness.virtio_echo import Echo, ask
from hypothesis import given
from hypothesis import strategies as st

from pyvmm.core.eventloop import EventLoop
from pyvmm.devices.virtio import mmio, transport
from pyvmm.devices.virtio.device import VirtioDevice
from pyvmm.errors import VmStateError
from pyvmm.testing.virtio_driver import VirtioDriver
from pyvmm.vmstate.fields import Description


def test_drained_device_serves_nothing_until_it_starts(echo):
    echo.transport.drain()
    echo.queues[0].add([b"x"], [64])
    echo.queues[0].kick()
    echo.run()
    assert echo.queues[0].reap() == []
    echo.transport.start()
    echo.run()
    assert len(echo.queues[0].reap()) == 1


def test_version_of_a_device_is_that_of_its_section():
    class Newer(Echo):
        vmstate = Description("echo", [], version=3)

    assert (
        mmio.VirtioMmio.description(Newer).version
        == mmio.VirtioMmio.description(Newer).minimum_version
        == 3
    )
    assert mmio.VirtioMmio.description(VirtioDevice).version == 1


def test_update_carries_everything(echo, loop):
    ask(echo, b"before")
    echo.device.change_config(lambda: None)
    echo.write(mmio.QUEUE_SEL, 1)
    registers = range(0, mmio.CONFIG, 4)
    before = [echo.read(register) for register in registers]
    first = echo.transport
    echo.update(Echo(loop))
    assert echo.transport is not first
    assert [echo.read(register) for register in registers] == before
    assert echo.device.served == 1
    assert echo.device.driver_features == echo.features
    assert ask(echo, b"after") == b"after"
    assert echo.device.served == 2


def test_kick_and_interrupt_that_the_update_swallowed_are_made_up_for(echo, loop):
    ask(echo, b"before")
    echo.interrupts()
    request = echo.queues[0].add([b"kicked in the old image"], [64])
    echo.queues[0].kick()
    echo.update(Echo(loop))
    assert echo.interrupts() == 1  # the first was not acknowledged
    echo.run()
    assert echo.queues[0].reap() == [(request, 23)]
    assert echo.interrupts() == 1


def test_acknowledged_interrupt_is_not_repeated(echo, loop):
    ask(echo, b"before")
    echo.interrupts()
    echo.write(mmio.INTERRUPT_ACK, 3)
    echo.update(Echo(loop))
    echo.run()
    assert echo.interrupts() == 0


def test_broken_device_stays_broken_over_an_update(echo, loop):
    echo.device.fail("test")
    echo.update(Echo(loop))
    assert echo.status & transport.S_NEEDS_RESET
    echo.queues[0].add([b"x"], [64])
    echo.queues[0].kick()
    echo.run()
    assert echo.queues[0].reap() == []
    echo.start()
    assert ask(echo, b"healed") == b"healed"


def test_update_before_there_is_a_driver(loop, plug):
    driver = plug(Echo(loop))
    driver.update(Echo(loop))
    driver.start()
    assert ask(driver, b"x") == b"x"


def test_update_in_the_middle_of_the_setup(loop, plug):
    driver = plug(Echo(loop))
    assert driver.negotiate()
    driver.set_up_queue(0)
    driver.write(mmio.QUEUE_SEL, 1)
    driver.write(mmio.QUEUE_DESC, 0x12345670)
    driver.update(Echo(loop))
    assert driver.transport.queues[1].desc == 0x12345670
    driver.set_up_queue(1)
    driver.set_driver_ok()
    assert ask(driver, b"x", 1) == b"x"


#: Of a driver that has started, asked for one byte and acknowledged nothing; with the header of a
#: transport, each queue, and the device.
GOLDEN = bytes.fromhex(
    "0f 03 00000001 0000000930000020 00000005 00000006 00000007 0002"
    "0008 01 0000000000001000 0000000000001080 0000000000001098 0001 0001"
    "0004 01 00000000000010e0 0000000000001120 0000000000001130 0000 0000"
    "00000001"
)


def test_state_is_byte_for_byte_what_it_always_was(echo):
    ask(echo, b"x")
    echo.device.change_config(lambda: None)
    for value, register in enumerate(
        (mmio.DEVICE_FEATURES_SEL, mmio.DRIVER_FEATURES_SEL, mmio.QUEUE_SEL), 5
    ):
        echo.write(register, value)
    assert echo.encode() == GOLDEN
    description = mmio.VirtioMmio.description(Echo)
    assert (description.name, description.version) == ("virtio-echo-device", 1)
    assert mmio.VirtioMmio.layout.name == "virtio-mmio"


def test_state_that_was_always_so_loads(echo, loop):
    ask(echo, b"x")
    echo.interrupts()
    echo.transport.close()
    echo._plug(Echo(loop))
    echo.decode(GOLDEN)
    echo._go()
    assert echo.interrupts() == 1  # not acknowledged
    assert echo.read(mmio.INTERRUPT_STATUS) == mmio.INT_USED | mmio.INT_CONFIG
    assert echo.encode() == GOLDEN
    echo.transport.start()
    assert ask(echo, b"after") == b"after"


# Offsets in the state of a transport with two queues.
STATUS, INTERRUPT, FEATURES, COUNT, QUEUE0 = 0, 1, 6, 26, 28


@pytest.mark.parametrize(
    ("at", "value", "words"),
    [
        (STATUS, b"\x1f", "status 0x1f"),
        (STATUS, b"\x07", "without features"),
        (INTERRUPT, b"\x04", "interrupt_status"),
        (FEATURES, b"\x80", "features"),
        (COUNT, b"\x00\x01", "1 queues"),
        (COUNT, b"\xff\xff", "65535 elements"),
        (QUEUE0, b"\x00\x00", "queue of 0"),
        (QUEUE0, b"\x00\x03", "queue of 3"),
        (QUEUE0, b"\x00\x10", "queue of 16"),
        (QUEUE0, b"\xff\xff", "queue of 65535"),
        (QUEUE0 + 3, b"\xff", "no memory"),
        (QUEUE0 + 10, b"\x08", "descriptor area"),
        (QUEUE0 + 11, b"\xff", "no memory"),
        (QUEUE0 + 18, b"\x01", "driver area"),
        (QUEUE0 + 26, b"\x02", "device area"),
        (QUEUE0 + 27, b"\x00\x09", "9 chains"),
        (QUEUE0 + 27, b"\xff\xff", "65535 chains"),
    ],
)
def test_impossible_state_is_refused(echo, at, value, words):
    data = bytearray(echo.encode())
    echo.decode(bytes(data))
    data[at : at + len(value)] = value
    with pytest.raises(VmStateError, match=words):
        echo.decode(bytes(data))


def test_truncated_state_is_refused(echo):
    data = echo.encode()
    for size in range(len(data)):
        with pytest.raises(VmStateError, match="truncated"):
            echo.decode(data[:size])


@given(st.data())
def test_any_state_is_refused_or_works(data):
    loop = EventLoop()
    driver = VirtioDriver(Echo(loop), ram_size=1 << 20)
    try:
        driver.start()
        ask(driver, b"x")
        state = bytearray(driver.encode())
        for at, value in data.draw(
            st.lists(st.tuples(st.integers(0, len(state) - 1), st.integers(0, 255)), max_size=4)
        ):
            state[at] = value
        try:
            driver.decode(bytes(state))
        except VmStateError:
            return
        driver.transport.start()
        driver.run()
        again = driver.encode()
        driver.decode(again)
    finally:
        driver.close()
        loop.close()
