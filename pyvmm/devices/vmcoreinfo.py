"""QEMU's ``vmcoreinfo``: a file of fw_cfg into which a kernel writes where its VMCOREINFO note is,
for whoever makes a dump of its memory.

``write`` runs on a vCPU thread, under the lock of fw_cfg.
"""

from __future__ import annotations

import struct

from pyvmm.devices.base import Device
from pyvmm.vmstate.fields import Description, Record, boolean, u16, u32, u64

#: Formats of the note: what the host takes, and what the guest has.
FORMAT_NONE, FORMAT_ELF = 0, 1

# host_format, guest_format, size, paddr
_CONTENT = struct.Struct("<HHIQ")


class VmCoreInfo(Device):
    """The item of fw_cfg, as it begins or as the guest wrote it.

    :ivar has_vmcoreinfo: whether the guest has written where a note is
    """

    name = "vmcoreinfo"
    is_writable = True
    size = _CONTENT.size
    vmstate = Description(
        "vmcoreinfo",
        [
            boolean("has_vmcoreinfo"),
            u16("host_format"),
            u16("guest_format"),
            u32("note_size"),
            u64("paddr"),
        ],
    )

    def __init__(self) -> None:
        super().__init__()
        self.reset()

    def reset(self) -> None:
        self.has_vmcoreinfo = False
        self._content = bytearray(_CONTENT.pack(FORMAT_ELF, FORMAT_NONE, 0, 0))

    def save(self) -> Record:
        names = ("host_format", "guest_format", "note_size", "paddr")
        values = dict(zip(names, _CONTENT.unpack(self._content), strict=True))
        return Record(has_vmcoreinfo=self.has_vmcoreinfo, **values)

    def load(self, state: Record) -> None:
        self.has_vmcoreinfo = state.has_vmcoreinfo
        self._content[:] = _CONTENT.pack(
            state.host_format, state.guest_format, state.note_size, state.paddr
        )

    def read(self, offset: int, size: int) -> bytes:
        """Return some of it."""
        return bytes(self._content[offset : offset + size])

    def write(self, offset: int, data: bytes) -> None:
        """Take some of it."""
        self._content[offset : offset + len(data)] = data
        guest_format = _CONTENT.unpack(self._content)[1]
        self.has_vmcoreinfo = len(data) == self.size and guest_format != FORMAT_NONE
