"""A section: one device's place in a state stream, and how its state comes and goes."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from pyvmm.vmstate.fields import Description, Record


class Section:
    """One device in the stream.

    :param name: QEMU's section name (``idstr``)
    :param instance: tells devices of the same name apart
    :param description: how the state is written
    :param save: gives the object whose attributes the description names
    :param load: takes over a record that was read and checked
    """

    __slots__ = ("description", "instance", "load", "name", "save")

    def __init__(
        self,
        name: str,
        instance: int,
        description: Description,
        save: Callable[[], Any],
        load: Callable[[Record], None],
    ) -> None:
        self.name = name
        self.instance = instance
        self.description = description
        self.save = save
        self.load = load

    @property
    def key(self) -> tuple[str, int]:
        """What identifies the section in a stream."""
        return self.name, self.instance
