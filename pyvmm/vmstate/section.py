"""A section: one device's place in a state stream, and how its state comes and goes.

A section is called by the place of its device, so that a device that comes or goes elsewhere
changes no other's: by bus and address (``virtio-mmio@feb00200/virtio-net-device``), or by its
number where that says the place (a vCPU's APIC id, a serial port's number), or by its name alone
where a machine has one. Images before that counted the devices of a name.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from typing import Any

    from pyvmm.vmstate.fields import Description, Record

    #: Name and instance of a section.
    Key = tuple[str, int]


class Section:
    """One device in the stream.

    :param name: QEMU's section name (``idstr``)
    :param instance: tells devices of the same name apart
    :param description: how the state is written
    :param save: gives the object whose attributes the description names
    :param load: takes over a record that was read and checked
    :param former: name and instance by which images before call it, if they do otherwise
    :param needed: of a section that may be missing, since images before do not know it: whether
        there is anything to say
    """

    __slots__ = ("description", "former", "instance", "load", "name", "needed", "save")

    def __init__(
        self,
        name: str,
        instance: int,
        description: Description,
        save: Callable[[], Any],
        load: Callable[[Record], None],
        former: Key | None = None,
        needed: Callable[[], bool] | None = None,
    ) -> None:
        self.name = name
        self.instance = instance
        self.description = description
        self.save = save
        self.load = load
        self.former = former or self.key
        self.needed = needed

    @property
    def key(self) -> Key:
        """What identifies the section in a stream."""
        return self.name, self.instance


def section_names(devices: Iterable[tuple[str, str]]) -> list[tuple[Key, Key]]:
    """Return what the sections of a machine's devices are called, and were before.

    :param devices: place and name of each, in the order in which they were added
    """
    counts: dict[str, int] = {}
    found = []
    for place, name in devices:
        former = name, counts.get(name, 0)
        counts[name] = former[1] + 1
        found.append(((f"{place}/{name}", 0) if place else former, former))
    return found
