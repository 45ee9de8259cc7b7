"""What KVM counts of a VM (KVM API, section 4.137, KVM_GET_STATS_FD; Linux 5.14)."""

from __future__ import annotations

import os
import struct

from pyvmm._native import ioctl_value

_HEADER = struct.Struct("6I")  # flags, size of a name, number, offsets: of an id, descriptors, data
_DESCRIPTOR = struct.Struct("IhHII")  # flags, exponent, number of values, offset, bucket size
_VALUE = struct.Struct("Q")
MAX_COUNTERS = 4096


class VmStats:
    """The counters of a VM. Any thread.

    :param vm_fd: the VM's descriptor
    :raises KvmError: this host has none
    """

    def __init__(self, vm_fd: int) -> None:
        self._fd = ioctl_value(vm_fd, "KVM_GET_STATS_FD")
        self._places: dict[str, int] = {}
        _, name_size, count, _, descriptors, data = _HEADER.unpack(os.pread(self._fd, 24, 0))
        size = _DESCRIPTOR.size + name_size
        table = os.pread(self._fd, min(count, MAX_COUNTERS) * size, descriptors)
        for at in range(0, len(table) - size + 1, size):
            offset = _DESCRIPTOR.unpack_from(table, at)[3]
            name = table[at + _DESCRIPTOR.size : at + size].split(b"\0")[0]
            self._places[name.decode("ascii", "replace")] = data + offset

    def read(self, name: str) -> int:
        """Return a counter; 0 if KVM has none of that name."""
        place = self._places.get(name)
        raw = os.pread(self._fd, _VALUE.size, place) if place is not None else b""
        return int(_VALUE.unpack(raw)[0]) if len(raw) == _VALUE.size else 0

    def close(self) -> None:
        """Close the descriptor."""
        os.close(self._fd)
