"""virtio-mmio whose accesses native code answers, beside one that Python has alone."""

import time

from harness import DEADLINE_S
from harness.native import NativeBuses
from harness.virtio_echo import MAC, Echo, ask
from hypothesis import given
from hypothesis import strategies as st

from pyvmm.core.eventloop import EventLoop
from pyvmm.core.threads import Event, spawn
from pyvmm.devices.virtio import mmio
from pyvmm.devices.virtio.transport import S_DRIVER_OK
from pyvmm.testing.virtio_driver import BASE, VirtioDriver


class Changing(Echo):
    """Its configuration space is a number, which the host may change, and the driver too."""

    def __init__(self, loop):
        super().__init__(loop)
        self.number = 0

    def read_config(self, offset, size):
        return (self.number.to_bytes(8, "little") * 2)[offset : offset + size]

    def write_config(self, offset, data):
        self.number = int.from_bytes(data, "little")

    def change(self, number):
        def change():
            self.number = number

        self.change_config(change)


class NativeDriver(VirtioDriver):
    """A driver whose accesses native code is asked for first."""

    def _plug(self, device):
        super()._plug(device)
        self.buses = NativeBuses(mmio=self.bus)

    def read(self, register, size=0):
        return self.buses.read(BASE + register, size or self.width, is_port=False)

    def write(self, register, value, size=0):
        self.buses.write(BASE + register, size or self.width, value, is_port=False)


def make(kind, loop):
    return kind(Changing(loop), ram_size=1 << 20)


registers = st.one_of(
    st.sampled_from([*mmio.WRITES, *mmio.READS[:2], mmio.STATUS, mmio.QUEUE_SEL]),
    st.integers(mmio.CONFIG, mmio.CONFIG + 20),
    st.integers(0, mmio.SIZE + 4),
)
actions = st.one_of(
    st.tuples(st.just("read"), registers, st.sampled_from([1, 2, 4, 8])),
    st.tuples(
        st.just("write"),
        registers,
        st.sampled_from([1, 2, 4, 8]),
        st.sampled_from([0, 1, 2, 3, 15]) | st.integers(0, (1 << 64) - 1),
    ),
    st.tuples(st.just("change"), st.integers(0, (1 << 64) - 1)),
    st.tuples(st.just("start")),
    st.tuples(st.just("ask")),
    st.tuples(st.just("reset")),
    st.tuples(st.just("update")),
)


def act(driver, action, *arguments):
    if action == "read":
        return driver.read(*arguments)
    if action == "write":
        register, size, value = arguments
        driver.write(register, value & (1 << 8 * size) - 1, size)
    elif action == "change":
        driver.device.change(*arguments)
    elif action == "start":
        driver.start()
    elif action == "ask":
        # What comes back is not taken: after some requests the driver has no descriptor left.
        if driver.transport.status == 15 and driver.queues and len(driver.queues[0].free) > 1:
            driver.queues[0].add([b"x"], [1])
            driver.queues[0].kick()
            driver.run()
    elif action == "reset":
        driver.transport.reset()
        driver.transport.start()
    else:
        number = driver.device.number
        driver.update(Changing(driver.device.loop))
        driver.device.change(number)
    return driver._interrupts


@given(st.lists(actions, max_size=40))
def test_both_ways_are_one_device(sequence):
    loop = EventLoop()
    native, python = make(NativeDriver, loop), make(VirtioDriver, loop)
    try:
        for action in sequence:
            assert act(native, *action) == act(python, *action), action
            saved = [bytearray(), bytearray()]
            for out, driver in zip(saved, (native, python), strict=True):
                driver.transport.vmstate.save(out, driver.transport.save())
            assert saved[0] == saved[1]
    finally:
        native.close()
        python.close()
        loop.close()


def test_an_interrupt_needs_no_interpreter(loop):
    driver = NativeDriver(Echo(loop))
    try:
        driver.start()
        assert ask(driver, b"hello") == b"hello"
        before = driver.buses.answered
        assert driver.read(mmio.INTERRUPT_STATUS) == mmio.INT_USED
        driver.write(mmio.INTERRUPT_ACK, mmio.INT_USED)
        assert driver.read(mmio.INTERRUPT_STATUS) == 0
        assert driver.read(mmio.CONFIG_GENERATION) == 0
        assert driver.config(0, 6) == MAC
        assert driver.buses.answered - before == 10
        assert driver.status & S_DRIVER_OK
        assert driver.buses.answered - before == 10
    finally:
        driver.close()


def test_a_driver_finds_old_or_new_configuration(loop):
    """Both halves and the generation, as it reads them (virtio 1.3, 4.2.2.2)."""
    driver = make(NativeDriver, loop)
    done, crashes = Event(), []
    changes = 3000

    def change():
        for number in range(1, changes + 1):
            driver.device.change(number << 32 | number)
        done.set()

    def crashed(error):
        crashes.append(error)
        done.set()

    def read():
        while True:
            before = driver.read(mmio.CONFIG_GENERATION)
            low, high = driver.read(mmio.CONFIG), driver.read(mmio.CONFIG + 4)
            if driver.read(mmio.CONFIG_GENERATION) == before:
                assert low == high == before
                return before

    try:
        spawn(change, crashed)
        seen = {read()}
        deadline = time.monotonic() + DEADLINE_S
        while not done.is_set():
            assert time.monotonic() < deadline
            seen.add(read())
        assert not crashes
        assert read() == changes
        assert len(seen) > 1
    finally:
        driver.close()
