"""Accesses as a vCPU's thread makes them: native code is asked first, and the bus after it.

What KVM_RUN came back with is a ``struct kvm_run`` of the test's, so no KVM is needed.
"""

from types import SimpleNamespace

from pyvmm._native import ffi, lib
from pyvmm.core.bus import Bus
from pyvmm.kvm.answers import Answers

#: Where KVM puts the data of ports, and how much there is room for.
DATA_AT, DATA_SIZE = 4096, 4096


class NativeBuses:
    """Two buses with the table of what native code answers on them.

    :ivar answered: how many accesses native code has answered
    """

    def __init__(self, ports=None, mmio=None):
        self.ports = ports or Bus("I/O", 1 << 16)
        self.mmio = mmio or Bus("memory", 1 << 64)
        self.gate = ffi.new("struct pyvmm_gate *")
        self._page = ffi.new("char[]", DATA_AT + DATA_SIZE)
        self.run = self.gate.run = ffi.cast("struct pyvmm_run *", self._page)
        self.answered = 0
        self.table = Answers([SimpleNamespace(gate=self.gate)], self.ports, self.mmio)

    def ask(self):
        """Whether native code answers what ``run`` holds."""
        answered = bool(lib.pyvmm_answer(self.gate.answers, self.run))
        self.answered += answered
        return answered

    def set_port(self, port, size, value=None, count=1):
        """Have ``run`` hold an access to a port, a read if there is no value; its data."""
        self.run.exit_reason = lib.KVM_EXIT_IO
        io = self.run.exit.io
        is_write = value is not None
        io.direction = lib.KVM_EXIT_IO_OUT if is_write else lib.KVM_EXIT_IO_IN
        io.port, io.size, io.count, io.data_offset = port, size, count, DATA_AT
        data = ffi.buffer(self._page + DATA_AT, size * count)
        data[:] = (value or 0).to_bytes(size, "little") * count
        return data

    def set_mmio(self, gpa, size, value=None):
        """The same for an address without memory."""
        self.run.exit_reason = lib.KVM_EXIT_MMIO
        mmio = self.run.exit.mmio
        mmio.phys_addr, mmio.len, mmio.is_write = gpa, size, value is not None
        data = ffi.buffer(mmio.data, min(size, 8))
        data[:] = (value or 0).to_bytes(size, "little")
        return data

    def read(self, address, size, *, is_port=True):
        """What a read gives, whoever answers it."""
        data = (self.set_port if is_port else self.set_mmio)(address, size)
        if self.ask():
            return int.from_bytes(data[:], "little")
        return (self.ports if is_port else self.mmio).read(address, size)

    def write(self, address, size, value, *, is_port=True):
        """Write."""
        (self.set_port if is_port else self.set_mmio)(address, size, value)
        if not self.ask():
            (self.ports if is_port else self.mmio).write(address, size, value)
