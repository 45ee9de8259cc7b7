"""The drivers of ``-device``: what a declaration says, and which file has it.

A declaration is all that there is to say of a driver outside of its model. Key checks, help,
the device, what an update compares and what a state has derive from it. A file is imported when
the command line names one of its drivers, the model when its device is made: both are time of an
update's pause, and so would be further modules here.
"""

from __future__ import annotations

from pyvmm._util.keyval import check_keys, did_you_mean, parse_bool, parse_int, shorten
from pyvmm.errors import ConfigError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from typing import Any

    from pyvmm.machine.parts import Parts
    from pyvmm.vmstate.fields import Description

    Values = dict[str, Any]
    #: From a property's text, the option and the key, both for errors, to its value.
    Parse = Callable[[str, str, str], Any]

#: The file of this folder that declares a driver, in the order of the help.
FILES = {
    "isa-debug-exit": "isa",
    "isa-debugcon": "isa",
    "pvpanic": "isa",
    "vmcoreinfo": "board",
    "pc-testdev": "board",
    "pci-testdev": "pci",
    "virtio-blk-device": "virtio_blk",
    "virtio-net-device": "virtio_net",
    "virtio-rng-device": "virtio_rng",
    "virtio-serial-device": "virtio_console",
    "virtconsole": "virtio_console",
    "virtserialport": "virtio_console",
    "virtio-blk-pci": "virtio_pci",
    "virtio-net-pci": "virtio_pci",
    "virtio-rng-pci": "virtio_pci",
    "virtio-serial-pci": "virtio_pci",
}
#: QEMU's other names of them, which on its PCs are those on PCI.
ALIASES = {
    "virtio-blk": "virtio-blk-pci",
    "virtio-net": "virtio-net-pci",
    "virtio-rng": "virtio-rng-pci",
    "virtio-serial": "virtio-serial-pci",
}


class Property:
    """One property of a driver.

    :param name: QEMU's
    :param parse: gives the value, or raises ConfigError
    :param default: the value if the property is not given
    :param host: whether the next image of an update may have another value: only the host sees
        it, or the state carries what the guest was told
    :param refers: it is the id of a ``drive``, ``netdev``, ``rng`` or ``chardev``
    :param required: the mend if it is missing; empty if it may be
    :param needs: a property without which it means nothing
    """

    __slots__ = ("default", "host", "name", "needs", "parse", "refers", "required")

    def __init__(
        self,
        name: str,
        parse: Parse,
        default: Any = None,
        *,
        host: bool = False,
        refers: str = "",
        required: str = "",
        needs: str = "",
    ) -> None:
        self.name = name
        self.parse = parse
        self.default = default
        self.host = host
        self.refers = refers
        self.required = required
        self.needs = needs


class Driver:
    """A driver; each bus has a class of its own for those that sit on it.

    :param name: as in ``-device NAME``
    :param help: what it is, for the help
    :param properties: what it takes, in the order of the help
    :param model: ``module:Class``; empty for what is a part of another device
    :param check: raises ConfigError for values (second argument: the option, for the message) that
        do not go together
    """

    #: The bus that it sits on.
    bus = ""
    #: Whether the order of the options decides where the device is, so that an update keeps it.
    is_ordered = False
    #: Whether one ``-device`` is all that there can be.
    is_single = False

    def __init__(
        self,
        name: str,
        *,
        help: str,
        properties: tuple[Property, ...],
        model: str = "",
        check: Callable[[Values, str], None] | None = None,
    ) -> None:
        self.name = name
        self.help = help
        self.properties = properties
        self.path = model
        self.check = check

    def parse(self, given: dict[str, str], where: str) -> DeviceConfig:
        """Return the device that the properties of one ``-device`` ask for.

        :param where: the option, which opens every error
        :raises ConfigError: naming the property that cannot be, and the mend
        """
        check_keys(given, [one.name for one in self.properties], where)
        values = {}
        for one in self.properties:
            text = given.get(one.name)
            if one.required and not text:
                raise ConfigError(f"{where}: {one.name}= is missing; {one.required}")
            if text is not None and one.needs and one.needs not in given:
                raise ConfigError(f"{where}: {one.name}= is of {one.needs}=; add that")
            values[one.name] = one.default if text is None else one.parse(text, where, one.name)
        if self.check is not None:
            self.check(values, where)
        return DeviceConfig(self, given, values)

    def settle(self, device: DeviceConfig, devices: list[DeviceConfig]) -> None:
        """All options are read: see that a device goes with the others.

        :raises ConfigError: it does not
        """

    def extent(self, device: DeviceConfig) -> str:
        """Return what else of a device an update must keep, beside its told properties."""
        return ""

    def model(self) -> Any:
        """Return the class of the device, which is imported for that."""
        module, _, name = self.path.partition(":")
        return getattr(__import__(module, fromlist=[name]), name)

    def place(self, device: DeviceConfig, number: int) -> str:
        """Return where a device is, as a state has it; empty if its name says that.

        :param number: how many are on its bus before it
        """
        return ""

    def description(self) -> Description | None:
        """Return what a device writes into a state; None if that is nothing."""
        return self.model().vmstate if self.path else None

    def add(self, parts: Parts, device: DeviceConfig) -> None:
        """Make a device, and put it on its bus.

        :raises PyvmmError: what the host or the bus has no room for
        """


class DeviceConfig:
    """A ``-device``.

    :ivar given: its properties as they were typed
    :ivar values: all that the driver has, read
    :ivar place: slot and function, of a PCI device that is settled
    """

    __slots__ = ("driver", "given", "place", "values")

    def __init__(self, driver: Driver, given: dict[str, str], values: Values) -> None:
        self.driver = driver
        self.given = given
        self.values = values
        self.place: tuple[int, int] | None = None

    def refers(self, kind: str) -> Iterable[str]:
        """Return the ids of back ends of that kind that its properties name."""
        for one in self.driver.properties:
            if one.refers == kind and self.values[one.name] is not None:
                yield self.values[one.name]


def find(name: str) -> Driver:
    """Return the driver of that name.

    :raises ConfigError: there is none
    """
    name = ALIASES.get(name, name)
    if name not in FILES:
        mend = did_you_mean(name, FILES) or f"give one of {', '.join(FILES)}"
        raise ConfigError(f"-device: {shorten(name)} is no device; {mend}")
    module = f"{__name__}.{FILES[name]}"
    found: Driver = __import__(module, fromlist=["DRIVERS"]).DRIVERS[name]
    return found


def parse(driver: str, given: dict[str, str], option: str) -> DeviceConfig:
    """Return the device that one ``-device`` asks for; errors name ``option``."""
    return find(driver).parse(given, f"{option} {driver}")


def settle(devices: list[DeviceConfig]) -> None:
    """See that the devices of a machine go together.

    :raises ConfigError: they do not
    """
    for device in devices:
        device.driver.settle(device, devices)


def chosen(values: Values, **names: str) -> dict[str, Any]:
    """Return arguments for a model: its parameters by the properties that were given. What was
    not is as the model has it."""
    return {key: values[name] for key, name in names.items() if values[name] is not None}


# ---- kinds of properties ------------------------------------------------------------------------

flag = parse_bool


def text(value: str, _where: str, _key: str) -> str:
    """Return the text as it is."""
    return value


def integer(least: int, most: int) -> Parse:
    """Return a parser of numbers from ``least`` to ``most``."""
    return lambda value, where, key: parse_int(value, where, key, least, most)


def power(least: int, most: int, mend: str = "") -> Parse:
    """Return a parser of powers of two from ``least`` to ``most``; ``mend`` ends its error."""

    def parse(value: str, where: str, key: str) -> int:
        number = parse_int(value, where, key, least, most)
        if number & (number - 1):
            give = mend or f"give one from {least} to {most}"
            raise ConfigError(f"{where}: {key}={number} is no power of two; {give}")
        return number

    return parse


def choice(*known: str) -> Parse:
    """Return a parser that takes one of ``known``."""

    def parse(value: str, where: str, key: str) -> str:
        if value not in known:
            raise ConfigError(f"{where}: {key}={shorten(value)}: give one of {', '.join(known)}")
        return value

    return parse
