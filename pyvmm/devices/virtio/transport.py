"""A virtio transport, whatever its registers look like (virtio 1.3, 2 and 3): status, features,
queue set-up, kicks, interrupts, run states, state.

A transport that a guest can see is a *face*: a subclass with registers, which calls what stands
under "what registers call" below and brings an :class:`Interrupts` (``mmio``). Left out, with any
face: the legacy interface, shared memory regions, and resetting a single queue.

A kick is an eventfd that KVM signals in place of an exit. It need not survive an update:
:meth:`Transport.start` looks at every queue.

What an evil guest can try: set-up in any order (a queue's is taken only between FEATURES_OK and
DRIVER_OK, and judged as a whole when the queue is enabled), rings anywhere (see ``queue``), kicks
without end (each serves a bounded number of chains on the device's loop). A device that it broke
waits for its reset; no other notices.

What registers call runs on vCPU threads, kicks on the thread of the device's loop, the rest on
the main loop thread, with the vCPUs stopped but for :meth:`Transport.quiesce`, its undoing and
:meth:`Transport.busy`.

There are three reasons why no queue is served, each set and cleared by one thread at a time and
none in place of another: the vCPUs stand (from drain to start), the device is quiesced, and a
driver takes a queue back, with its vCPU held until nothing is under way.
"""

from __future__ import annotations

import os

from pyvmm._native import ffi, lib
from pyvmm.core.eventloop import READABLE
from pyvmm.core.native import shared_lock
from pyvmm.core.threads import Lock
from pyvmm.devices.base import Device
from pyvmm.devices.virtio.device import F_EVENT_IDX, F_INDIRECT_DESC, F_VERSION_1
from pyvmm.devices.virtio.queue import Queue, QueueError
from pyvmm.errors import HostError
from pyvmm.vmstate.fields import Description, Record, Struct, boolean, each, u16, u64

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from pyvmm.core.iothread import IoThread
    from pyvmm.devices.virtio.device import VirtioDevice
    from pyvmm.memory.guest import GuestMemory

# Device status (virtio 1.3, 2.1).
S_ACKNOWLEDGE = 1
S_DRIVER = 2
S_DRIVER_OK = 4
S_FEATURES_OK = 8
S_NEEDS_RESET = 64
S_FAILED = 128
#: What a driver can set.
S_DRIVERS = S_ACKNOWLEDGE | S_DRIVER | S_DRIVER_OK | S_FEATURES_OK | S_FAILED

#: Feature bits that the transport and its queues offer for every device.
FEATURES = F_INDIRECT_DESC | F_EVENT_IDX | F_VERSION_1

#: Offered by none: stands for the bits that a driver wants from beyond the first 64.
F_UNKNOWN = 1 << 63

MAX_QUEUES = 64
CONFIG_SIZE = lib.PYVMM_CONFIG_SIZE
DRAIN_TIMEOUT_S = 10.0
_SERVED = "the queue that is being served does not come to its end"

#: How a face writes a queue; its layout has them as ``queue_count`` and ``queues``.
QUEUE = Description(
    "virtqueue",
    [
        u16("size"),
        boolean("ready"),
        *each(u64, "desc avail used"),
        *each(u16, "last_avail_idx used_idx"),
    ],
)


def check_status(status: int) -> None:
    """See that a status from a state is possible.

    :raises ValueError: it is not, and why
    """
    if status & ~(S_DRIVERS | S_NEEDS_RESET):
        raise ValueError(f"status {status:#x} has bits that do not exist")
    if status & S_DRIVER_OK and not status & S_FEATURES_OK:
        raise ValueError(f"status {status:#x}: a driver without features")


class Interrupts:
    """How a face interrupts its driver. Called by one thread at a time, on any."""

    def used(self, queue: int) -> None:
        """There is something in the used ring of a queue."""
        raise NotImplementedError

    def config(self) -> None:
        """The configuration space or the status has changed."""
        raise NotImplementedError

    def repeat(self) -> None:
        """The vCPUs are about to run, perhaps after an update: interrupt again for what the driver
        has not acknowledged, since one interrupt too many does no harm."""

    def reset(self) -> None:
        """Forget what the driver that was has not acknowledged."""

    def call_fd(self, queue: int) -> int | None:
        """Return the eventfd that does what :meth:`used` does when it is signalled, for whoever
        serves a queue without us, such as the kernel; None where only :meth:`used` can."""
        return None


class Transport(Device):
    """One device's transport.

    :param device: what sits behind it
    :param memory: the guest's
    :param interrupts: the face's
    :param kick_fds: a non-blocking eventfd for each queue, owned from now on: the guest's
        notifications
    :param thread: whose loop is the device's, if it is not the main one; owned from now on
    :ivar features: feature bits that are offered
    :ivar driver_features: what the driver has written of them
    :ivar error: why the device needs a reset, if it does
    """

    #: How a face writes its state: ``status``, ``config_generation``, ``driver_features`` and the
    #: queues, and registers of its own.
    layout: Description

    def __init__(
        self,
        device: VirtioDevice,
        memory: GuestMemory,
        interrupts: Interrupts,
        kick_fds: list[int],
        thread: IoThread | None = None,
    ) -> None:
        super().__init__()
        self.device = device
        self.name = device.name
        vmstate = self.description(device)
        vmstate.check = self._check
        self.vmstate = vmstate
        self.features = device.features | FEATURES
        self.queues = [Queue(memory, size) for size in device.queue_sizes]
        self.interrupts = interrupts
        self.kick_fds = kick_fds
        self._thread = thread
        self.waits_for_host = device.waits_for_host
        # The status and what was interrupted for are changed by vCPUs and by the device's loop.
        # What the configuration space holds changes under it, together with its generation.
        self._bits = Lock()
        #: The configuration space as the driver reads it, also by native code.
        self.config = ffi.new("struct pyvmm_config *")
        self._config_lock = shared_lock(ffi.addressof(self.config, "lock"))
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
        self.status = 0
        self.driver_features = self.device.driver_features = 0
        self.interrupts.reset()
        self.clear_registers()
        for queue in self.queues:
            queue.reset()
        self._show_config()

    def _show_config(self) -> None:
        # What it depends on may have changed.
        with self._bits, self._config_lock:
            self._fill_config()

    def _fill_config(self) -> None:
        data = self.device.read_config(0, CONFIG_SIZE)
        ffi.buffer(self.config.bytes)[:] = data.ljust(CONFIG_SIZE, b"\0")

    @property
    def config_generation(self) -> int:
        """The register, which is in the state, too."""
        return int(self.config.generation)

    @config_generation.setter
    def config_generation(self, value: int) -> None:
        self.config.generation = value

    @classmethod
    def description(cls, device: type[VirtioDevice] | VirtioDevice) -> Description:
        """Return how the state of a device and its transport is written. The version is the
        device's own, which the stream says nowhere else."""
        if device.vmstate is None:
            return Description(device.name, [Struct("transport", cls.layout)])
        parts = [Struct("transport", cls.layout), Struct("device", device.vmstate)]
        return Description(device.name, parts, version=device.vmstate.version)

    def properties(self) -> dict[str, Any]:
        return {
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

    # ---- what a face implements ------------------------------------------------------------

    def clear_registers(self) -> None:
        """Give the face's own registers the values after a reset."""

    def load_registers(self, state: Record) -> None:
        """Take over the face's own registers from a record of its ``layout``."""

    # ---- what registers call ---------------------------------------------------------------

    def read_features(self, word: int) -> int:
        """Return 32 of the bits that are offered; only two such words exist."""
        return self.features >> 32 * word & 0xFFFFFFFF if word < 2 else 0

    def write_features(self, word: int, value: int) -> None:
        """Take 32 bits that the driver wants, before FEATURES_OK."""
        if self.status & S_FEATURES_OK:
            return
        if word < 2:
            kept = self.driver_features & ~(0xFFFFFFFF << 32 * word)
            self.driver_features = kept | value << 32 * word
        elif value:
            self.driver_features |= F_UNKNOWN

    def write_status(self, value: int) -> None:
        """Take what the driver writes to the status; 0 resets the device."""
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

    def _negotiate(self) -> None:
        self.device.driver_features = self.driver_features
        for queue in self.queues:
            queue.event_idx = bool(self.driver_features & F_EVENT_IDX)
            queue.indirect = bool(self.driver_features & F_INDIRECT_DESC)
        self._show_config()

    def find_queue(self, index: int) -> Queue | None:
        """Return a queue; None if there is none of that number."""
        return self.queues[index] if index < len(self.queues) else None

    def _can_set_up(self, queue: Queue) -> bool:
        # Sizes and addresses that change under a device that uses them are a classic.
        return not queue.ready and self.status & (S_FEATURES_OK | S_DRIVER_OK) == S_FEATURES_OK

    def write_queue_size(self, queue: Queue, value: int) -> None:
        """Take the number of entries that the driver chose."""
        if self._can_set_up(queue):
            # 0 is no size, like all that are too large.
            queue.size = value if value <= queue.max_size else 0

    def write_queue_address(self, queue: Queue, area: str, half: int, value: int) -> None:
        """Take 32 bits of an address.

        :param area: ``desc``, ``avail`` or ``used``
        :param half: 0 for the lower, 1 for the upper
        """
        if self._can_set_up(queue):
            kept = getattr(queue, area) & ~(0xFFFFFFFF << 32 * half)
            setattr(queue, area, kept | value << 32 * half)

    def enable_queue(self, queue: Queue) -> None:
        """Use a queue that the driver has set up; one that cannot be breaks the device."""
        if self._can_set_up(queue):
            try:
                queue.enable()
            except QueueError as error:
                self.fail(str(error))

    def disable_queue(self, queue: Queue) -> None:
        """Give a queue back to the driver. Buffers and rings are its own after this: what is
        under way ends before, and nothing begins in between, whoever starts the device
        meanwhile."""
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

    def read_config(self, offset: int, size: int) -> int:
        """Return a part of the configuration space; not within a change of it."""
        with self._bits:
            data = ffi.buffer(self.config.bytes)[offset : offset + size]
        return int.from_bytes(data, "little")

    def write_config(self, offset: int, size: int, value: int) -> None:
        """Write to the configuration space."""
        self.device.write_config(offset, value.to_bytes(size, "little"))
        self._show_config()

    def read_generation(self) -> int:
        """Return ``config_generation``; not between a change and its generation."""
        with self._bits:
            return self.config_generation

    # ---- kicks and interrupts --------------------------------------------------------------

    def kick(self, index: int) -> None:
        """Have a queue served soon. Any thread."""
        os.eventfd_write(self.kick_fds[index], 1)

    def interrupt_used(self, index: int) -> None:
        """Say that there is something in the used ring of a queue. Any thread."""
        with self._bits:
            # Nobody is told before DRIVER_OK, nor after a reset.
            if self.status & S_DRIVER_OK:
                self.interrupts.used(index)

    def _interrupt_config(self) -> None:
        with self._bits:
            if self.status & S_DRIVER_OK:
                self.interrupts.config()

    def change_config(self, change: Callable[[], None], *, tell: bool = True) -> None:
        """Change what the configuration space holds, and its generation with it: a driver that
        reads in between finds both old or both new (virtio 1.3, 2.5.3). Any thread.

        :param change: does it, at once
        :param tell: interrupt the driver for it
        """
        with self._bits, self._config_lock:
            change()
            self._fill_config()
            self.config_generation = self.config_generation + 1 & 0xFFFFFFFF
        if tell:
            self._interrupt_config()

    def fail(self, reason: str) -> None:
        """Set DEVICE_NEEDS_RESET. Any thread."""
        with self._bits:
            self.status |= S_NEEDS_RESET
            self.error = reason
            self.config_generation = self.config_generation + 1 & 0xFFFFFFFF
        self._interrupt_config()

    def _watch_kicks(self) -> None:
        for index, fd in enumerate(self.kick_fds):
            self.device.loop.add(
                fd,
                READABLE,
                lambda _revents, index=index: self._handle_kick(index),  # type: ignore[misc]
            )

    def _handle_kick(self, index: int) -> None:
        try:
            os.eventfd_read(self.kick_fds[index])
        except BlockingIOError:
            return
        # _go makes up for kicks that come while the device stands.
        device = self.device
        device.work(self._serve, index)

    def _serve(self, index: int) -> None:
        if self.running and self.queues[index].ready:
            self.device.handle_queue(index)

    # ---- life ------------------------------------------------------------------------------

    def reset(self) -> None:
        self._reset_device(self._wait)
        self.config_generation = 0

    def _reset_device(self, wait: Callable[[], None]) -> None:
        # First: requests that end from here on are not returned to the driver any more.
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

    def prepare(self) -> None:
        if self._thread is not None:
            self._thread.start()  # again if it crashed: the machine was reset then

    def start(self) -> None:
        self._stopped = False
        self._go()
        with self._bits:
            self.interrupts.repeat()

    def _go(self) -> None:
        """A reason to stand is gone: if it was the last, begin, and make up for kicks."""
        if self.running:
            self.device.start()
            if self.active:
                for index in range(len(self.queues)):
                    self.kick(index)

    def attach(self) -> None:
        """Serve kicks from now on."""
        self.device.loop.call_soon(self._watch_kicks)
        self.device.attach()

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
        """Wait likewise on a vCPU's thread, which has nowhere to go before that ends: a disk that
        hangs holds up the driver that resets it, for as long as it hangs."""
        while True:
            try:
                self._wait()
            except HostError:
                continue
            return

    def close(self) -> None:
        self.drain()
        if self._thread is not None:
            self._thread.close()
        fds, self.kick_fds = self.kick_fds, []
        for fd in fds:
            self.device.loop.remove(fd)
            os.close(fd)
        # The rings are views of memory, which cannot be unmapped before they are gone.
        for queue in self.queues:
            queue.reset()
        self.device.close()

    # ---- state -----------------------------------------------------------------------------

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
        for name in ("status", "config_generation", "driver_features"):
            setattr(self, name, getattr(transport, name))
        self.load_registers(transport)
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
        self._show_config()


def _copy(state: Record, queue: Queue) -> None:
    for name in ("size", "desc", "avail", "used", "last_avail_idx", "used_idx"):
        setattr(queue, name, getattr(state, name))
