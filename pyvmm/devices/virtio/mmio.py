"""The registers of virtio-mmio, version 2 (virtio 1.3, 4.2): a face of ``transport``.

One interrupt serves all: a pulse on an input of the IOAPIC, so the guest must use it edge
triggered. It need not survive an update: one that was not acknowledged is repeated.

What an evil guest can try: accesses in any order and of any width. Below CONFIG, those that are
not of 4 bytes or hit no register read as 0 and ignore writes.
"""

from __future__ import annotations

from pyvmm._native import clear_bits, ffi, lib, set_bits
from pyvmm.core.native import NativeAnswers, address
from pyvmm.devices.virtio.transport import (
    CONFIG_SIZE,
    MAX_QUEUES,
    QUEUE,
    Interrupts,
    Transport,
    check_status,
)
from pyvmm.vmstate.fields import Description, Record, StructArray, each, u8, u16, u32, u64

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from pyvmm.core.iothread import IoThread
    from pyvmm.devices.virtio.device import VirtioDevice
    from pyvmm.memory.guest import GuestMemory

#: Widest access that is not split, in bytes.
WIDTH = 4

MAGIC_VALUE = 0x000
VERSION = 0x004
DEVICE_ID = 0x008
VENDOR_ID = 0x00C
DEVICE_FEATURES = 0x010
DEVICE_FEATURES_SEL = 0x014
DRIVER_FEATURES = 0x020
DRIVER_FEATURES_SEL = 0x024
QUEUE_SEL = 0x030
QUEUE_SIZE_MAX = 0x034
QUEUE_SIZE = 0x038
QUEUE_READY = 0x044
QUEUE_NOTIFY = 0x050
INTERRUPT_STATUS = 0x060
INTERRUPT_ACK = 0x064
STATUS = 0x070
QUEUE_DESC = 0x080
QUEUE_DRIVER = 0x090
QUEUE_DEVICE = 0x0A0
SHM_LENGTH_LOW = 0x0B0
SHM_BASE_HIGH = 0x0BC
CONFIG_GENERATION = 0x0FC
CONFIG = 0x100
#: Addresses of one device's registers.
SIZE = CONFIG + CONFIG_SIZE

#: What native code answers.
READS = (INTERRUPT_STATUS, CONFIG_GENERATION, *range(CONFIG, SIZE, 4))
WRITES = (INTERRUPT_ACK,)

MAGIC = 0x74726976  # "virt"
VENDOR = 0x4D565950  # "PYVM"

INT_USED = 1
INT_CONFIG = 2

#: Registers of a queue's addresses -> which area, and which half of the address.
_ADDRESSES = {
    register + 4 * half: (area, half)
    for register, area in ((QUEUE_DESC, "desc"), (QUEUE_DRIVER, "avail"), (QUEUE_DEVICE, "used"))
    for half in (0, 1)
}


def place(base: int) -> str:
    """Return where a device with its registers at ``base`` is, as a state has it."""
    return f"virtio-mmio@{base:x}"


def _check(state: Record) -> None:
    check_status(state.status)
    if state.interrupt_status & ~(INT_USED | INT_CONFIG):
        raise ValueError(f"interrupt_status {state.interrupt_status:#x} does not exist")


class Line(Interrupts):
    """One line, and a register that says what it was for.

    :param regs: ``struct pyvmm_virtio_mmio *``, which has the register: INT_USED and INT_CONFIG,
        until the driver acknowledges them
    :param pulse: interrupts the guest; called by one thread at a time
    """

    def __init__(self, regs: Any, pulse: Callable[[], None]) -> None:
        self._regs = regs
        self._status = address(ffi.addressof(regs, "interrupt_status"))
        self._pulse = pulse

    # A pulse with every event: the line is edge triggered.

    def used(self, queue: int) -> None:
        set_bits(self._status, INT_USED)
        self._pulse()

    def config(self) -> None:
        set_bits(self._status, INT_CONFIG)
        self._pulse()

    def acknowledge(self, bits: int) -> None:
        """The driver has seen these."""
        clear_bits(self._status, bits)

    def repeat(self) -> None:
        if self._regs.interrupt_status:
            self._pulse()

    def reset(self) -> None:
        self._regs.interrupt_status = 0


class VirtioMmio(Transport):
    """The registers of one device.

    :param base: guest-physical address, for ``info qtree``
    :param gsi: interrupt line, for ``info qtree``
    :param pulse: interrupts the guest; called by one thread at a time
    """

    layout = Description(
        "virtio-mmio",
        [
            u8("status"),
            u8("interrupt_status"),
            u32("config_generation"),
            u64("driver_features"),
            *each(u32, "device_features_sel driver_features_sel queue_sel"),
            u16("queue_count"),
            StructArray("queues", QUEUE, "queue_count", MAX_QUEUES),
        ],
        check=_check,
    )

    def __init__(
        self,
        device: VirtioDevice,
        memory: GuestMemory,
        *,
        base: int,
        gsi: int,
        kick_fds: list[int],
        pulse: Callable[[], None],
        thread: IoThread | None = None,
    ) -> None:
        self.base = base
        self.place = place(base)
        self.gsi = gsi
        self.regs = ffi.new("struct pyvmm_virtio_mmio *")
        self._line = Line(self.regs, pulse)
        super().__init__(device, memory, self._line, kick_fds, thread)
        self.regs.config = self.config
        self.answers = NativeAnswers(lib.PYVMM_VIRTIO_MMIO, self.regs, READS, WRITES)

    def properties(self) -> dict[str, Any]:
        return {"address": self.base, "irq": self.gsi, **super().properties()}

    @property
    def interrupt_status(self) -> int:
        """The register, for the state."""
        return int(self.regs.interrupt_status)

    def clear_registers(self) -> None:
        self.device_features_sel = self.driver_features_sel = self.queue_sel = 0

    def load_registers(self, state: Record) -> None:
        self.regs.interrupt_status = state.interrupt_status
        self.device_features_sel = state.device_features_sel
        self.driver_features_sel = state.driver_features_sel
        self.queue_sel = state.queue_sel

    # ---- guest accesses --------------------------------------------------------------------

    def on_read(self, offset: int, size: int) -> int:
        if offset >= CONFIG:
            return self.read_config(offset - CONFIG, size)
        if size != 4 or offset & 3:
            return 0
        if offset == INTERRUPT_STATUS:
            return self.interrupt_status
        if offset == STATUS:
            return self.status
        if offset == CONFIG_GENERATION:
            return self.read_generation()
        if offset == DEVICE_FEATURES:
            return self.read_features(self.device_features_sel)
        if offset in (QUEUE_READY, QUEUE_SIZE_MAX):
            queue = self.find_queue(self.queue_sel)
            if queue is None:
                return 0
            return int(queue.ready) if offset == QUEUE_READY else queue.max_size
        if SHM_LENGTH_LOW <= offset <= SHM_BASE_HIGH:
            return 0xFFFFFFFF  # there is no such region
        return {
            MAGIC_VALUE: MAGIC,
            VERSION: 2,
            DEVICE_ID: self.device.virtio_id,
            VENDOR_ID: VENDOR,
        }.get(offset, 0)

    def on_write(self, offset: int, size: int, value: int) -> None:
        if offset >= CONFIG:
            self.write_config(offset - CONFIG, size, value)
        elif size != 4 or offset & 3:
            pass
        elif offset == INTERRUPT_ACK:
            self._line.acknowledge(value)
        elif offset == QUEUE_NOTIFY:
            # Only what KVM does not know: with its eventfd an existing queue never gets here.
            if value < len(self.queues):
                self.kick(value)
        elif offset == STATUS:
            self.write_status(value)
        elif offset == DEVICE_FEATURES_SEL:
            self.device_features_sel = value
        elif offset == DRIVER_FEATURES_SEL:
            self.driver_features_sel = value
        elif offset == DRIVER_FEATURES:
            self.write_features(self.driver_features_sel, value)
        elif offset == QUEUE_SEL:
            self.queue_sel = value
        else:
            self._write_queue(offset, value)

    def _write_queue(self, offset: int, value: int) -> None:
        queue = self.find_queue(self.queue_sel)
        if queue is None:
            return
        if offset == QUEUE_READY:
            if value & 1:
                self.enable_queue(queue)
            else:
                self.disable_queue(queue)
        elif offset == QUEUE_SIZE:
            self.write_queue_size(queue, value)
        elif offset in _ADDRESSES:
            self.write_queue_address(queue, *_ADDRESSES[offset], value)
