"""The kernel and ROM that come with pyvmm: the built-in guest and the ROM."""

from __future__ import annotations

import os

from pyvmm.errors import ConfigError

GUEST = "guest.elf"
ROM = "bios.bin"

_PACKAGE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def path(name: str, *, required: bool = True) -> str:
    """Return the path of the file *name*: in an installed package, or built beside a checkout.

    :param required: False if the caller can do without: the path may be of no file then
    :raises ConfigError: it has not been built
    """
    checkout = os.path.dirname(_PACKAGE)
    for folder in (
        os.path.join(_PACKAGE, "data"),
        os.path.join(checkout, "guests", "build"),
        os.path.join(checkout, "firmware", "build"),
    ):
        candidate = os.path.join(folder, name)
        if os.path.isfile(candidate):
            return candidate
    if not required:
        return candidate
    raise ConfigError(f"the built-in image {name} has not been built; run: make guests firmware")
