"""What all device models have in common.

A device module has, in this order: a header (which specification, what is left out, what an
evil guest can try), named register constants, the description of its state, the class. Guest
accesses enter by ``on_read``/``on_write`` on a vCPU thread with the device's lock held;
everything named ``handle_…`` comes from the main loop and takes the lock itself.
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

    #: What ``-device ...,id=`` called it.
    id = ""

    def __init__(self) -> None:
        self.lock = Lock()

    def properties(self) -> dict[str, Any]:
        """What ``info qtree`` prints of the device, in QEMU's property names."""
        return {}

    def reset(self) -> None:
        """Go to the power-on state. The vCPUs are stopped."""

    def save(self) -> Any:
        """The object whose attributes ``vmstate`` names. The vCPUs are stopped."""
        return self

    def load(self, state: Record) -> None:
        """Take over a record that ``vmstate`` has read and checked."""
        for name, value in state.__dict__.items():
            setattr(self, name, value)

    def drain(self, timeout_s: float | None = None) -> None:
        """The vCPUs have stopped: finish what is under way, begin nothing, until
        :meth:`start`. A state may be saved next, or the machine reset.

        :param timeout_s: how long to wait for the host; None: as long as the device finds good
        :raises HostError: the host does not get done with it in time
        """

    def prepare(self) -> None:
        """Do all that can fail of :meth:`start`: threads, descriptors. Before the first start and
        after each reset; nothing of the guest's is touched.

        :raises HostError: naming what the host refuses
        """

    def start(self) -> None:
        """The vCPUs are about to run, at first or again after :meth:`drain`. Nothing here may
        fail: after an update there is no way back any more."""

    def close(self) -> None:
        """The VM ends: give descriptors and views of memory back."""

    def resume(self) -> None:
        """Go to work, once in each process: the state is complete, after power-on or a load."""
