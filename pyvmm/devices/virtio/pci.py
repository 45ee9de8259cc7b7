"""virtio over PCI (virtio 1.3, 4.1), as a face of ``transport``: configuration space, registers in
a BAR, an MSI-X vector for each queue.

Left out: the legacy interface, shared memory regions, administration queues, notification data,
resetting a single queue. The device's registers are in BAR 4, the MSI-X table in BAR 1, as QEMU has
them.

What an evil guest can try beyond what ``transport`` names: vectors that do not exist (they are
NO_VECTOR, which the driver reads back), BARs that move while queues are served, accesses of any
size and place, also through the window in the configuration space.
"""

from __future__ import annotations

import struct

from pyvmm.devices.pci.function import BAR_64, BAR_PREFETCHABLE, CONFIGURATION, Function, Kick
from pyvmm.devices.pci.msix import STATE, Msix
from pyvmm.devices.virtio.transport import (
    CONFIG_SIZE,
    MAX_QUEUES,
    QUEUE,
    Interrupts,
    Transport,
    check_status,
)
from pyvmm.vmstate.fields import Description, Record, Struct, StructArray, each, u8, u16, u32, u64

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from pyvmm.core.iothread import IoThread
    from pyvmm.devices.virtio.device import VirtioDevice
    from pyvmm.memory.guest import GuestMemory

VENDOR = 0x1AF4
#: The PCI device id of virtio device 0.
DEVICE = 0x1040
SUBSYSTEM = 0x1100
REVISION = 1
#: Class by virtio device id (network, disk, console); of all others: unclassified.
CLASSES = {1: 0x020000, 2: 0x010000, 3: 0x078000}
NO_CLASS = 0x00FF00

# Capabilities (4.1.4).
VENDOR_CAPABILITY = 0x09
CFG_COMMON, CFG_NOTIFY, CFG_ISR, CFG_DEVICE, CFG_PCI = 1, 2, 3, 4, 5
#: Of the window's capability.
WINDOW_BAR, WINDOW_OFFSET, WINDOW_LENGTH, WINDOW_DATA = 4, 8, 12, 16

# What is where in the BAR of the registers.
COMMON, ISR, CONFIG, NOTIFY = 0x0000, 0x1000, 0x2000, 0x3000
NOTIFY_STEP = 4
MSIX_BAR, REGISTERS_BAR = 1, 4
SIZE = 0x4000
WIDTH = 4

# The common configuration (4.1.4.3).
DEVICE_FEATURE_SELECT = 0x00
DEVICE_FEATURE = 0x04
DRIVER_FEATURE_SELECT = 0x08
DRIVER_FEATURE = 0x0C
CONFIG_MSIX_VECTOR = 0x10
NUM_QUEUES = 0x12
DEVICE_STATUS = 0x14
CONFIG_GENERATION = 0x15
QUEUE_SELECT = 0x16
QUEUE_SIZE = 0x18
QUEUE_MSIX_VECTOR = 0x1A
QUEUE_ENABLE = 0x1C
QUEUE_NOTIFY_OFF = 0x1E
QUEUE_DESC = 0x20
QUEUE_DRIVER = 0x28
QUEUE_DEVICE = 0x30
COMMON_SIZE = 0x38

NO_VECTOR = 0xFFFF
ISR_QUEUE, ISR_CONFIG = 1, 2

#: Register -> its size; an access of another size is none.
_SIZES = {
    **dict.fromkeys((DEVICE_FEATURE_SELECT, DEVICE_FEATURE, DRIVER_FEATURE_SELECT), 4),
    DRIVER_FEATURE: 4,
    **dict.fromkeys((CONFIG_MSIX_VECTOR, NUM_QUEUES, QUEUE_SELECT, QUEUE_SIZE), 2),
    **dict.fromkeys((QUEUE_MSIX_VECTOR, QUEUE_ENABLE, QUEUE_NOTIFY_OFF), 2),
    **dict.fromkeys((DEVICE_STATUS, CONFIG_GENERATION), 1),
    **dict.fromkeys(range(QUEUE_DESC, COMMON_SIZE, 4), 4),
}
#: Halves of a queue's addresses -> which area, and which half.
_ADDRESSES = {
    register + 4 * half: (area, half)
    for register, area in ((QUEUE_DESC, "desc"), (QUEUE_DRIVER, "avail"), (QUEUE_DEVICE, "used"))
    for half in (0, 1)
}


def name_of(device: VirtioDevice | type[VirtioDevice]) -> str:
    """Return QEMU's name of a device on this bus."""
    return device.name.removesuffix("-device") + "-pci"


def _check(state: Record) -> None:
    check_status(state.status)
    if state.isr & ~(ISR_QUEUE | ISR_CONFIG):
        raise ValueError(f"isr {state.isr:#x} does not exist")


class Vectors(Interrupts):
    """A message for each queue and one for the configuration, or the line, and a register that
    says what that is for.

    :ivar isr: ISR_QUEUE and ISR_CONFIG, until the driver reads it
    :ivar queues: the vector of each queue; NO_VECTOR: it wants none
    """

    def __init__(self, function: Function, msix: Msix, queues: int) -> None:
        self.isr = 0
        self.queues = [NO_VECTOR] * queues
        self.configuration = NO_VECTOR
        self._function = function
        self._msix = msix

    def used(self, queue: int) -> None:
        if not self._msix.is_enabled:
            self.isr |= ISR_QUEUE
        self._interrupt(self.queues[queue])

    def config(self) -> None:
        self.isr |= ISR_CONFIG  # also with messages (4.1.4.5.1)
        self._interrupt(self.configuration)

    def _interrupt(self, vector: int) -> None:
        if self.isr:
            self._function.set_interrupt(True)  # not seen while there are messages
        if self._msix.is_enabled and vector != NO_VECTOR:
            self._msix.notify(vector)

    def repeat(self) -> None:
        # What waits is not repeated, nor what the controllers have; eventfds get their routes.
        self._msix.update()

    def acknowledge(self) -> int:
        """The driver reads the register, which ends the interrupt: return what it was for."""
        isr, self.isr = self.isr, 0
        self._function.set_interrupt(False)
        return isr

    def existing(self, vector: int) -> int:
        """Return a vector that the driver chose; NO_VECTOR for one that there is not."""
        return vector if vector < self._msix.count else NO_VECTOR

    def reset(self) -> None:
        self.isr = 0
        self.queues = [NO_VECTOR] * len(self.queues)
        self.configuration = NO_VECTOR
        self._function.set_interrupt(False)


class VirtioPci(Transport):
    """The function of one device.

    :param send: sends an MSI, by address and data; any thread
    :param vectors: size of the MSI-X table; 0: one for the configuration and one for each queue
    """

    layout = Description(
        "virtio-pci",
        [
            Struct("function", CONFIGURATION),
            Struct("msix", STATE),
            u8("status"),
            u8("isr"),
            u32("config_generation"),
            u64("driver_features"),
            *each(u32, "device_feature_select driver_feature_select"),
            *each(u16, "queue_select config_vector queue_count"),
            StructArray("queues", QUEUE, "queue_count", MAX_QUEUES),
            StructArray(
                "queue_vectors",
                Description("virtio-pci-vector", [u16("vector")]),
                "queue_count",
                MAX_QUEUES,
            ),
        ],
        check=_check,
    )

    def __init__(
        self,
        device: VirtioDevice,
        memory: GuestMemory,
        *,
        kick_fds: list[int],
        send: Callable[[int, int], None],
        thread: IoThread | None = None,
        vectors: int = 0,
    ) -> None:
        self.function = Function(
            name_of(device),
            vendor=VENDOR,
            device=DEVICE + device.virtio_id,
            class_code=CLASSES.get(device.virtio_id, NO_CLASS),
            revision=REVISION,
            subsystem=(VENDOR, SUBSYSTEM),
            has_interrupt=True,
        )
        queues = len(device.queue_sizes)
        self.msix = Msix(self.function, MSIX_BAR, vectors or queues + 1, send)
        self.vectors = Vectors(self.function, self.msix, queues)
        self._add_capabilities(len(kick_fds))
        registers = self.function.add_bar(
            REGISTERS_BAR, SIZE, self, flags=BAR_64 | BAR_PREFETCHABLE, width=WIDTH
        )
        registers.kicks = [
            Kick(NOTIFY + index * NOTIFY_STEP, 2, fd) for index, fd in enumerate(kick_fds)
        ]
        super().__init__(device, memory, self.vectors, kick_fds, thread)
        self.name = self.function.name
        self.function.on_read = self._read_window
        self.function.on_change = self._follow_configuration

    def _add_capabilities(self, queues: int) -> None:
        def capability(type: int, offset: int, length: int, more: bytes = b"") -> bytes:
            # Its length counts the two bytes in front of it.
            size = 16 + len(more)
            bar = 0 if type == CFG_PCI else REGISTERS_BAR
            return struct.pack("<BBB3xII", size, type, bar, offset, length) + more

        for type, offset, length, more in (
            (CFG_COMMON, COMMON, COMMON_SIZE, b""),
            (CFG_ISR, ISR, 1, b""),
            (CFG_DEVICE, CONFIG, CONFIG_SIZE, b""),
            (CFG_NOTIFY, NOTIFY, queues * NOTIFY_STEP, struct.pack("<I", NOTIFY_STEP)),
        ):
            self.function.add_capability(VENDOR_CAPABILITY, capability(type, offset, length, more))
        # The window: BAR, offset and length of an access that reads and writes of its last four
        # bytes make.
        body = capability(CFG_PCI, 0, 0, bytes(4))
        writable = struct.pack("<BBB3x3I", 0, 0, 0xFF, *[0xFFFFFFFF] * 3)
        self._window = self.function.add_capability(VENDOR_CAPABILITY, body, writable)

    @classmethod
    def description(cls, device: type[VirtioDevice] | VirtioDevice) -> Description:
        found = super().description(device)
        found.name = name_of(device)
        return found

    def properties(self) -> dict[str, Any]:
        return {
            "addr": f"{self.function.slot:02x}.{self.function.number:x}",
            **super().properties(),
        }

    # ---- the configuration space -----------------------------------------------------------

    def _follow_configuration(self, offset: int, size: int) -> None:
        self.msix.update()
        access = self._accessed(offset, size)
        if access is not None:
            value = self.function.get(self._window + WINDOW_DATA, access[1])
            with self.lock:
                self.on_write(*access, value)

    def _read_window(self, offset: int, size: int) -> None:
        access = self._accessed(offset, size)
        if access is not None:
            with self.lock:
                value = self.on_read(*access)
            self.function.set(self._window + WINDOW_DATA, access[1], value)

    def _accessed(self, offset: int, size: int) -> tuple[int, int] | None:
        """Return the access to the registers, by offset and size, that one to the window's data
        makes; None if it is not there, or the driver asks for none that can be (4.1.4.9.1)."""
        data = self._window + WINDOW_DATA
        if not (offset < data + 4 and data < offset + size):
            return None
        get = self.function.get
        at, length = get(self._window + WINDOW_OFFSET, 4), get(self._window + WINDOW_LENGTH, 4)
        if get(self._window + WINDOW_BAR, 1) != REGISTERS_BAR or length not in (1, 2, 4):
            return None
        return None if at % length or at + length > SIZE else (at, length)

    # ---- guest accesses --------------------------------------------------------------------

    def on_read(self, offset: int, size: int) -> int:
        if offset < ISR:
            return self._read_common(offset) if _SIZES.get(offset) == size else 0
        if offset < CONFIG:
            if offset != ISR:
                return 0
            with self._bits:
                return self.vectors.acknowledge()
        if offset < CONFIG + CONFIG_SIZE:
            return self.read_config(offset - CONFIG, size)
        return 0

    def _read_common(self, register: int) -> int:
        if register == DEVICE_STATUS:
            return self.status
        if register == CONFIG_GENERATION:
            return self.read_generation() & 0xFF
        if register == DEVICE_FEATURE:
            return self.read_features(self.device_feature_select)
        if register == DRIVER_FEATURE:
            word = self.driver_feature_select
            return self.driver_features >> 32 * word & 0xFFFFFFFF if word < 2 else 0
        queue = self.find_queue(self.queue_select)
        if register >= QUEUE_SIZE:
            if queue is None:
                return 0
            if register in _ADDRESSES:
                area, half = _ADDRESSES[register]
                return int(getattr(queue, area)) >> 32 * half & 0xFFFFFFFF
            return {
                QUEUE_SIZE: queue.size,
                QUEUE_MSIX_VECTOR: self.vectors.queues[self.queue_select],
                QUEUE_ENABLE: int(queue.ready),
                QUEUE_NOTIFY_OFF: self.queue_select,
            }[register]
        return {
            DEVICE_FEATURE_SELECT: self.device_feature_select,
            DRIVER_FEATURE_SELECT: self.driver_feature_select,
            CONFIG_MSIX_VECTOR: self.vectors.configuration,
            NUM_QUEUES: len(self.queues),
            QUEUE_SELECT: self.queue_select,
        }[register]

    def on_write(self, offset: int, size: int, value: int) -> None:
        if offset < ISR:
            if _SIZES.get(offset) == size:
                self._write_common(offset, value)
        elif CONFIG <= offset < CONFIG + CONFIG_SIZE:
            self.write_config(offset - CONFIG, size, value)
        elif offset >= NOTIFY:
            # Only what KVM does not know: its eventfd takes writes of two bytes.
            index = (offset - NOTIFY) // NOTIFY_STEP
            if index < len(self.queues):
                self.kick(index)

    def _write_common(self, register: int, value: int) -> None:
        if register == DEVICE_STATUS:
            self.write_status(value)
        elif register == DEVICE_FEATURE_SELECT:
            self.device_feature_select = value
        elif register == DRIVER_FEATURE_SELECT:
            self.driver_feature_select = value
        elif register == DRIVER_FEATURE:
            self.write_features(self.driver_feature_select, value)
        elif register == CONFIG_MSIX_VECTOR:
            self.vectors.configuration = self.vectors.existing(value)
        elif register == QUEUE_SELECT:
            self.queue_select = value
        else:
            self._write_queue(register, value)

    def _write_queue(self, register: int, value: int) -> None:
        queue = self.find_queue(self.queue_select)
        if queue is None:
            return
        if register == QUEUE_SIZE:
            self.write_queue_size(queue, value)
        elif register == QUEUE_MSIX_VECTOR:
            self.vectors.queues[self.queue_select] = self.vectors.existing(value)
        elif register == QUEUE_ENABLE:
            if value == 1:  # nothing else may be written (4.1.4.3.2)
                self.enable_queue(queue)
        elif register in _ADDRESSES:
            self.write_queue_address(queue, *_ADDRESSES[register], value)

    # ---- life and state --------------------------------------------------------------------

    def clear_registers(self) -> None:
        self.device_feature_select = self.driver_feature_select = self.queue_select = 0

    def reset(self) -> None:
        super().reset()
        self.msix.reset()
        self.function.reset()

    @property
    def isr(self) -> int:
        """The register, for the state."""
        return self.vectors.isr

    @property
    def config_vector(self) -> int:
        """The vector of configuration changes, for the state."""
        return self.vectors.configuration

    @property
    def queue_vectors(self) -> list[Record]:
        """The vector of each queue, for the state."""
        return [Record(vector=vector) for vector in self.vectors.queues]

    def _check(self, state: Record) -> None:
        super()._check(state)
        transport = state.transport
        self.function.check(transport.function)
        self.msix.check(transport.msix)
        vectors = [transport.config_vector, *(one.vector for one in transport.queue_vectors)]
        for vector in vectors:
            if vector != self.vectors.existing(vector):
                raise ValueError(f"vector {vector} is none of {self.msix.count}")

    def load_registers(self, state: Record) -> None:
        self.vectors.isr = state.isr
        self.vectors.configuration = state.config_vector
        self.vectors.queues = [one.vector for one in state.queue_vectors]
        self.device_feature_select = state.device_feature_select
        self.driver_feature_select = state.driver_feature_select
        self.queue_select = state.queue_select
        self.msix.load(state.msix)
        self.function.load(state.function, asserts=bool(state.isr))
