"""What the operator says of the kernel. Apart from the loader, which an update does not import."""

from __future__ import annotations

#: ``-machine kernel-unpack``: who unpacks a bzImage; the first value is the default.
UNPACKERS = ("host", "guest")


class KernelConfig:
    """``-kernel``, ``-initrd`` and ``-append``; an empty path means none.

    :ivar unpack: one of :data:`UNPACKERS`
    """

    __slots__ = ("append", "initrd", "kernel", "unpack")

    def __init__(
        self, kernel: str = "", initrd: str = "", append: str = "", unpack: str = UNPACKERS[0]
    ) -> None:
        self.kernel = kernel
        self.initrd = initrd
        self.append = append
        self.unpack = unpack
