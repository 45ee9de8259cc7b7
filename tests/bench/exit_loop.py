"""A program: runs the exit loop of a vCPU whose KVM_RUN is ``exits.c``, which it preloads, and
prints the ns of an exit in user space, as JSON: ``exit_loop.py LIBRARY ACCESS COUNT RUNS``.

A kvm_run mapping is memory like any other: no KVM is needed.
"""

import ctypes
import json
import os
import sys
import time

from harness.virtio_echo import Echo

from pyvmm._native import ffi, lib
from pyvmm.chardev.null import NullChardev
from pyvmm.core.bus import Bus
from pyvmm.core.eventloop import EventLoop
from pyvmm.core.irq import IrqLine
from pyvmm.cpr.handover import Handover
from pyvmm.devices.debugcon import IOBASE, DebugConsole
from pyvmm.devices.serial import IIR, LSR, SCR, THR, Serial
from pyvmm.devices.virtio import mmio
from pyvmm.kvm.answers import Answers
from pyvmm.kvm.vcpu import Vcpu
from pyvmm.machine.cpu import Cpu, CpuEvents
from pyvmm.testing.virtio_driver import BASE, VirtioDriver

COM, DATA_AT, SIZE = 0x3F8, 4096, 8192
#: What native code answers: port or memory, address, size, value of a write.
NATIVE = {
    "THR write": ("port", COM + THR, 1, 0x41),
    "LSR read": ("port", COM + LSR, 1, None),
    "IIR read": ("port", COM + IIR, 1, None),
    "debug console": ("port", IOBASE, 1, 0x41),
    "interrupt status": ("memory", BASE + mmio.INTERRUPT_STATUS, 4, None),
    "acknowledge": ("memory", BASE + mmio.INTERRUPT_ACK, 4, 1),
    "configuration read": ("memory", BASE + mmio.CONFIG, 4, None),
}
#: What Python does.
PYTHON = {
    "port write": ("port", COM + SCR, 1, 0x41),
    "port read": ("port", COM + SCR, 1, None),
    "memory write": ("memory", BASE + mmio.QUEUE_SEL, 4, 0),
    "memory read": ("memory", BASE + mmio.STATUS, 4, None),
}
#: A batch is less than output waits in a ring.
MOST = 4000


class NoSystem:
    """What a vCPU asks of /dev/kvm."""

    msr_indices = ()

    def get_vcpu_mmap_size(self):
        return SIZE

    def check_extension(self, _name):
        return 0


class Loop:
    """A vCPU's exit loop with a serial port, a debug console and a virtio device."""

    def __init__(self, library):
        self._left = ctypes.c_long.in_dll(library, "exits_left")
        fd = os.memfd_create("kvm_run")
        os.truncate(fd, SIZE)
        loop = EventLoop()
        handover = Handover()
        self._driver = VirtioDriver(Echo(loop))
        ports = Bus("I/O", 1 << 16)
        self._outputs = []
        for start, count, device in (
            (COM, 8, Serial(IrqLine(4, print), NullChardev("serial", loop, handover))),
            (IOBASE, 1, DebugConsole(NullChardev("debug", loop, handover))),
        ):
            device.prepare()
            device.attach()
            ports.add(start, count, device, device.name)
            self._outputs.append(device.regs.output)
        loop.run_once(0)
        self._vcpu = Vcpu(fd, 0, NoSystem())
        self._answers = Answers([self._vcpu], ports, self._driver.bus)
        self._cpu = Cpu(self._vcpu, ports, self._driver.bus, CpuEvents())

    def hold(self, kind, address, size, value):
        """Have KVM_RUN come back with an access."""
        run = self._vcpu.mapping
        is_write = value is not None
        if kind == "port":
            run.exit_reason = lib.KVM_EXIT_IO
            io = run.exit.io
            io.direction = lib.KVM_EXIT_IO_OUT if is_write else lib.KVM_EXIT_IO_IN
            io.port, io.size, io.count, io.data_offset = address, size, 1, DATA_AT
            data = ffi.buffer(ffi.cast("char *", run) + DATA_AT, size)
        else:
            run.exit_reason = lib.KVM_EXIT_MMIO
            run.exit.mmio.phys_addr, run.exit.mmio.len = address, size
            run.exit.mmio.is_write = is_write
            data = ffi.buffer(run.exit.mmio.data, size)
        data[:] = (value or 0).to_bytes(size, "little")

    def run(self, count):
        """Serve an access so many times."""
        for output in self._outputs:
            output.head = output.tail
        self._left.value = count
        self._cpu._enter()


def main():
    """Measure."""
    path, access, count, runs = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
    library = ctypes.CDLL(path)
    loop = Loop(library)
    loop.hold(*(NATIVE | PYTHON)[access])
    loop.run(min(count, MOST))
    times = []
    for _ in range(runs):
        begin = time.monotonic_ns()
        loop.run(count)
        times.append((time.monotonic_ns() - begin) / count)
    print(json.dumps(times), flush=True)
    # For callgrind, which counts nothing else.
    function = ctypes.CFUNCTYPE(None)(lambda: loop.run(count))
    library.exits_measure(function)
    os._exit(0)  # what was made here need not be taken apart


if __name__ == "__main__":
    main()
