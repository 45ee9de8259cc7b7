"""``-device virtio-rng-device``: from its properties and the machine's sources to the device."""

from __future__ import annotations

from pyvmm._util.keyval import parse_int, shorten
from pyvmm.errors import ConfigError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pyvmm.core.eventloop import EventLoop
    from pyvmm.devices.virtio.device import VirtioDevice
    from pyvmm.machine.config import MachineConfig
    from pyvmm.machine.parts import Parts

DRIVER = "virtio-rng-device"
PROPERTIES = ("rng", "max-bytes", "period")
MAX_BYTES = (1, (1 << 63) - 1)
PERIODS_MS = (1, (1 << 31) - 1)


def load() -> type[VirtioDevice]:
    """The class."""
    from pyvmm.devices.virtio.rng import VirtioRng

    return VirtioRng


def create(
    parts: Parts, _config: MachineConfig, properties: dict[str, str], loop: EventLoop
) -> VirtioDevice:
    """The device, on the source that the properties name."""
    from pyvmm.backends.rng import RngFile
    from pyvmm.devices.virtio.rng import VirtioRng

    where = f"-device {DRIVER}"
    config = parts.rngs.get(properties.get("rng", ""))
    source = RngFile(config, loop, parts.handover) if config and config.filename else None
    limits = {}
    if "max-bytes" in properties:
        limits["max_bytes"] = parse_int(properties["max-bytes"], where, "max-bytes", *MAX_BYTES)
    if "period" in properties:
        limits["period_ms"] = parse_int(properties["period"], where, "period", *PERIODS_MS)
    return VirtioRng(loop, source, **limits)


def check(properties: dict[str, str], where: str) -> None:
    """Refuse properties that cannot be.

    :raises ConfigError: naming the property and the mend
    """
    for key, limits in (("max-bytes", MAX_BYTES), ("period", PERIODS_MS)):
        if key in properties:
            parse_int(properties[key], where, key, *limits)
    if "period" in properties and "max-bytes" not in properties:
        raise ConfigError(f"{where}: period= is of max-bytes=; add that")


def check_all(config: MachineConfig) -> None:
    """See that each device has the source that it names, for itself.

    :raises ConfigError: it does not
    """
    ids = [rng.id for rng in config.rngs]
    for id in ids:
        if ids.count(id) > 1 or any(block.id == id for block in config.objects):
            raise ConfigError(f"-object: the id {id} is given twice; rename one")
    used = set()
    for device in config.devices:
        name = device.properties.get("rng")
        if device.driver != DRIVER or name is None:
            continue
        where = f"-device {DRIVER}: rng={shorten(name)}"
        if name not in ids:
            raise ConfigError(f"{where}: there is no such source; add -object rng-random,id=ID")
        if name in used:
            raise ConfigError(f"{where}: it is in use by another device; add an -object")
        used.add(name)
