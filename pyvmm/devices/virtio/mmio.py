"""The virtio-mmio transport, version 2 (virtio 1.3, 4.2): registers, kicks, interrupts, state.

Left out: the legacy interface, shared memory regions, and resetting a single queue.

A kick is an eventfd that KVM signals in place of an exit; an interrupt is a pulse on an input
of the IOAPIC, so the guest must use it edge triggered. Neither needs to survive an update:
:meth:`VirtioMmio.start` looks at every queue, and repeats an interrupt that was not
acknowledged, as one too many does no harm.

What an evil guest can try: registers in any order and of any width (a queue's set-up is taken
only between FEATURES_OK and DRIVER_OK, and judged as a whole when the queue is enabled),
rings anywhere (see ``queue``), kicks without end (each serves a bounded number of chains on
the device's loop). A device that it broke waits for its reset; no other notices.

``on_read``/``on_write`` run on vCPU threads, kicks on the thread of the device's loop, the
rest on the main loop thread, with the vCPUs stopped but for :meth:`VirtioMmio.quiesce`, its
undoing and :meth:`VirtioMmio.busy`.

There are three reasons why no queue is served, each set and cleared by one thread at a time and
none in place of another: the vCPUs stand (from drain to start), the device is quiesced, and a
driver takes a queue back, with its vCPU held until nothing is under way.
"""

from __future__ import annotations

import os

from pyvmm.core.eventloop import READABLE
from pyvmm.core.threads import Lock
from pyvmm.devices.base import Device
from pyvmm.devices.virtio.device import F_EVENT_IDX, F_INDIRECT_DESC, F_VERSION_1
from pyvmm.devices.virtio.queue import Queue, QueueError
from pyvmm.errors import HostError
from pyvmm.vmstate.fields import (
    Description,
    Record,
    Struct,
    StructArray,
    boolean,
    each,
    u8,
    u16,
    u32,
    u64,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from pyvmm.core.iothread import IoThread
    from pyvmm.devices.virtio.device import VirtioDevice
    from pyvmm.memory.guest import GuestMemory

#: Addresses of one device's registers.
SIZE = 0x200
#: Widest access that is not split, in bytes.
WIDTH = 4

MAGIC_VALUE = 0x000
VERSION = 0x004
DEVICE_ID = 0x008
VENDOR_ID = 0x00C
DEVICE_FEATURES = 0x010
DEVICE_FEATURES_SEL = 0x014
DRIVER_FEATURES = 0x020
DRIVER_FEATURES_SEL = 0x024
QUEUE_SEL = 0x030
QUEUE_SIZE_MAX = 0x034
QUEUE_SIZE = 0x038
QUEUE_READY = 0x044
QUEUE_NOTIFY = 0x050
INTERRUPT_STATUS = 0x060
INTERRUPT_ACK = 0x064
STATUS = 0x070
QUEUE_DESC = 0x080
QUEUE_DRIVER = 0x090
QUEUE_DEVICE = 0x0A0
SHM_LENGTH_LOW = 0x0B0
SHM_BASE_HIGH = 0x0BC
CONFIG_GENERATION = 0x0FC
CONFIG = 0x100

MAGIC = 0x74726976  # "virt"
VENDOR = 0x4D565950  # "PYVM"

S_ACKNOWLEDGE = 1
S_DRIVER = 2
S_DRIVER_OK = 4
S_FEATURES_OK = 8
S_NEEDS_RESET = 64
S_FAILED = 128
#: What a driver can set.
S_DRIVERS = S_ACKNOWLEDGE | S_DRIVER | S_DRIVER_OK | S_FEATURES_OK | S_FAILED

INT_USED = 1
INT_CONFIG = 2

#: Feature bits that the transport and its queues offer for every device.
FEATURES = F_INDIRECT_DESC | F_EVENT_IDX | F_VERSION_1

#: Offered by none: stands for the bits that a driver wants from beyond the first 64.
F_UNKNOWN = 1 << 63

MAX_QUEUES = 64
DRAIN_TIMEOUT_S = 10.0
_SERVED = "the queue that is being served does not come to its end"

#: Registers of a queue's addresses -> attribute, and how far to shift the value.
_ADDRESSES = {
    register + 4 * half: (name, 32 * half)
    for register, name in ((QUEUE_DESC, "desc"), (QUEUE_DRIVER, "avail"), (QUEUE_DEVICE, "used"))
    for half in (0, 1)
}

_QUEUE = Description(
    "virtqueue",
    [
        u16("size"),
        boolean("ready"),
        *each(u64, "desc avail used"),
        *each(u16, "last_avail_idx used_idx"),
    ],
)


def _check_transport(state: Record) -> None:
    status = state.status
    if status & ~(S_DRIVERS | S_NEEDS_RESET):
        raise ValueError(f"status {status:#x} has bits that do not exist")
    if status & S_DRIVER_OK and not status & S_FEATURES_OK:
        raise ValueError(f"status {status:#x}: a driver without features")
    if state.interrupt_status & ~(INT_USED | INT_CONFIG):
        raise ValueError(f"interrupt_status {state.interrupt_status:#x} does not exist")


_TRANSPORT = Description(
    "virtio-mmio",
    [
        u8("status"),
        u8("interrupt_status"),
        u32("config_generation"),
        u64("driver_features"),
        *each(u32, "device_features_sel driver_features_sel queue_sel"),
        u16("queue_count"),
        StructArray("queues", _QUEUE, "queue_count", MAX_QUEUES),
    ],
    check=_check_transport,
)


def description(device: type[VirtioDevice] | VirtioDevice) -> Description:
    """How the state of a device and its transport is written. The version is the device's own,
    which the stream says nowhere else."""
    if device.vmstate is None:
        return Description(device.name, [Struct("transport", _TRANSPORT)])
    parts = [Struct("transport", _TRANSPORT), Struct("device", device.vmstate)]
    return Description(device.name, parts, version=device.vmstate.version)


class VirtioMmio(Device):
    """The registers of one device.

    :param device: what sits behind them
    :param memory: the guest's
    :param base: guest-physical address, for ``info qtree``
    :param gsi: interrupt line, for ``info qtree``
    :param kick_fds: a non-blocking eventfd for each queue, owned from now on: the guest's
        writes to QUEUE_NOTIFY
    :param pulse: interrupts the guest; called by one thread at a time
    :param thread: whose loop is the device's, if it is not the main one; owned from now on
    :ivar error: why the device needs a reset, if it does
    """

    def __init__(
        self,
        device: VirtioDevice,
        memory: GuestMemory,
        *,
        base: int,
        gsi: int,
        kick_fds: list[int],
        pulse: Callable[[], None],
        thread: IoThread | None = None,
    ) -> None:
        super().__init__()
        self.device = device
        self.name = device.name
        vmstate = description(device)
        vmstate.check = self._check
        self.vmstate = vmstate
        self.base = base
        self.gsi = gsi
        self.features = device.features | FEATURES
        self.queues = [Queue(memory, size) for size in device.queue_sizes]
        self._kick_fds = kick_fds
        self._pulse = pulse
        self._thread = thread
        self.waits_for_host = device.waits_for_host
        # status and interrupt_status are changed by vCPUs and by the device's loop. What the
        # configuration space holds changes under it, together with its generation.
        self._bits = Lock()
        self._stopped = True  # the vCPUs stand, or have not started
        self._quiesced = False
        self.holds_cpu = False
        device.memory = memory
        device.queues = self.queues
        device.transport = self
        self.config_generation = 0
        self._clear()

    def _clear(self) -> None:
        self.error = ""
        self.status = self.interrupt_status = 0
        self.driver_features = self.device.driver_features = 0
        self.device_features_sel = self.driver_features_sel = self.queue_sel = 0
        for queue in self.queues:
            queue.reset()

    def properties(self) -> dict[str, Any]:
        return {
            "address": self.base,
            "irq": self.gsi,
            "status": self.status,
            "features": self.driver_features,
            **({"error": self.error} if self.error else {}),
            **self.device.properties(),
        }

    @property
    def queue_count(self) -> int:
        """Number of queues, for the state."""
        return len(self.queues)

    @property
    def running(self) -> bool:
        """Whether queues may be served, if there is a driver."""
        return not (self._stopped or self._quiesced or self.holds_cpu)

    @property
    def active(self) -> bool:
        """Whether queues may be touched and interrupts sent."""
        return self.status & (S_DRIVER_OK | S_NEEDS_RESET) == S_DRIVER_OK

    # ---- guest accesses --------------------------------------------------------------------

    def on_read(self, offset: int, size: int) -> int:
        if offset >= CONFIG:
            with self._bits:
                data = self.device.read_config(offset - CONFIG, size)
            return int.from_bytes(data, "little")
        if size != 4 or offset & 3:
            return 0
        queue = self._selected()
        if offset == INTERRUPT_STATUS:
            return self.interrupt_status
        if offset == STATUS:
            return self.status
        if offset == CONFIG_GENERATION:
            with self._bits:  # not between a change and its generation
                return self.config_generation
        if offset == QUEUE_READY:
            return int(queue is not None and queue.ready)
        if offset == QUEUE_SIZE_MAX:
            return queue.max_size if queue is not None else 0
        if offset == DEVICE_FEATURES:
            # 32 bits of them; only two such words exist.
            word = self.device_features_sel
            return self.features >> 32 * word & 0xFFFFFFFF if word < 2 else 0
        if SHM_LENGTH_LOW <= offset <= SHM_BASE_HIGH:
            return 0xFFFFFFFF  # there is no such region
        return {
            MAGIC_VALUE: MAGIC,
            VERSION: 2,
            DEVICE_ID: self.device.virtio_id,
            VENDOR_ID: VENDOR,
        }.get(offset, 0)

    def on_write(self, offset: int, size: int, value: int) -> None:
        if offset >= CONFIG:
            self.device.write_config(offset - CONFIG, value.to_bytes(size, "little"))
        elif size != 4 or offset & 3:
            pass
        elif offset == INTERRUPT_ACK:
            with self._bits:
                self.interrupt_status &= ~value
        elif offset == QUEUE_NOTIFY:
            # Only what KVM does not know: with its eventfd an existing queue never gets here.
            if value < len(self.queues):
                self.kick(value)
        elif offset == STATUS:
            self._write_status(value)
        elif offset == DEVICE_FEATURES_SEL:
            self.device_features_sel = value
        elif offset == DRIVER_FEATURES_SEL:
            self.driver_features_sel = value
        elif offset == DRIVER_FEATURES:
            self._write_features(value)
        elif offset == QUEUE_SEL:
            self.queue_sel = value
        else:
            queue = self._selected()
            if queue is not None:
                self._write_queue(queue, offset, value)

    def _selected(self) -> Queue | None:
        return self.queues[self.queue_sel] if self.queue_sel < len(self.queues) else None

    def _write_status(self, value: int) -> None:
        if value == 0:
            self._reset_device(self._wait_for_driver)
            return
        # A driver may not clear bits but by a reset.
        status = self.status | value & S_DRIVERS
        if status & S_FEATURES_OK and not self.status & S_FEATURES_OK:
            accepted = self.driver_features
            if accepted & ~self.features or not accepted & F_VERSION_1:
                status &= ~S_FEATURES_OK  # the driver reads it back
            else:
                self._negotiate()
        if not status & S_FEATURES_OK:
            status &= ~S_DRIVER_OK
        activated = status & S_DRIVER_OK and not self.status & S_DRIVER_OK
        with self._bits:
            self.status |= status
        if activated:
            with self.device.lock:
                self.device.on_activate()

    def _write_features(self, value: int) -> None:
        word = self.driver_features_sel
        if self.status & S_FEATURES_OK:
            return
        if word < 2:
            kept = self.driver_features & ~(0xFFFFFFFF << 32 * word)
            self.driver_features = kept | value << 32 * word
        elif value:
            self.driver_features |= F_UNKNOWN

    def _negotiate(self) -> None:
        self.device.driver_features = self.driver_features
        for queue in self.queues:
            queue.event_idx = bool(self.driver_features & F_EVENT_IDX)
            queue.indirect = bool(self.driver_features & F_INDIRECT_DESC)

    def _write_queue(self, queue: Queue, offset: int, value: int) -> None:
        if offset == QUEUE_READY and not value & 1:
            self._disable(queue)
            return
        # Sizes and addresses that change under a device that uses them are a classic.
        if queue.ready or self.status & (S_FEATURES_OK | S_DRIVER_OK) != S_FEATURES_OK:
            return
        if offset == QUEUE_READY:
            try:
                queue.enable()
            except QueueError as error:
                self.fail(str(error))
        elif offset == QUEUE_SIZE:
            # 0 is no size, like all that are too large.
            queue.size = value if value <= queue.max_size else 0
        elif offset in _ADDRESSES:
            name, shift = _ADDRESSES[offset]
            kept = getattr(queue, name) & ~(0xFFFFFFFF << shift)
            setattr(queue, name, kept | value << shift)

    def _disable(self, queue: Queue) -> None:
        # Buffers and rings are the driver's again after this: what is under way ends before, and
        # nothing begins in between, whoever starts the device meanwhile.
        if not queue.ready:
            return
        self.holds_cpu = True
        try:
            self._wait_for_driver()
            with self.device.lock:
                queue.disable()
        finally:
            self.holds_cpu = False
        self._go()

    def _reset_device(self, wait: Callable[[], None]) -> None:
        # First: what comes to its end now is not returned any more.
        with self._bits:
            self.status = 0
        self.holds_cpu = True
        try:
            wait()
            with self.device.lock:
                self.device.reset()
                self._clear()
        finally:
            self.holds_cpu = False
        self._go()

    # ---- kicks and interrupts --------------------------------------------------------------

    def kick(self, index: int) -> None:
        """Have a queue served soon. Any thread."""
        os.eventfd_write(self._kick_fds[index], 1)

    def interrupt_used(self) -> None:
        """Say that there is something in a used ring. Any thread."""
        self._interrupt(INT_USED)

    def change_config(self, change: Callable[[], None], *, tell: bool = True) -> None:
        """Change what the configuration space holds, and its generation with it: a driver that
        reads in between finds both old or both new (virtio 1.3, 2.5.3). Any thread.

        :param change: does it, at once
        :param tell: interrupt the driver for it
        """
        with self._bits:
            change()
            self.config_generation = self.config_generation + 1 & 0xFFFFFFFF
        if tell:
            self._interrupt(INT_CONFIG)

    def fail(self, reason: str) -> None:
        """Set DEVICE_NEEDS_RESET. Any thread."""
        with self._bits:
            self.status |= S_NEEDS_RESET
            self.error = reason
            self.config_generation = self.config_generation + 1 & 0xFFFFFFFF
        self._interrupt(INT_CONFIG)

    def _interrupt(self, bit: int) -> None:
        with self._bits:
            # Nobody is told before DRIVER_OK, nor after a reset.
            if not self.status & S_DRIVER_OK:
                return
            self.interrupt_status |= bit
            # With every event: the line is edge triggered. And under the lock: two pulses at
            # once would be one edge.
            self._pulse()

    def _handle_kick(self, index: int) -> None:
        try:
            os.eventfd_read(self._kick_fds[index])
        except BlockingIOError:
            return
        # What comes while the device stands is made up for by _go.
        device = self.device
        device.work(self._serve, index)

    def _serve(self, index: int) -> None:
        if self.running and self.queues[index].ready:
            self.device.handle_queue(index)

    # ---- run states and state --------------------------------------------------------------

    def reset(self) -> None:
        self._reset_device(self._wait)
        self.config_generation = 0

    def attach(self) -> None:
        """Serve kicks from now on."""
        self.device.loop.call_soon(self._watch_kicks)
        self.device.attach()

    def _watch_kicks(self) -> None:
        for index, fd in enumerate(self._kick_fds):
            self.device.loop.add(
                fd,
                READABLE,
                lambda _revents, index=index: self._handle_kick(index),  # type: ignore[misc]
            )

    def quiesce(self) -> None:
        self._quiesced = True

    def busy(self) -> str:
        # One that is being served ends its turn, unless it hangs in the host.
        if not self.device.lock.acquire(blocking=False):
            return f"{self.device.subject}: {_SERVED}"
        self.device.lock.release()
        held = f"{self.device.subject}: its driver waits" if self.holds_cpu else ""
        return self.device.busy() or held

    def unquiesce(self) -> None:
        self._quiesced = False
        self._go()

    def drain(self, timeout_s: float | None = None) -> None:
        self._stopped = True
        self._wait(timeout_s)

    def _wait(self, timeout_s: float | None = None) -> None:
        """Wait until nothing is under way.

        :raises HostError: it is not in time
        """
        # Whoever is serving a queue comes to the end of it, unless it hangs in the host.
        patience = DRAIN_TIMEOUT_S if timeout_s is None else timeout_s
        if not self.device.lock.acquire(timeout=patience):
            raise HostError(f"{self.device.subject}: {_SERVED}")
        self.device.lock.release()
        self.device.drain(timeout_s)

    def _wait_for_driver(self) -> None:
        """The same on a vCPU's thread, which has nowhere to go before it is done: a disk that
        hangs holds up the driver that resets it, for as long as it does."""
        while True:
            try:
                self._wait()
            except HostError:
                continue
            return

    def prepare(self) -> None:
        if self._thread is not None:
            self._thread.start()  # again if it crashed: the machine was reset then

    def start(self) -> None:
        self._stopped = False
        self._go()
        with self._bits:
            if self.interrupt_status:
                self._pulse()

    def _go(self) -> None:
        """One reason to stand is gone: if it was the last one, make up for the kicks."""
        if self.running:
            self.device.start()
            if self.active:
                for index in range(len(self.queues)):
                    self.kick(index)

    def close(self) -> None:
        self.drain()
        if self._thread is not None:
            self._thread.close()
        fds, self._kick_fds = self._kick_fds, []
        for fd in fds:
            self.device.loop.remove(fd)
            os.close(fd)
        # The rings are views of memory, which cannot be unmapped before they are gone.
        for queue in self.queues:
            queue.reset()
        self.device.close()

    def save(self) -> Record:
        return Record(transport=self, device=self.device.save())

    def _check(self, state: Record) -> None:
        transport = state.transport
        if transport.queue_count != len(self.queues):
            raise ValueError(f"{transport.queue_count} queues, the device has {len(self.queues)}")
        unknown = transport.driver_features & ~self.features
        if unknown and transport.status & S_FEATURES_OK:
            raise ValueError(f"features {unknown:#x} are not those of this device")
        for index, queue in enumerate(transport.queues):
            if queue.ready:
                self._check_queue(index, queue)
        if self.device.vmstate is not None:
            self.device.check(state.device)

    def _check_queue(self, index: int, state: Record) -> None:
        trial = Queue(self.device.memory, self.queues[index].max_size)
        _copy(state, trial)
        try:
            trial.enable()
        except QueueError as error:
            raise ValueError(f"queue {index}: {error}") from None
        trial.reset()

    def load(self, state: Record) -> None:
        transport = state.transport
        for name in (
            *("status", "interrupt_status", "config_generation", "driver_features"),
            *("device_features_sel", "driver_features_sel", "queue_sel"),
        ):
            setattr(self, name, getattr(transport, name))
        if self.status & S_FEATURES_OK:
            self._negotiate()
        for queue, saved in zip(self.queues, transport.queues, strict=True):
            _copy(saved, queue)
            if saved.ready:
                queue.enable()
        if self.status & S_NEEDS_RESET:
            self.error = "broken before the update"
        if self.device.vmstate is not None:
            self.device.load(state.device)


def _copy(state: Record, queue: Queue) -> None:
    for name in ("size", "desc", "avail", "used", "last_avail_idx", "used_idx"):
        setattr(queue, name, getattr(state, name))
