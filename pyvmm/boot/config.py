"""What the operator says of the kernel. Apart from the loader, which an update does not import."""

from __future__ import annotations

#: ``-machine kernel-unpack``: who unpacks a bzImage; the first value is the default.
UNPACKERS = ("host", "guest")


#: ``-machine kernel-type``: of what kind the kernel is; the first value, the default, lets its
#: contents tell.
TYPES = ("auto", "linux", "pvh", "multiboot", "flat")


class KernelConfig:
    """``-kernel``, ``-initrd`` and ``-append``; an empty path means none.

    :ivar unpack: one of :data:`UNPACKERS`
    :ivar type: one of :data:`TYPES`
    """

    __slots__ = ("append", "initrd", "kernel", "type", "unpack")

    def __init__(
        self,
        kernel: str = "",
        initrd: str = "",
        append: str = "",
        unpack: str = UNPACKERS[0],
        type: str = TYPES[0],
    ) -> None:
        self.kernel = kernel
        self.initrd = initrd
        self.append = append
        self.unpack = unpack
        self.type = type
