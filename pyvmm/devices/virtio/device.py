"""What all virtio devices have in common (virtio 1.3, 2), whatever carries them.

A device is a subclass of :class:`VirtioDevice` that serves chains; its transport
(``transport.Transport``) owns registers, kicks and interrupts and calls the methods here.

Threads: ``handle_queue`` runs on the thread of the device's loop, with its lock held, so a
slow device needs a loop of its own (``core.iothread``). Register accesses come on vCPU
threads. Whoever else works on queues (a chardev's input, an I/O worker's end) goes through
:meth:`VirtioDevice.work`. Locks are taken in the order of the transport's, the device's.
"""

from __future__ import annotations

from pyvmm.core.threads import Lock, report_crash
from pyvmm.errors import GuestError, RamError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, Protocol

    from pyvmm.core.eventloop import EventLoop
    from pyvmm.devices.virtio.queue import Chain, Queue
    from pyvmm.memory.guest import GuestMemory
    from pyvmm.vmstate.fields import Description, Record

    class Transport(Protocol):
        """What a device asks of its transport (``transport.Transport``)."""

        @property
        def active(self) -> bool: ...
        @property
        def running(self) -> bool: ...
        def kick(self, index: int) -> None: ...
        def interrupt_used(self, index: int) -> None: ...
        def change_config(self, change: Callable[[], None], *, tell: bool = True) -> None: ...
        def fail(self, reason: str) -> None: ...


F_INDIRECT_DESC = 1 << 28
F_EVENT_IDX = 1 << 29
F_VERSION_1 = 1 << 32


class VirtioDevice:
    """A virtio device, to be given to a transport.

    :param loop: its kicks are served there
    :ivar lock: held while a queue is served and while the device is reset
    :ivar memory: the guest's, from the transport
    :ivar queues: one for each of ``queue_sizes``, from the transport
    :ivar driver_features: what was negotiated
    """

    #: Device type (virtio 1.3, 5).
    virtio_id = 0
    #: QEMU's name of the device, which is its section's in a state, too.
    name = "virtio-device"
    #: Most entries of each queue, powers of two.
    queue_sizes: tuple[int, ...] = ()
    #: Chains that are served at once; 0: as many as the queue has entries.
    batch = 0
    #: Feature bits of this device type; the transport adds its own.
    features = 0
    #: The device configuration space (virtio 1.3, 2.5).
    config: bytes = b""
    #: The device's own state; None if it has none.
    vmstate: Description | None = None
    #: See :class:`pyvmm.devices.base.Device`.
    waits_for_host = False

    memory: GuestMemory
    transport: Transport

    def __init__(self, loop: EventLoop) -> None:
        self.loop = loop
        self.lock = Lock()
        self.queues: list[Queue] = []
        self.driver_features = 0

    # ---- what a device implements ----------------------------------------------------------

    def properties(self) -> dict[str, Any]:
        """Return what ``info qtree`` prints of the device."""
        return {}

    @property
    def subject(self) -> str:
        """What errors of the host call the device."""
        return self.name

    def read_config(self, offset: int, size: int) -> bytes:
        """Return part of the configuration space; what is missing at the end reads as 0. The
        transport asks when it has reset, set up or loaded the device, after :meth:`write_config`
        and within :meth:`change_config`: nothing else changes what is here."""
        return self.config[offset : offset + size]

    def write_config(self, offset: int, data: bytes) -> None:
        """The driver writes to the configuration space. vCPU thread, without the lock."""

    def handle_queue(self, index: int) -> None:
        """The driver kicked a queue: serve it. The loop's thread, with the lock held.

        This one gives chain by chain to :meth:`handle_chain`, no more at once than ``batch``: a
        driver that never stops must not keep the loop for itself.

        :raises GuestError: the driver broke the rules; the device goes to DEVICE_NEEDS_RESET
        :raises RamError: the host cannot back memory; the queue is served again when it can
        """
        queue = self.queues[index]
        queue.disable_notifications()
        left = self.batch or queue.size
        while (left := left - self.serve_natively(queue, left)) > 0:
            left -= 1  # also without a chain: a driver may move its index to and fro
            chain = queue.pop()
            if chain is not None:
                try:
                    self.handle_chain(queue, chain)
                except RamError:
                    queue.unpop()
                    raise
            elif not queue.enable_notifications():
                break
        else:
            self.kick(index)
        self.notify_used(index)

    def serve_natively(self, queue: Queue, most: int) -> int:
        """Do the next requests, at most ``most``, without Python; return how many. Those that it
        leaves are for :meth:`handle_chain`."""
        return 0

    def handle_chain(self, queue: Queue, chain: Chain) -> None:
        """Serve one request and ``push`` it. After a RamError the request comes again."""
        raise NotImplementedError

    def on_activate(self) -> None:
        """The driver is ready (DRIVER_OK). vCPU thread, with the lock held."""

    def reset(self) -> None:
        """Forget what belongs to the driver that was. With the lock held, after a
        :meth:`drain`."""

    def busy(self) -> str:
        """Return what the host has still to do for requests under way, for the operator; empty if
        there are none. Without the lock; does not wait."""
        return ""

    def drain(self, timeout_s: float | None = None) -> None:
        """Wait until no request is under way. No queue is served from before this call until
        :meth:`start`. Without the lock; must not depend on the main loop, which waits.

        :param timeout_s: how long; None: as long as the device finds good
        :raises HostError: that was not enough
        """

    def start(self) -> None:
        """Work, at first or again: nothing keeps the device from it any more. After this every
        queue is served as if it had been kicked. Main loop thread or a vCPU's."""

    def attach(self) -> None:
        """Take input from the host, once in each process: the state is complete. Main loop
        thread."""

    def close(self) -> None:
        """The VM ends: give host resources back. Nothing is under way."""

    def save(self) -> Any:
        """Return the object whose attributes ``vmstate`` names; after a :meth:`drain`."""
        return self

    def check(self, state: Record) -> None:
        """See that a record is possible for this very device; nothing is changed.

        :raises ValueError: it is not, and why
        """

    def load(self, state: Record) -> None:
        """Take over a record that ``vmstate`` has read and checked."""
        for name, value in state.__dict__.items():
            setattr(self, name, value)

    # ---- what a device calls ---------------------------------------------------------------

    @property
    def active(self) -> bool:
        """Whether a driver is there and the device works: DRIVER_OK, no DEVICE_NEEDS_RESET."""
        return self.transport.active

    @property
    def running(self) -> bool:
        """Whether new work may begin: active, and nothing keeps the device standing."""
        return self.transport.running and self.transport.active

    def work(self, function: Callable[..., None], *arguments: Any) -> None:
        """Call under the lock, if the device is active. A broken rule of the guest's ends in
        DEVICE_NEEDS_RESET, and so does a bug of ours: the others go on. Memory that the host
        cannot back pauses the guest. Any thread."""
        with self.lock:
            if self.active:
                try:
                    function(*arguments)
                except RamError as error:
                    self.memory.report(error)
                except GuestError as error:
                    self.fail(str(error))
                except Exception as error:
                    report_crash(error)
                    self.fail(f"internal error: {error!r}")

    def kick(self, index: int) -> None:
        """Have :meth:`handle_queue` called soon. Any thread."""
        self.transport.kick(index)

    def notify_used(self, index: int) -> None:
        """Interrupt the driver for what was pushed to a queue, if it wants that. With the lock
        held."""
        if self.queues[index].needs_interrupt():
            self.transport.interrupt_used(index)

    def change_config(self, change: Callable[[], None], *, tell: bool = True) -> None:
        """Call ``change``, which changes what the configuration space holds, so that no driver
        finds half of it, and tell the driver. Any thread.

        :param tell: interrupt the driver for it
        """
        self.transport.change_config(change, tell=tell)

    def fail(self, reason: str) -> None:
        """Go to DEVICE_NEEDS_RESET (virtio 1.3, 2.1.1): nothing is served until a reset.

        :param reason: for ``info qtree``
        """
        self.transport.fail(reason)
