"""``virtio-rng-device``: random numbers, from the machine's sources."""

from __future__ import annotations

from pyvmm.machine.drivers import Property, chosen, integer, text
from pyvmm.machine.drivers.virtio import VirtioDriver

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from pyvmm.core.eventloop import EventLoop
    from pyvmm.devices.virtio.device import VirtioDevice
    from pyvmm.machine.drivers import Values
    from pyvmm.machine.parts import Parts


def create(model: Any, parts: Parts, values: Values, loop: EventLoop) -> VirtioDevice:
    """Return the device, on the source that it names."""
    from pyvmm.backends.rng import RngFile

    config = parts.rngs.get(values["rng"])
    source = RngFile(config, loop, parts.handover) if config and config.filename else None
    device: VirtioDevice = model(
        loop, source, **chosen(values, max_bytes="max-bytes", period_ms="period")
    )
    return device


DRIVER = VirtioDriver(
    "virtio-rng-device",
    help="random numbers for the guest",
    properties=(
        Property("rng", text, host=True, refers="rng"),
        Property("max-bytes", integer(1, (1 << 63) - 1), host=True),
        Property("period", integer(1, (1 << 31) - 1), host=True, needs="max-bytes"),
    ),
    model="pyvmm.devices.virtio.rng:VirtioRng",
    create=create,
)
DRIVERS = {DRIVER.name: DRIVER}
