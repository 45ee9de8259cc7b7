"""What all device models have in common.

A device module has, in this order: a header (which specification, what is left out, what an
evil guest can try), named register constants, the description of its state, the class. Guest
accesses enter by ``on_read``/``on_write`` on a vCPU thread with the device's lock held;
everything named ``handle_…`` comes from the main loop and takes the lock itself.

The life of a device, in the words that every layer uses for it, and the thread that calls
(a virtio device, ``virtio.device``, hears of some of it from a vCPU's thread too: its driver
resets it or takes a queue back):

=============  ==========  =====  =============================================================
call           thread      vCPUs  when
=============  ==========  =====  =============================================================
``reset``      main, vCPU  stand  power-on, and each reset of the machine; or by the driver
``prepare``    main        stand  before the first ``start``, and after each reset of the
                                  machine: do all of it that can fail
``load``       main        stand  in a new image, in place of the first ``reset``
``start``      main, vCPU  stand  they are about to run: work, at first or after ``drain``
``attach``     main        any    once in each process, when the state is complete: take input
``quiesce``    main        run    an update is about to stop them: begin no work. ``busy`` tells
                                  when all that was under way has ended
``unquiesce``  main        run    work again: the undoing of ``quiesce``
``drain``      main, vCPU  stand  they have stopped: begin no work, and wait for the end of what
                                  is under way
``save``       main        stand  after ``drain``
``close``      main        stand  the end: give all back
=============  ==========  =====  =============================================================

``quiesce`` and ``drain`` do not replace each other: a machine that is stopped and goes on, or
is reset, while it is quiesced, stays so until ``unquiesce``. A virtio device's transport keeps
them apart: the device itself is only told to ``drain``, and to ``start`` when nothing keeps it
from that any more. What a device calls in its turn has the same words: a network back end's
``start``, a chardev's ``attach``. To ``resume`` is what vCPUs do, and nothing else.
"""

from __future__ import annotations

from pyvmm.core.bus import BusDevice
from pyvmm.core.threads import Lock

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from pyvmm.vmstate.fields import Description, Record


class Device(BusDevice):
    """A device of the machine."""

    #: How the state is written; None for a device that has none.
    vmstate: Description | None = None

    #: Section name in the stream and node name in ``info qtree``.
    name = "device"

    #: Where it is, for its section's name: bus and address; empty if the name alone says it.
    place = ""

    #: What ``-device ...,id=`` called it.
    id = ""

    #: Whether its requests take as long as the host's storage does. Those of all others end
    #: at once, or wait where a state can take them along.
    waits_for_host = False

    #: Whether a vCPU waits in one of its registers for requests under way, and cannot stop.
    holds_cpu = False

    #: Whether a state has its section only if :attr:`has_state`: older images, which do not know
    #: the device, go on with a guest that has no use for it.
    is_optional = False

    def __init__(self) -> None:
        self.lock = Lock()

    @property
    def has_state(self) -> bool:
        """Whether the state is another than after power-on. Any thread."""
        return True

    def properties(self) -> dict[str, Any]:
        """Return what ``info qtree`` prints of the device, in QEMU's property names."""
        return {}

    def reset(self) -> None:
        """Go to the power-on state. The vCPUs are stopped."""

    def save(self) -> Any:
        """Return the object whose attributes ``vmstate`` names. The vCPUs are stopped."""
        return self

    def load(self, state: Record) -> None:
        """Take over a record that ``vmstate`` has read and checked."""
        for name, value in state.__dict__.items():
            setattr(self, name, value)

    def prepare(self) -> None:
        """Do all that can fail of :meth:`start`: threads, descriptors. Before the first start and
        after each reset; nothing of the guest's is touched.

        :raises HostError: naming what the host refuses
        """

    def start(self) -> None:
        """The vCPUs are about to run, at first or again after :meth:`drain`. Nothing here may
        fail: after an update there is no way back any more."""

    def attach(self) -> None:
        """Take input from the host, once in each process: the state is complete, after power-on
        or a load."""

    def quiesce(self) -> None:
        """While the guest runs: begin no work for it from now on, until :meth:`unquiesce`. What
        it asks for meanwhile is done then. Does not wait for what is under way. Idempotent."""

    def busy(self) -> str:
        """Return what is under way, and whose fault that is, for the operator; empty once there
        is nothing. Does not wait."""
        return ""

    def unquiesce(self) -> None:
        """Work again, if the guest runs. Idempotent."""

    def drain(self, timeout_s: float | None = None) -> None:
        """The vCPUs have stopped: finish what is under way, begin nothing, until
        :meth:`start`. A state may be saved next, or the machine reset.

        :param timeout_s: how long to wait for the host; None: as long as the device finds good
        :raises HostError: the host does not get done with it in time
        """

    def close(self) -> None:
        """The VM ends: give descriptors and views of memory back."""
