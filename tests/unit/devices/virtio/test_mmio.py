"""The registers of virtio-mmio, and a device's life behind them."""

import pytest
from harness.process import descriptors
from harness.virtio_echo import MAC, Echo, ask
from hypothesis import given
from hypothesis import strategies as st

from pyvmm.core.eventloop import EventLoop
from pyvmm.core.iothread import IoThread
from pyvmm.core.threads import Event, spawn
from pyvmm.devices.virtio import mmio, transport
from pyvmm.devices.virtio.device import F_EVENT_IDX, F_VERSION_1
from pyvmm.testing.virtio_driver import BASE, VirtioDriver


def test_identity(loop, plug):
    driver = plug(Echo(loop))
    assert driver.read(mmio.MAGIC_VALUE).to_bytes(4, "little") == b"virt"
    assert driver.read(mmio.VERSION) == 2
    assert driver.read(mmio.DEVICE_ID) == 42
    assert driver.read(mmio.VENDOR_ID) == mmio.VENDOR
    assert driver.read(mmio.SHM_LENGTH_LOW) == 0xFFFFFFFF
    assert driver.offered() == Echo.features | transport.FEATURES
    driver.write(mmio.DEVICE_FEATURES_SEL, 2)
    assert driver.read(mmio.DEVICE_FEATURES) == 0
    for number, size in enumerate(Echo.queue_sizes):
        driver.write(mmio.QUEUE_SEL, number)
        assert driver.read(mmio.QUEUE_SIZE_MAX) == size
    for number in (2, 64, 0x80000000, 0xFFFFFFFF):
        driver.write(mmio.QUEUE_SEL, number)
        assert driver.read(mmio.QUEUE_SIZE_MAX) == 0
        assert driver.read(mmio.QUEUE_READY) == 0


def test_config_space_takes_any_width(echo):
    assert echo.config(0, 6) == MAC
    assert echo.read(mmio.CONFIG, 2) == 0x0201
    assert echo.read(mmio.CONFIG + 1, 4) == 0x05040302
    assert echo.read(mmio.CONFIG + 4, 4) == 0x0605
    assert echo.read(mmio.CONFIG + 0xF0, 4) == 0
    assert echo.read(mmio.CONFIG, 8) == 0x060504030201
    echo.write(mmio.CONFIG + 2, 0xABCD, 2)
    assert echo.device.written == {2: b"\xcd\xab"}


def test_registers_take_32_bits_only(echo):
    assert echo.read(mmio.MAGIC_VALUE, 1) == 0
    assert echo.read(mmio.MAGIC_VALUE, 2) == 0
    assert echo.read(mmio.MAGIC_VALUE + 2, 4) == 0
    echo.write(mmio.STATUS, 0, 1)
    assert echo.status & transport.S_DRIVER_OK
    assert echo.bus.read(BASE, 8) == 0x00000002_74726976


def test_request_goes_round_by_kick_and_interrupt(echo):
    assert ask(echo, b"hello") == b"hello"
    assert echo.interrupts() == 1
    assert echo.read(mmio.INTERRUPT_STATUS) == mmio.INT_USED
    echo.write(mmio.INTERRUPT_ACK, mmio.INT_USED)
    assert echo.read(mmio.INTERRUPT_STATUS) == 0
    assert ask(echo, b"second queue", 1) == b"second queue"
    assert echo.device.acts == ["start", "drain", "reset", "start", "activate"]


def test_nothing_is_served_and_nobody_interrupted_before_driver_ok(loop, plug):
    driver = plug(Echo(loop))
    assert driver.negotiate()
    queue = driver.set_up_queue(0)
    queue.add([b"early"], [64])
    queue.kick()
    driver.run()
    assert queue.reap() == []
    driver.device.change_config(lambda: None)
    assert driver.interrupts() == 0
    driver.set_driver_ok()
    queue.kick()
    driver.run()
    assert len(queue.reap()) == 1


def test_kick_for_a_queue_that_is_not_ready_or_does_not_exist(loop, plug):
    driver = plug(Echo(loop))
    assert driver.negotiate()
    driver.set_driver_ok()
    for number in (0, 1, 2, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF):
        driver.write(mmio.QUEUE_NOTIFY, number)
    driver.run()
    assert driver.status == 15


def test_event_idx_saves_interrupts(echo):
    queue = echo.queues[0]
    queue.ask_interrupt(after=2)
    for number in range(3):
        queue.add([b"x"], [1])
        queue.kick()
        echo.run()
        assert echo.interrupts() == (1 if number == 2 else 0)


def test_work_at_once_is_bounded_but_all_of_it_is_done(echo):
    # A driver that adds as fast as it is served: each request that is served makes the next.
    queue = echo.queues[0]
    turns = []

    def serve(device_queue, chain):
        if len(turns) < 50:
            queue.offer(chain.head)
        turns.append(chain.head)
        device_queue.push(chain.head, 0)

    echo.device.handle_chain = serve
    queue.add([b"x"])
    queue.kick()
    echo.device.loop.run_once(0)
    assert len(turns) == queue.size
    echo.run()
    assert len(turns) == 51


# ---- features and status -------------------------------------------------------------------


def test_features_that_are_not_offered_are_refused(loop, plug):
    driver = plug(Echo(loop))
    assert not driver.negotiate(F_VERSION_1 | 1 << 6)
    assert not driver.negotiate(F_VERSION_1 | 1 << 63)
    assert not driver.negotiate(F_EVENT_IDX)  # without VERSION_1
    assert driver.negotiate(F_VERSION_1)
    assert driver.device.driver_features == F_VERSION_1


def test_features_beyond_the_first_64_are_refused(loop, plug):
    driver = plug(Echo(loop))
    driver.negotiate(0)
    driver.write(mmio.DRIVER_FEATURES_SEL, 1)
    driver.write(mmio.DRIVER_FEATURES, 1)
    driver.write(mmio.DRIVER_FEATURES_SEL, 2)
    driver.write(mmio.DRIVER_FEATURES, 0)
    driver.write(mmio.DRIVER_FEATURES_SEL, 0xFFFFFFFF)
    driver.write(mmio.DRIVER_FEATURES, 4)
    driver.write(mmio.STATUS, transport.S_FEATURES_OK)
    assert not driver.status & transport.S_FEATURES_OK


def test_features_are_fixed_once_accepted(echo):
    echo.write(mmio.DRIVER_FEATURES_SEL, 0)
    echo.write(mmio.DRIVER_FEATURES, 0)
    assert echo.device.driver_features == echo.features
    assert echo.transport.driver_features == echo.features


def test_driver_ok_needs_features_ok(loop, plug):
    driver = plug(Echo(loop))
    driver.write(mmio.STATUS, transport.S_ACKNOWLEDGE | transport.S_DRIVER | transport.S_DRIVER_OK)
    assert driver.status == transport.S_ACKNOWLEDGE | transport.S_DRIVER
    assert "activate" not in driver.device.acts


def test_status_bits_are_cleared_by_reset_alone(echo):
    echo.write(mmio.STATUS, transport.S_ACKNOWLEDGE)
    assert echo.status == 15
    echo.write(mmio.STATUS, 0xFFFFFFFF)
    assert echo.status == 15 | transport.S_FAILED  # NEEDS_RESET is the device's to set
    echo.write(mmio.STATUS, 0)
    assert echo.status == 0


def test_reset_forgets_the_driver(echo):
    ask(echo, b"x")
    echo.write(mmio.STATUS, 0)
    assert echo.device.acts[-3:] == ["drain", "reset", "start"]
    assert echo.read(mmio.INTERRUPT_STATUS) == 0
    echo.write(mmio.QUEUE_SEL, 0)
    assert echo.read(mmio.QUEUE_READY) == 0
    echo.start()
    assert ask(echo, b"again") == b"again"


@pytest.mark.parametrize(
    ("register", "value"),
    [
        (mmio.QUEUE_SIZE, 0),
        (mmio.QUEUE_SIZE, 3),
        (mmio.QUEUE_SIZE, 16),
        (mmio.QUEUE_SIZE, 65535),
        (mmio.QUEUE_SIZE, 0xFFFFFFFF),
        (mmio.QUEUE_DESC, 8),
        (mmio.QUEUE_DESC + 4, 0xFFFFFFFF),
        (mmio.QUEUE_DRIVER, 1),
        (mmio.QUEUE_DEVICE, 2),
        (mmio.QUEUE_DEVICE, 0xFFFFFFFC),
        (mmio.QUEUE_DEVICE + 4, 1),
    ],
)
def test_queue_that_cannot_be_breaks_the_device_until_reset(loop, plug, register, value):
    driver = plug(Echo(loop))
    assert driver.negotiate()
    driver.write(mmio.QUEUE_SEL, 0)
    driver.write(register, value)
    driver.write(mmio.QUEUE_READY, 1)
    assert driver.read(mmio.QUEUE_READY) == 0
    assert driver.status & transport.S_NEEDS_RESET
    assert driver.interrupts() == 0  # nobody is there to be told
    driver.start()
    assert driver.status == 15
    assert ask(driver, b"well") == b"well"


def test_queue_is_not_changed_while_it_is_used(echo):
    queue = echo.transport.queues[0]
    before = (queue.size, queue.desc, queue.avail, queue.used)
    echo.write(mmio.QUEUE_SEL, 0)
    for register in (
        *(mmio.QUEUE_SIZE, mmio.QUEUE_DESC, mmio.QUEUE_DESC + 4),
        *(mmio.QUEUE_DRIVER, mmio.QUEUE_DEVICE, mmio.QUEUE_READY),
    ):
        echo.write(register, 1)
    assert (queue.size, queue.desc, queue.avail, queue.used) == before
    assert ask(echo, b"same") == b"same"


def test_queue_is_not_set_up_before_features_or_after_driver_ok(loop, plug):
    driver = plug(Echo(loop))
    driver.write(mmio.QUEUE_SIZE, 4)
    driver.write(mmio.QUEUE_READY, 1)
    assert driver.transport.queues[0].size == 8
    assert driver.negotiate()
    driver.set_up_queue(0)
    driver.set_driver_ok()
    driver.write(mmio.QUEUE_SEL, 1)
    driver.write(mmio.QUEUE_READY, 1)
    assert driver.read(mmio.QUEUE_READY) == 0


def test_queue_that_is_taken_away_is_not_touched(echo):
    echo.write(mmio.QUEUE_SEL, 0)
    echo.queues[0].add([b"x"], [64])
    echo.write(mmio.QUEUE_READY, 0)
    assert echo.read(mmio.QUEUE_READY) == 0
    echo.queues[0].kick()
    echo.run()
    assert echo.queues[0].reap() == []
    assert ask(echo, b"the other", 1) == b"the other"


# ---- what breaks a device ------------------------------------------------------------------


def test_broken_ring_needs_a_reset_and_says_so(echo):
    queue = echo.queues[0]
    queue.write_descriptor(0, 0xFEB00000, 16, 0)
    queue.offer(0)
    queue.kick()
    echo.run()
    assert echo.status == 15 | transport.S_NEEDS_RESET
    assert echo.read(mmio.INTERRUPT_STATUS) == mmio.INT_CONFIG
    assert echo.interrupts() == 1
    assert "no memory" in echo.transport.properties()["error"]
    # Nothing more is served, nor told.
    echo.queues[1].add([b"x"], [64])
    echo.queues[1].kick()
    queue.kick()
    echo.run()
    assert echo.queues[1].reap() == []
    assert echo.interrupts() == 0
    echo.start()
    assert ask(echo, b"healed") == b"healed"
    assert "error" not in echo.transport.properties()


def test_config_change_is_told_with_a_new_generation(echo):
    before = echo.read(mmio.CONFIG_GENERATION)
    echo.device.change_config(lambda: None)
    assert echo.read(mmio.CONFIG_GENERATION) != before
    assert echo.read(mmio.INTERRUPT_STATUS) == mmio.INT_CONFIG
    assert echo.interrupts() == 1


def test_reset_waits_for_the_queue_that_is_being_served(echo):
    serving, go_on, done = Event(), Event(), Event()
    served = echo.device.handle_chain

    def slow(queue, chain):
        serving.set()
        assert go_on.wait(10)
        served(queue, chain)

    echo.device.handle_chain = slow
    echo.queues[0].add([b"x"], [64])
    echo.queues[0].kick()
    failures = []
    spawn(lambda: (echo.run(), done.set()), failures.append)
    assert serving.wait(10)
    reset = Event()
    spawn(lambda: (echo.write(mmio.STATUS, 0), reset.set()), failures.append)
    assert not reset.wait(0.05)
    go_on.set()
    assert reset.wait(10)
    assert done.wait(10)
    assert failures == []
    assert echo.device.acts[-2:] == ["reset", "start"]


def test_device_whose_thread_crashed_works_after_a_reset_of_the_machine(capsys):
    told, answered = Event(), Event()
    thread = IoThread("test-io", lambda _error: told.set())
    driver = VirtioDriver(Echo(thread.loop))
    driver.transport._thread = thread
    thread.start()
    try:
        driver.start()
        thread.loop.call_soon(lambda: 1 // 0)
        assert told.wait(10)
        # As the machine does.
        driver.transport.drain()
        driver.transport.reset()
        driver.transport.prepare()
        driver.transport.start()
        serve = driver.device.handle_chain
        driver.device.handle_chain = lambda *chain: (serve(*chain), answered.set())
        driver.start()
        request = driver.queues[0].add([b"again"], [64])
        driver.queues[0].kick()
        assert answered.wait(10)
        driver.transport.drain()
        assert request.data(5) == b"again"
    finally:
        driver.close()
    capsys.readouterr()


REGISTER = st.one_of(
    st.sampled_from(
        [
            *(mmio.STATUS, mmio.QUEUE_SEL, mmio.QUEUE_SIZE, mmio.QUEUE_READY),
            *(mmio.QUEUE_NOTIFY, mmio.QUEUE_DESC, mmio.QUEUE_DRIVER, mmio.QUEUE_DEVICE),
            *(mmio.DRIVER_FEATURES, mmio.DRIVER_FEATURES_SEL, mmio.INTERRUPT_ACK),
        ]
    ),
    st.integers(0, mmio.SIZE - 1),
)
VALUE = st.one_of(
    st.sampled_from([0, 1, 2, 3, 4, 8, 11, 15, 0x1000, 0x2000, 0x4000, 0x100000]),
    st.integers(0, (1 << 64) - 1),
)


@given(st.lists(st.tuples(REGISTER, st.sampled_from([1, 2, 4, 8]), VALUE), max_size=40))
def test_any_accesses_leave_a_device_that_works_after_a_reset(accesses):
    loop = EventLoop()
    driver = VirtioDriver(Echo(loop), ram_size=1 << 20)
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


def test_close_gives_every_descriptor_back(loop):
    before = descriptors("self")
    driver = VirtioDriver(Echo(loop))
    driver.start()
    driver.close()
    assert descriptors("self") == before
    assert driver.device.acts[-1] == "close"
